"""`tmlc profile --compare A.json B.json`: two reports against each other, and a gate for CI."""

from __future__ import annotations

import re
from pathlib import Path

import click

from tmlc.cli.common import note, print_json, show
from tmlc.errors import UsageError


def parse_percent(text: str) -> float:
    """'3%' or '3' as a share.

    Raises:
        UsageError: not a percentage from 0 to 1000.
    """
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*%?", text.strip())
    if match is None or float(match[1]) > 1000:
        raise UsageError(f"{text!r} is not a percentage", where="--fail-over", fix="write it as 3%")
    return float(match[1]) / 100


def compare_files(context: click.Context, a: Path, b: Path, fail_over: str | None, as_json: bool) -> None:
    """Compare and print. Exit code 1 when B is slower by more than `fail_over`, at the near end of the interval too."""
    from tmlc.report.compare import compare, compare_tables, slower
    from tmlc.report.profile.file import read_profile

    share = parse_percent(fail_over) if fail_over is not None else None
    # Two reports of one package carry one path: the files are what a reader knows them by.
    one, two = ({**read_profile(path), "package": str(path)} for path in (a, b))
    found = compare(one, two)
    failed = slower(found, share) if share is not None else []
    found["fail_over"] = None if share is None else {"share": share, "failed": failed}
    if as_json:
        print_json(found)
    else:
        show(*compare_tables(found))
    if failed:
        note(f"slower by more than {fail_over}: {', '.join(failed)}")
        context.exit(1)
