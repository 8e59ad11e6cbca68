"""Two profiles side by side: the difference of each figure with an interval, and whether it shows anything.

The interval is a bootstrap of the difference of one statistic between two lists of ticks (`tmlc.report.bootstrap`).
What both profiles have in common, such as a step that grows with the conversation, is no noise, and is divided out
before it is counted how many of the ticks are independent.

An interval cannot see a machine that was busy for a part of one profile. So the medians of WINDOWS parts of the session
are compared, too: a change of a median that is not DRIFTS times as large as their changes wander, and of the slow ticks
TAIL_DRIFTS times (a burst moves them by more), is not called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tmlc.report.bootstrap import TAIL, independent, interval, quantile_draws, tail_mean, tails
from tmlc.report.noise import WINDOWS, interrupted, too_few, wandering, wide, windows
from tmlc.report.tables import grid, milliseconds, table

FAMILY_ERROR = 0.01
"""How often a comparison of two equal engines calls any of its figures different; divided among the figures."""
LEAST = 0.03
"""A difference of less is never called one: it is what another placement of the same bytes in memory makes. How far
medians of one package really move between two sessions is a figure of `perf/test_experiments.py`."""
LEAST_MS = 0.002
MANY = 3
"""Ticks that must lie above a quantile before it says something."""
DRIFTS, TAIL_DRIFTS = 2.0, 4.0
DISTURBED = 2.0
"""Slow ticks of a disturbed machine must be so many times as slow: what it did besides moved their p99 by half."""
GATED_SHARE = 0.01
"""Stages of a smaller share of the step are shown and never fail a comparison."""


@dataclass(frozen=True)
class Figure:
    """One figure of both profiles in ms; the change from A to B as a share of A, with its interval (None: too few ticks
    to tell) and how much it wandered in the session (None: too few ticks for windows).
    """

    name: str
    a: float
    b: float
    change: float
    low: float | None
    high: float | None
    drift: float | None
    verdict: str
    gated: bool

    def slower_than(self, share: float) -> bool:
        """Is B slower by more than `share`, at the end of the interval that is best for it?"""
        return self.gated and self.verdict == "slower" and self.low is not None and self.low > share


def shared_level(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each tick of both the level that their medians have in common there, from WINDOWS windows, interpolated."""
    one, two = windows(a), windows(b)
    if one is None or two is None:
        return np.ones(a.size), np.ones(b.size)
    common = (one + two) / 2
    centres = (np.arange(WINDOWS) + 0.5) / WINDOWS
    first, second = (np.interp((np.arange(v.size) + 0.5) / v.size, centres, common) for v in (a, b))
    return first, second


def figure(name: str, a: np.ndarray, b: np.ndarray, of: float | None, error: float, seed: int, gated: bool) -> Figure:
    """One figure: the quantile `of`, or the mean of the slowest ticks. `error`: how often its interval may be wrong."""
    random = np.random.default_rng(seed)
    if of is None:
        first, second = tail_mean(a), tail_mean(b)
    else:
        first, second = (float(np.percentile(v, 100 * of, method="higher")) for v in (a, b))
    base = max(first, 1e-9)
    change = (second - first) / base
    quantile = 1 - TAIL if of is None else of
    m, n = (independent(v, level, quantile) for v, level in zip((a, b), shared_level(a, b), strict=True))
    if min(m, n) * (1 - quantile) < MANY:
        return Figure(name, first, second, change, None, None, None, "too few ticks", gated)
    if of is None:
        difference = tails(b, n, random) - tails(a, m, random)
    else:
        difference = quantile_draws(b, n, of, random) - quantile_draws(a, m, of, random)
    low, high = interval(difference / base, error)
    drift = _drift(a, b)
    wander = (DRIFTS if quantile == 0.5 else TAIL_DRIFTS) * (drift or 0.0)
    verdict = verdict_of(change, second - first, low, high, wander)
    return Figure(name, first, second, change, low, high, drift, verdict, gated)


def verdict_of(change: float, ms: float, low: float, high: float, wander: float) -> str:
    """What a change, a share of A and `ms` long, shows: its interval, and by how much it may wander."""
    if abs(change) < max(LEAST, wander) or abs(ms) < LEAST_MS or low <= 0 <= high:
        return "no difference shown"
    return "slower" if low > 0 else "faster"


def _drift(a: np.ndarray, b: np.ndarray) -> float | None:
    """How much the change of the median wanders in the session: standard deviation of that of WINDOWS parts."""
    first, second = windows(a), windows(b)
    return None if first is None or second is None else float(np.std(second / first))


def _numbers(column: Sequence[float | None]) -> np.ndarray:
    return np.array([value for value in column if value is not None], np.float64)


