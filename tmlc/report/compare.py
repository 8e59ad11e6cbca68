"""Two profiles side by side: the difference of each figure with an interval, and whether it shows anything.

Each profile has several sittings (`tmlc.report.profile.sittings`), and each of these one value of every figure. The
interval is that of the shift between the two lists of values (`tmlc.report.ranks`), of their logarithms: what differs
from one process to the next, and from one second to the next, is in it, whatever its distribution.

How often any figure of two equal engines may be called different is divided among the figures. What an interval cannot
see is a machine that was busy for all of one profile, and for a part of one only in part: a change is not called one
while it is smaller than what the halves of one profile's sittings differ by.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tmlc.report.noise import wide
from tmlc.report.profile.sittings import BUSY, STEP
from tmlc.report.ranks import place, shift
from tmlc.report.tables import grid, milliseconds, table

FAMILY_ERROR = 0.01
"""How often a comparison of two equal engines calls any of its figures different; divided among the figures."""
LEAST = 0.03
"""A difference of less is never called one."""
LEAST_MS = 0.002
DISTURBED = 2.0
"""Slow ticks of a disturbed machine must be so many times as slow: what it did besides moved their p99 by half."""
GATED_SHARE = 0.01
"""Stages of a smaller share of the step are shown and never fail a comparison; kernels of a smaller one are left
out."""
NOTHING = "no difference shown"
KERNEL = "kernel "
SLOW = ("step p95", "step p99", "slowest")
"""How the names of figures of slow ticks begin."""


@dataclass(frozen=True)
class Figure:
    """One figure of both profiles in ms (the median of their sittings); the change from A to B as a share of A, with
    its interval (None: too little was measured to tell).
    """

    name: str
    a: float
    b: float
    change: float
    low: float | None
    high: float | None
    verdict: str
    gated: bool

    def slower_than(self, share: float) -> bool:
        """Is B slower by more than `share`, at the end of the interval that is best for it?"""
        return self.gated and self.verdict == "slower" and self.low is not None and self.low > share


def figure(name: str, a: np.ndarray, b: np.ndarray, error: float, gated: bool, disturbed: bool) -> Figure:
    """One figure from its values in the sittings of both. `error`: how often its interval may be wrong; `disturbed`: a
    change of it counts only when it doubled.
    """
    first, second = float(np.median(a)), float(np.median(b))
    moved, low, high = shift(np.log(np.maximum(a, 1e-9)), np.log(np.maximum(b, 1e-9)), error)
    change = float(np.expm1(moved))
    if low is None or high is None:
        return Figure(name, first, second, change, None, None, "too few sittings", gated)
    low, high = float(np.expm1(low)), float(np.expm1(high))
    verdict = verdict_of(change, second - first, low, high, max(halves(a), halves(b)))
    if disturbed and verdict != NOTHING and max(first, second) < DISTURBED * min(first, second):
        verdict = "too noisy"
    return Figure(name, first, second, change, low, high, verdict, gated)


def halves(values: np.ndarray) -> float:
    """How far the median moved from the first half of the sittings to the second, as a part of it. Half of them are
    played before the session of the profile and half behind it: a machine that was busy for a while shows here.
    """
    middle = values.size // 2
    first, second = float(np.median(values[:middle])), float(np.median(values[middle:]))
    return abs(second - first) / max(min(first, second), 1e-9)


def verdict_of(change: float, ms: float, low: float, high: float, wander: float) -> str:
    """What a change, a share of A and `ms` long, shows: its interval, and by how much it may wander."""
    if abs(change) < max(LEAST, wander) or abs(ms) < LEAST_MS or low <= 0 <= high:
        return NOTHING
    return "slower" if low > 0 else "faster"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison of two profiles in JSON form: `figures` (each a `Figure`), `warnings`, and what was compared.

    A and B are profiles with sittings; only figures that both have are compared.
    """
    one, two = _values(a), _values(b)
    shares = {
        name: max(float(np.median(side[name]) / np.median(side[STEP])) for side in (one, two))
        for name in one
        if name in two
    }
    names = [name for name in shares if shares[name] >= GATED_SHARE or not name.startswith(KERNEL)]
    error = FAMILY_ERROR / len(names)
    disturbed = [line for name, view in (("A", a), ("B", b)) for line in _disturbed(view["sittings"], name)]
    figures = [
        figure(
            name, one[name], two[name], error, shares[name] >= GATED_SHARE, bool(disturbed) and name.startswith(SLOW)
        )
        for name in names
    ]
    counts = one[STEP].size, two[STEP].size
    return {
        "a": _identity(a),
        "b": _identity(b),
        "confidence": 1 - error,
        "figures": [asdict(one) for one in figures],
        "warnings": [*_unlike(a, b), *disturbed, *_noise(figures[0], counts, error)],
    }


