"""What a profile or a comparison was held to, one entry a gate: what CI shows of it (JUnit, summary)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmlc.report.tables import milliseconds


@dataclass(frozen=True)
class Case:
    """One gate: its name, whether it held (None: no limit was given, it fails nothing), and its figures in words."""

    name: str
    passed: bool | None
    says: str


def profile_cases(view: Mapping[str, Any]) -> list[Case]:
    """The gates of a profile (its record `gate`; one without it is held to its p99), and what it was not held to."""
    turn, steps, grown = view["turn_latency"], view["step_ms"], view["growth"]
    allowed = turn["step_budget_ms"]
    given = {g["figure"]: g["passed"] for g in view.get("gate") or [{"figure": "p99", "passed": turn["within_budget"]}]}
    limits = {g["figure"]: f"; {g['limit']:.2%} allowed" for g in view.get("gate") or [] if g["unit"] == "share"}
    cases = [
        Case(f"step {name}", given.get(name), f"{milliseconds(steps[name])} of {milliseconds(allowed)}")
        for name in ("p50", "p95", "p99", "max")
        if name in given or name == "p99"
    ]
    told = "too few ticks to tell"
    if grown["ratio"] is not None:
        window = f"{grown['window_seconds']:.3g} s"
        told = f"{grown['ratio'] - 1:+.1%} from the first {window} to the last {window}"
    cases.append(Case("growth", given.get("growth"), told + limits.get("growth", "")))
    missed = f"{view['missed_deadlines']:,} of {view['ticks']:,} ticks missed their deadline"
    cases.append(Case("misses", given.get("misses"), missed + limits.get("misses", "")))
    return cases


def comparison_cases(found: Mapping[str, Any]) -> list[Case]:
    """Every figure of a comparison; without --fail-over, and for figures too small to gate, there is no limit."""
    held = found["fail_over"]
    cases = []
    for f in found["figures"]:
        interval = "no interval" if f["low"] is None else f"{f['low']:+.1%} … {f['high']:+.1%}"
        says = f"{milliseconds(f['a'])} → {milliseconds(f['b'])}, {f['change']:+.1%} ({interval}): {f['verdict']}"
        passed = f["name"] not in held["failed"] if held and f["gated"] else None
        cases.append(
            Case(f["name"], passed, says + (f"; {held['share']:.3g} allowed" if held and passed is False else ""))
        )
    return cases
