"""Puts the report together: one HTML file, everything in it, the same bytes for the same profile.

The content security policy in its head forbids every request, and every script but the one that sorts tables (by its
hash), so that nothing in a name of a model or of a file can run even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from tmlc.report.html import measured, sections
from tmlc.report.html.stages import parts_of
from tmlc.report.html.svg import escape
from tmlc.report.html.verdict import Verdict, verdict
from tmlc.report.tables import megabytes

LINKS = (
    ("advice", "Advice"),
    ("budget", "Budget"),
    ("step", "Step"),
    ("timeline", "Ticks"),
    ("histogram", "Spread"),
    ("roofline", "Roofline"),
    ("kernels", "Kernels"),
    ("memory", "Memory"),
    ("passes", "Passes"),
    ("use", "In use"),
    ("quality", "Quality"),
    ("setting", "Machine"),
    ("missing", "Not measured"),
)


def html_report(view: Mapping[str, Any]) -> str:
    """The report of a profile in its JSON form (version 2, docs/latency.md). Parts that are null are left out and told
    of at the end.
    """
    parts = parts_of(view)
    found = verdict(view)
    body = (
        sections.advice_section(view),
        sections.budget_section(view, parts),
        sections.step_section(view, parts),
        sections.timeline_section(view, parts),
        sections.histogram_section(view),
        measured.roofline_section(view, parts),
        measured.kernel_section(view, parts),
        sections.memory_section(view),
        sections.passes_section(view),
        sections.conversation_section(view),
        sections.quality_section(view),
        sections.setting_section(view),
        sections.missing_section(view),
    )
    main = "".join(body)
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in LINKS if f'<section id="{name}">' in main)
    return (
        f'<!doctype html>\n<html lang="en">\n{_head(view)}\n<body>\n{_header(view, found, links)}\n'
        f"<main>\n{main}</main>\n{_footer(view)}\n<script>{_asset('sort.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _head(view: Mapping[str, Any]) -> str:
    digest = base64.b64encode(hashlib.sha256(_asset("sort.js").encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    )
    return (
        '<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(view['model'])}: latency profile</title>\n<style>{_asset('report.css')}</style>\n</head>"
    )


def _header(view: Mapping[str, Any], found: Verdict, links: str) -> str:
    box, settings = view["machine"], view["settings"]
    what = (
        f"{view['model']} · {settings['target']}, {settings['precision']}, {megabytes(view['bytes']['weights'])} · "
        f"{box['cpu']}, {box['threads']} of {box['cores']} cores, kernels {box['isa']} · "
        f"{view['ticks']:,} ticks ({view['seconds']:,.0f} s) of {view['inputs']['what']}"
    )
    asked = "".join(
        f"<div><h2>{question}</h2><p>{escape(answer)}</p></div>"
        for question, answer in (
            ("Will it answer in time?", found.in_time),
            ("Where does the time go?", found.where),
            ("What would make it faster?", found.faster),
        )
    )
    look = {"good": "", "over": ' class="over"', "unsure": ' class="unsure"'}[found.state]
    return (
        f'<header>\n<p class="what">{escape(what)}</p>\n'
        f'<h1{look}><b>{escape(found.word)}:</b> {escape(found.rest)}</h1>\n'
        f'<div class="asked">{asked}</div>\n{sections.key_figures(view)}\n'
        f'<nav aria-label="Sections">{links}</nav>\n</header>'
    )


def _footer(view: Mapping[str, Any]) -> str:
    text = (
        f"Made by tmlc profile from {view['package']} (digest {view['digest'][:16]}). All times in ms unless they say "
        "otherwise; percentiles are observed values by nearest rank. What each figure means: docs/latency.md of tmlc."
    )
    return f"<footer><p>{escape(text)}</p></footer>"