def _values(view: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of each figure in the sittings of a profile, in ms."""
    return {name: np.asarray(values, np.float64) for name, values in view["sittings"]["figures"].items()}


def slower(comparison: Mapping[str, Any], share: float) -> list[str]:
    """The figures in which B is slower than A by more than `share` beyond the interval."""
    return [f["name"] for f in comparison["figures"] if Figure(**f).slower_than(share)]


def played(side: Mapping[str, Any]) -> str:
    """What a comparison read of one side, in words: `10 × 100 ticks`."""
    return f"{side['sittings']} × {side['ticks']:,} ticks" if side["sittings"] > 1 else f"{side['ticks']:,} ticks"


def _identity(view: Mapping[str, Any]) -> dict[str, Any]:
    sat = view["sittings"]
    return {
        **{key: view[key] for key in ("package", "digest")}, "ticks": sat["ticks"], "sittings": len(sat["busy"])
    }  # fmt: skip


def _disturbed(sat: Mapping[str, Any], whose: str) -> list[str]:
    """Whether other programs were at work beside more than a quarter of the sittings."""
    count = sum(busy is not None and busy > BUSY for busy in sat["busy"])
    if 4 * count <= len(sat["busy"]):
        return []
    return [f"other programs were at work beside {count} of {len(sat['busy'])} sittings of {whose}"]


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else differs between two profiles and would explain a difference."""
    found = []
    for what, key in (("machines", "machine"), ("inputs", "inputs"), ("settings", "settings")):
        parts = [k for k in {**a[key], **b[key]} if a[key].get(k) != b[key].get(k)]
        if parts:
            told = ", ".join(f"{k} {a[key].get(k)} and {b[key].get(k)}" for k in parts)
            found.append(f"the {what} differ: {told}")
    one, two = a["sittings"], b["sittings"]
    if one["ticks"] != two["ticks"]:
        found.append(f"the sittings differ in length: {one['ticks']} and {two['ticks']} ticks")
    # A kernel may be missing because no timed tick of some sitting ran it; what takes time has a stage.
    only = sorted(name for name in set(one["figures"]) ^ set(two["figures"]) if not name.startswith(KERNEL))
    if only:
        found.append(f"only one of them has: {', '.join(only)}")
    return found


def _noise(median: Figure, sittings: tuple[int, int], error: float) -> list[str]:
    """Why nothing should be concluded from the medians, if so."""
    if median.low is None or median.high is None:
        enough = next(n for n in itertools.count(1) if place(n, n, error))
        return [
            f"too few sittings to conclude: {sittings[0]} and {sittings[1]}; it takes {enough} on both sides for this "
            "many figures"
        ]
    return wide((median.high - median.low) / 2)


def compare_tables(comparison: Mapping[str, Any]) -> list[Any]:
    """The comparison for a person."""
    head = grid([(name.upper(), f"{c['package']} ({played(c)})") for name in "ab" for c in [comparison[name]]])
    lines = table("B against A", "figure", "A", "B", "change", f"{comparison['confidence']:.2%} interval", "verdict")
    for f in comparison["figures"]:
        interval = "–" if f["low"] is None else f"{f['low']:+.1%} … {f['high']:+.1%}"
        lines.add_row(
            f["name"], milliseconds(f["a"]), milliseconds(f["b"]), f"{f['change']:+.1%}", interval, f["verdict"]
        )
    warnings = [grid([("warning", text)]) for text in comparison["warnings"]]
    return [head, lines, *warnings]
