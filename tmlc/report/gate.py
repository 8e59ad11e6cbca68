"""What `tmlc profile PACKAGE --fail-over FIGURE,…` holds a profile to, for CI: figures of steps against what the budget
leaves for one, growth and misses against a share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tmlc.errors import UsageError

STEPS = ("p50", "p95", "p99", "max")
SHARES = {"growth": 0.05, "misses": 0.0}
"""Figures with a limit of their own, and what it is where none is given: the part by which the last minute may be
slower than the first, and the part of the ticks that may miss their deadline."""


@dataclass(frozen=True)
class Gate:
    """One figure, and its limit as a share (None: of the steps, whose limit is the budget's)."""

    figure: str
    share: float | None = None


def parse_gates(text: str) -> list[Gate]:
    """`p99`, `max,growth:3%`, `misses:0.1%`.

    Raises:
        UsageError: no such figure, or a limit that is no share.
    """
    fix = f"name some of {', '.join((*STEPS, *SHARES))}; a share like growth:3% follows the last two"
    gates = []
    for part in text.split(","):
        name, _, limit = part.strip().partition(":")
        match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", limit.strip())
        if name not in (*STEPS, *SHARES) or (limit and (match is None or name in STEPS)):
            raise UsageError(f"{part.strip()!r} is no figure to hold a profile to", where="--fail-over", fix=fix)
        gates.append(Gate(name, float(match[1]) / 100 if match else SHARES.get(name)))
    return gates


@dataclass(frozen=True)
class Verdict:
    """One figure of a profile against its limit, both in ms or both as a share."""

    figure: str
    value: float
    limit: float
    unit: str
    passed: bool

    def __str__(self) -> str:
        if self.unit == "ms":
            return f"the step's {self.figure} is {self.value:.1f} ms, the budget leaves {self.limit:g} ms"
        return f"{self.figure} is {self.value:+.2%}, {self.limit:.2%} are allowed"


def check_gates(view: Mapping[str, Any], gates: Sequence[Gate]) -> list[Verdict]:
    """Each gate against a profile.

    Raises:
        UsageError: the session was too short to say anything about growth.
    """
    found = []
    for gate in gates:
        if gate.share is None:
            value, limit, unit = view["step_ms"][gate.figure], view["turn_latency"]["step_budget_ms"], "ms"
        elif gate.figure == "misses":
            value, limit, unit = view["missed_deadlines"] / view["ticks"], gate.share, "share"
        else:
            ratio = view["growth"]["ratio"]
            if ratio is None:
                raise UsageError(
                    f"{view['ticks']} ticks are too few to say how a step grows",
                    where="--fail-over growth",
                    fix="profile a longer session",
                )
            value, limit, unit = ratio - 1, gate.share, "share"
        found.append(Verdict(gate.figure, float(value), float(limit), unit, value <= limit))
    return found


def gate_records(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The record `gate` of a profile."""
    return [asdict(verdict) for verdict in verdicts]
