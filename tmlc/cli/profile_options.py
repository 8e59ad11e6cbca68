"""Options of `tmlc profile` beside those that other verbs have, too, in the groups in which its help shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path)
Decorated = Callable[..., Any]


def comparison_options(function: Decorated) -> Decorated:
    """--compare, --against, --fail-over: two profiles, two packages, and what fails in CI."""
    for option in (
        click.option(
            "--fail-over",
            metavar="WHAT",
            help="Exit code 1. With PACKAGE: when one of these figures is over: p50, p95, p99, max (of a step, against "
            "the budget), growth[:5%], misses[:0%].  [default: p99]. With --compare and --against: when B is slower by "
            "more than this, beyond the interval (3%).",
        ),
        click.option(
            "--against",
            type=_FILE,
            metavar="B.tmlc",
            help="Play PACKAGE and this one in one process, tick by tick in turns, and say how B differs.",
        ),
        click.option(
            "--compare",
            type=(_FILE, _FILE),
            metavar="A.json B.json",
            help="Measure nothing: say in which figures profile B differs from A.",
        ),
    ):
        function = option(function)
    return function


def experiment_options(function: Decorated) -> Decorated:
    """--case, --find-sessions, --ablate, --checkpoint, --quality: what is played, and what more is found out."""
    for option in (
        click.option(
            "--quality", type=_FILE, metavar="EVAL.json", help="Scores of `tmlc eval`, shown beside the speed."
        ),
        click.option(
            "--checkpoint", type=_FILE, metavar="DIR", help="What PACKAGE was compiled from, for --ablate."
        ),
        click.option(
            "--ablate",
            is_flag=False,
            flag_value="",
            metavar="[PASS,…]",
            help="Leave out each of these passes (all of the package's, without names) and measure what it bought.",
        ),
        click.option(
            "--find-sessions",
            is_flag=True,
            help="Search how many sessions are held with a step's p99 within the budget.",
        ),
        click.option(
            "--case",
            "case_file",
            type=_FILE,
            metavar="FILE.yaml",
            help="Play this scenario: inputs, sessions, length, clock, background load (perf/cases has some).",
        ),
    ):
        function = option(function)
    return function
