"""The gates, the verdict and the advice as Markdown in GitHub's dialect: a step summary, or a comment on a pull
request.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from tmlc.report.compare import played
from tmlc.report.gates import Case, comparison_cases, profile_cases
from tmlc.report.html.verdict import verdict
from tmlc.report.tables import milliseconds

ADVICE, STAGES = 5, 8
MARKS = {True: "✅", False: "❌", None: "·"}


def profile_summary(view: Mapping[str, Any]) -> str:
    """Verdict, gates, where the time goes, the first advice."""
    found = verdict(view)
    box, settings, steps = view["machine"], view["settings"], view["step_ms"]
    what = f"{view['model']}, {settings['target']} {settings['precision']}, {box['cpu']}, {box['threads']} thread(s)"
    lines = [f"### {_text(found.word)}: {_text(found.rest)}", "", _text(f"{what}; {view['ticks']:,} ticks."), ""]
    lines += _cases(profile_cases(view))
    lines += ["| part | p50 | p95 | p99 | share |", "| --- | ---: | ---: | ---: | ---: |"]
    stages = sorted(view["stages_ms"].items(), key=lambda item: -item[1]["share"])
    for name, s in [("step", steps), *stages[:STAGES], ("between calls", view["between_calls_ms"])]:
        share = f"{s['share']:.1%}" if "share" in s else ""
        times = " | ".join(milliseconds(s[key]) for key in ("p50", "p95", "p99"))
        lines.append(f"| {_text(name)} | {times} | {share} |")
    lines.append("")
    for advice in (view["advice"] or [])[:ADVICE]:
        gain = "" if advice["gain"] is None else f"**−{advice['gain']:.0%}** "
        lines.append(f"- {gain}{_text(advice['says'])}")
    return "\n".join(lines).rstrip("\n") + "\n"


def comparison_summary(found: Mapping[str, Any]) -> str:
    """What differs between two profiles, and the warnings."""
    held = found["fail_over"]
    failed = held["failed"] if held else []
    slower = [f["name"] for f in found["figures"] if f["verdict"] == "slower"]
    faster = [f["name"] for f in found["figures"] if f["verdict"] == "faster"]
    title = (
        f"Slower than allowed: {', '.join(failed)}"
        if failed
        else (
            f"Slower: {', '.join(slower)}"
            if slower
            else f"Faster: {', '.join(faster)}"
            if faster
            else "No difference shown"
        )
    )
    sides = " against ".join(f"{found[side]['package']} ({played(found[side])})" for side in "ba")
    lines = [f"### {_text(title)}", "", _text(sides), "", *_cases(comparison_cases(found))]
    lines += [f"> {_text(warning)}\n>" for warning in found["warnings"]]
    return "\n".join(lines).rstrip("\n>") + "\n"


def _cases(cases: Sequence[Case]) -> list[str]:
    rows = [f"| {MARKS[case.passed]} | {_text(case.name)} | {_text(case.says)} |" for case in cases]
    return ["| | figure | |", "| --- | --- | --- |", *rows, ""]


def _text(text: object) -> str:
    """Text that GitHub's Markdown shows as it is: on one line, nothing in it is markup."""
    clean = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))
    return re.sub(r"([\\`*_{}\[\]<>#|~@!])", r"\\\1", clean)
