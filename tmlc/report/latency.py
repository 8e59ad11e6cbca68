"""The budget of a turn, and the statistics of its ticks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tmlc.errors import UsageError

DECODE_MS, SEND_MS = 10.0, 30.0
ASSUMPTIONS = {
    "decode_ms": f"{DECODE_MS:g} ms for decoding the input: assumed, not measured here",
    "send_ms": f"{SEND_MS:g} ms for encoding and sending the output: assumed, not measured here",
    "tick_wait_ms": "speech ends somewhere inside a tick: half a tick on average, a whole one at worst",
    "hesitation": "ticks in which the model itself stays silent are its answer, and not counted as latency",
}


@dataclass(frozen=True)
class Budget:
    """Turn latency = filling the tick + decoding input + the step + encoding and sending the first output.

    `total_ms` bounds the worst case with the step at its p99, so `step_ms` is what a step may take.
    """

    total_ms: float = 400.0
    tick_ms: float = 200.0

    @property
    def step_ms(self) -> float:
        return self.total_ms - self.tick_ms - DECODE_MS - SEND_MS


def parse_milliseconds(text: str, where: str = "--budget") -> float:
    """'400ms', '0.4s' or '400' in milliseconds.

    Raises:
        UsageError: not a duration, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)?", text.strip())
    value = float(match[1]) * (1000.0 if match[2] == "s" else 1.0) if match else 0.0
    if value <= 0:
        raise UsageError(f"{text!r} is not a duration", where=where, fix="write it as 400ms or 0.4s")
    return value


@dataclass(frozen=True)
class Spread:
    """Statistics of durations in ms. `jitter` is the mean change from one step to the next."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float
    mean: float
    jitter: float


def spread(durations_ms: Sequence[float]) -> Spread:
    """Statistics of at least one duration; percentiles are observed values (nearest rank, so p99 is never
    flattered).
    """
    values = np.asarray(durations_ms, np.float64)
    p50, p95, p99 = (float(v) for v in np.percentile(values, (50, 95, 99), method="higher"))
    jitter = float(np.abs(np.diff(values)).mean()) if values.size > 1 else 0.0
    return Spread(values.size, p50, p95, p99, float(np.max(values)), float(values.mean()), jitter)


def turn_latency(steps: Spread, budget: Budget) -> dict[str, Any]:
    """The parts of a turn's latency, typical (mean wait, median step) and worst (full wait, step p99), in
    ms.
    """
    parts = {
        "typical": {
            "tick_wait_ms": budget.tick_ms / 2,
            "decode_ms": DECODE_MS,
            "step_ms": steps.p50,
            "send_ms": SEND_MS,
        },
        "worst": {
            "tick_wait_ms": budget.tick_ms,
            "decode_ms": DECODE_MS,
            "step_ms": steps.p99,
            "send_ms": SEND_MS,
        },
    }
    totals = {name: {**part, "total_ms": sum(part.values())} for name, part in parts.items()}
    return {
        **totals,
        "budget_ms": budget.total_ms,
        "step_budget_ms": budget.step_ms,
        "within_budget": steps.p99 <= budget.step_ms,
        "assumptions": ASSUMPTIONS,
    }


def growth(durations_ms: Sequence[float], tick_ms: float) -> dict[str, Any]:
    """The last minute of a session against its first, by median step (1.0: no growth).

    A session shorter than two minutes and a bit is compared by its first and last third; the first tick,
    which touches memory for the first time, is left out.
    """
    values = np.asarray(durations_ms[1:], np.float64)
    minute = round(60_000 / tick_ms)
    window = minute if values.size >= 2 * minute else values.size // 3
    if window == 0:
        return {"window_ticks": 0, "window_seconds": 0.0, "first_ms": None, "last_ms": None, "ratio": None}
    first, last = float(np.median(values[:window])), float(np.median(values[-window:]))
    return {
        "window_ticks": window,
        "window_seconds": window * tick_ms / 1000,
        "first_ms": first,
        "last_ms": last,
        "ratio": last / first if first > 0 else None,
    }


def as_dict(value: Spread) -> dict[str, Any]:
    return asdict(value)
