"""`tmlc plan`: memory, step time and sessions of a model on hardware that is not here."""

from __future__ import annotations

import re

import click

from tmlc.cli.common import THREADS, note, print_json, require_compiler, show, verb
from tmlc.errors import UsageError

MAX_DEVICES = 64


def _counts(text: str) -> tuple[int, ...]:
    """`4`, `1,2,4` or `1-8`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= MAX_DEVICES:
            fix = f"write it as 4, 1,2,4 or 1-8, at most {MAX_DEVICES}"
            raise UsageError(f"{text!r} is not a number of devices", where="--devices", fix=fix)
        counts += range(first, last + 1)
    return tuple(dict.fromkeys(counts))


@verb(
    "plan",
    example="""
tmlc plan tml-small-276b --on h200 --devices 1-8 --precision fp8
tmlc plan small --on here --precision int8
tmlc plan nano.tmlc --on rtx4090 --json
""",
)
@click.argument("source")
@click.option(
    "--on",
    "hardware",
    required=True,
    metavar="NAME",
    help="h200, h100, b200, b300, a100, l40s, rtx4090, rtx5090, gb10, or here: this machine, measured.",
)
@click.option("--devices", default="1", show_default=True, metavar="N", help="How many: 4, 1,2,4 or 1-8.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8", "int8", "int4"]),
    help="How weights are stored.  [default: the package's, else bf16]",
)
@click.option(
    "--context", type=click.IntRange(1), metavar="N", help="Positions a session keeps.  [default: the model's]"
)
@click.option(
    "--split",
    type=click.Choice(["tensors", "experts"]),
    default="tensors",
    show_default=True,
    help="What devices share out: a part of every weight, or whole experts.",
)
@click.option(
    "--spread",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the experts that the routing uses; random weights use a third.",
)
@click.option("--budget", default="400ms", show_default=True, metavar="TIME", help="Turn latency allowed.")
@THREADS
def command(
    source: str,
    hardware: str,
    devices: str,
    precision: str | None,
    context: int | None,
    split: str,
    spread: float,
    budget: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Predict how SOURCE (a preset, a checkpoint or a package) runs on hardware that is not here.

    Exit code 1 when no number of devices holds one session within the budget.
    """
    require_compiler("planning")
    from tmlc.report.latency import Budget, parse_milliseconds
    from tmlc.report.plan.view import make_plan, plan_tables

    counts, allowed = _counts(devices), Budget(parse_milliseconds(budget))
    if allowed.step_ms <= 0:
        what = f"a budget of {allowed.total_ms:g} ms leaves no time for a step"
        raise UsageError(what, where="--budget", fix="allow more than 240 ms")
    plan = make_plan(source, hardware, counts, precision, context, split, spread, allowed, threads)
    if as_json:
        print_json(plan)
    else:
        show(*plan_tables(plan))
    if not any(row["sessions"] for row in plan["devices"]):
        note(f"no session fits: {plan['devices'][-1]['why_none']}")
        click.get_current_context().exit(1)