def compare(a: Mapping[str, Any], b: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The comparison of two profiles in JSON form: `figures` (each a `Figure`), `warnings`, and what was compared.

    A and B are views of `profile_engine`; only what can be compared is: stages that both have.
    """
    one, two = a["samples"], b["samples"]
    steps = _numbers(one["step_ms"]), _numbers(two["step_ms"])
    wanted: list[tuple[str, np.ndarray, np.ndarray, float | None, bool]] = [
        *((f"step {name}", *steps, of, True) for name, of in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))),
        (f"slowest {TAIL:.0%} of steps", *steps, None, True),
    ]
    audio = _numbers(one["first_audio_ms"]), _numbers(two["first_audio_ms"])
    if audio[0].size and audio[1].size:
        wanted.append(("first audio p50", *audio, 0.5, True))
    for name, column in one["stages_ms"].items():
        if name in two["stages_ms"]:
            pair = _numbers(column), _numbers(two["stages_ms"][name])
            if pair[0].size and pair[1].size:
                share = max(p.sum() / s.sum() for p, s in zip(pair, steps, strict=True))
                wanted.append((f"{name} p50", *pair, 0.5, bool(share >= GATED_SHARE)))
    between = _numbers(one["between_calls_ms"]), _numbers(two["between_calls_ms"])
    wanted.append(("between calls p50", *between, 0.5, bool(between[0].sum() / steps[0].sum() >= GATED_SHARE)))
    error = FAMILY_ERROR / len(wanted)
    figures = [figure(n, x, y, of, error, seed + k, gated) for k, (n, x, y, of, gated) in enumerate(wanted)]
    noise = noise_of(steps, figures[0])
    disturbed = [line for name, v in (("A", a), ("B", b)) for line in interrupted(v["preempted"], v["ticks"], name)]
    if noise or disturbed:
        # The slow ticks are then those in which the machine did something else; the medians have DRIFTS.
        figures = [
            replace(f, verdict="too noisy")
            if of != 0.5 and f.verdict in ("slower", "faster") and max(f.a, f.b) < DISTURBED * min(f.a, f.b)
            else f
            for f, (*_, of, _) in zip(figures, wanted, strict=True)
        ]
    return {
        "a": _identity(a),
        "b": _identity(b),
        "confidence": 1 - error,
        "figures": [asdict(one) for one in figures],
        "warnings": [*_unlike(a, b), *disturbed, *noise],
    }


def slower(comparison: Mapping[str, Any], share: float) -> list[str]:
    """The figures in which B is slower than A by more than `share` beyond the interval."""
    return [f["name"] for f in comparison["figures"] if Figure(**f).slower_than(share)]


def _identity(view: Mapping[str, Any]) -> dict[str, Any]:
    return {key: view[key] for key in ("package", "digest", "ticks")}


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else differs between two profiles and would explain a difference."""
    found = []
    for what, key in (("machines", "machine"), ("inputs", "inputs"), ("settings", "settings")):
        parts = [k for k in {**a[key], **b[key]} if a[key].get(k) != b[key].get(k)]
        if parts:
            told = ", ".join(f"{k} {a[key].get(k)} and {b[key].get(k)}" for k in parts)
            found.append(f"the {what} differ: {told}")
    if a["ticks"] != b["ticks"]:
        found.append(f"the sessions differ in length: {a['ticks']} and {b['ticks']} ticks")
    only = sorted(set(a["samples"]["stages_ms"]) ^ set(b["samples"]["stages_ms"]))
    if only:
        found.append(f"only one of them has: {', '.join(only)}")
    return found


def noise_of(steps: tuple[np.ndarray, np.ndarray], median: Figure) -> list[str]:
    """Why nothing should be concluded from the medians, if so."""
    if median.low is None or median.high is None:
        return [too_few(*(step.size for step in steps))]
    return [*wide((median.high - median.low) / 2), *wandering(median.drift, "the change of the step")]


def compare_tables(comparison: Mapping[str, Any]) -> list[Any]:
    """The comparison for a person."""
    head = grid([(name.upper(), f"{c['package']} ({c['ticks']} ticks)") for name in "ab" for c in [comparison[name]]])
    lines = table("B against A", "figure", "A", "B", "change", f"{comparison['confidence']:.2%} interval", "verdict")
    for f in comparison["figures"]:
        interval = "–" if f["low"] is None else f"{f['low']:+.1%} … {f['high']:+.1%}"
        lines.add_row(
            f["name"], milliseconds(f["a"]), milliseconds(f["b"]), f"{f['change']:+.1%}", interval, f["verdict"]
        )
    warnings = [grid([("warning", text)]) for text in comparison["warnings"]]
    return [head, lines, *warnings]
