"""The files that `tmlc profile` writes: the report beside STEM, and what CI reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import check_around
from tmlc.errors import UsageError

SUFFIXES = (".json", ".txt", ".html", ".trace.json")
_FILE = click.Path(path_type=Path)


def file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """-o, --junit, --summary."""
    for option in (
        click.option(
            "--summary",
            type=_FILE,
            metavar="FILE",
            help="Write the verdict as GitHub Markdown, behind what is already in FILE: $GITHUB_STEP_SUMMARY.",
        ),
        click.option("--junit", type=_FILE, metavar="FILE", help="Write the gates as JUnit XML, a case each."),
        click.option(
            "-o", "--out", type=_FILE, metavar="STEM",
            help="Also write STEM.json, STEM.txt, STEM.html (the report to send on) and STEM.trace.json (Perfetto).",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def names(stem: Path) -> list[str]:
    """The files of a report, without their folder."""
    return [stem.name + suffix for suffix in SUFFIXES]


def texts(stem: Path, view: dict[str, Any], tables: list[Any]) -> Mapping[str, str]:
    """What goes into each of `names`."""
    from tmlc.report.html.page import html_report
    from tmlc.report.profile.file import profile_text
    from tmlc.report.tables import plain_text
    from tmlc.report.trace import trace_text

    made = (profile_text(view), plain_text(tables), html_report(view), trace_text(view))
    return dict(zip(names(stem), made, strict=True))


def check_files(*paths: Path | None) -> None:
    """UsageError, before any work, for a file that could not be written."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(
                "there is no folder to write the file into" if not path.is_dir() else "it is a folder, not a file",
                where=str(path),
                fix="give a file in a folder that exists",
            )
        check_around(path)


def write_for_ci(view: Mapping[str, Any], junit: Path | None, summary: Path | None, compared: bool = False) -> None:
    """JUnit and Markdown of a profile, or of a comparison with its `fail_over`. JUnit replaces a file; a summary goes
    behind what is there, as each step's does on GitHub.
    """
    from tmlc.report.gates import comparison_cases, profile_cases
    from tmlc.report.junit import junit_text
    from tmlc.report.summary import comparison_summary, profile_summary

    if junit is not None:
        suite = f"{view['b']['package']} against {view['a']['package']}" if compared else str(view["package"])
        _replace(junit, junit_text(suite, comparison_cases(view) if compared else profile_cases(view)))
    if summary is not None:
        text = comparison_summary(view) if compared else profile_summary(view)
        before = summary.read_text("utf-8", "replace") if summary.exists() else ""
        _replace(summary, before + ("\n" if before and not before.endswith("\n\n") else "") + text)


def _replace(path: Path, text: str) -> None:
    """The whole text, or what was there."""
    handle, name = tempfile.mkstemp(prefix=".tmlc-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
