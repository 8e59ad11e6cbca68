"""Times of single kernel calls: which ticks are timed, what each call needed and reached, and what timing costs.

Every n-th tick is timed, the ticks between are not: they say what timing costs. A timed tick in which the system took
a core away counts for no kernel, unless nearly all were like that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tmlc.report.bootstrap import independent, quantile_draws
from tmlc.report.call_work import CallWork, call_work
from tmlc.report.profile.parts import Parts
from tmlc.runtimes.core.kernels import KernelCall, KernelTimer

EXPLAINED = 0.5
"""A call that reaches less of both ceilings is bound by neither: by latency, or by what is not counted."""
CONFIDENCE = 0.95
LEAST_PAIRS = 8
"""Timed ticks that it takes to say something."""
_LAYER = re.compile(r"\blayers?[./](\d+)\b")


class KernelTicks:
    """Switches a timer on and off between ticks.

    Args:
        timer: of the engine's backend.
        every: every how many ticks it is on; never in the first one.

    Attributes:
        timed: whether it was on, tick by tick.
        quiet, disturbed: ticks whose kernels count, by whether the system took a core away in them.
    """

    def __init__(self, timer: KernelTimer, every: int) -> None:
        self.timer, self.every = timer, every
        self.timed: list[bool] = []
        self.quiet = self.disturbed = 0

    def before(self, tick: int) -> None:
        """Before the tick with this number."""
        on = tick > 0 and tick % self.every == 0
        self.timed.append(on)
        if on:
            self.timer.start()

    def after(self, disturbed: bool) -> None:
        """After it. `disturbed`: the system took a core away meanwhile."""
        if self.timed[-1]:
            counts = self.timer.stop(disturbed)
            self.quiet += counts and not disturbed
            self.disturbed += counts and disturbed

    def calls(self) -> tuple[list[KernelCall], int, int]:
        """What counts, in how many ticks, and in how many of these the system took a core away; ends the timer."""
        disturbed = 0 if self.quiet >= LEAST_PAIRS else self.disturbed
        return self.timer.calls(disturbed > 0), self.quiet + disturbed, disturbed


def profiling_cost(steps: Sequence[float], timed: Sequence[bool], seed: int = 0) -> dict[str, Any] | str:
    """What timing kernels adds to a step; the reason where that cannot be said.

    The ratio is the median of those of each timed tick to the median of its untimed neighbours, two to either side:
    what grows or wanders in a session is in both, and the rare tick with a clip moves neither. The interval is a
    bootstrap.
    `steps` and `timed` begin with the first tick, which counts in nothing.
    """
    values, on = np.asarray(steps, np.float64), np.asarray(timed, bool)
    ratios = []
    for k in np.flatnonzero(on).tolist():
        beside = [j for j in (k - 2, k - 1, k + 1, k + 2) if 0 < j < values.size and not on[j]]
        if beside:
            ratios.append(values[k] / np.median(values[beside]))
    if len(ratios) < LEAST_PAIRS:
        return f"it takes {LEAST_PAIRS} timed ticks beside others: profile a longer session, or time every third tick"
    found = np.array(ratios)
    draws = quantile_draws(found, independent(found, np.ones(found.size), 0.5), 0.5, np.random.default_rng(seed))
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return {
        "p50_without_ms": float(np.median(values[1:][~on[1:]])),
        "p50_with_ms": float(np.median(values[on])),
        "ratio": float(np.median(found)),
        "interval": [float(low), float(high)],
    }


def works_of(calls: Iterable[KernelCall], plan: Mapping[str, Any] | None) -> list[CallWork | None]:
    """What a mean run of each call needed: from the CPU plan that ran, or as the target itself counted it; None where
    neither is known."""
    code = {method["name"]: method["code"] for method in plan["methods"]} if plan is not None else {}
    found: list[CallWork | None] = []
    for call in calls:
        runs = call.runs
        if plan is not None and call.touched is not None:
            touched = (call.touched.experts / runs, call.touched.keys / runs, call.touched.row_keys / runs)
            found.append(call_work(plan["tensors"], code[call.method][call.index], call.rows / runs, *touched))
        elif call.nbytes is not None:
            macs = (call.operations or 0.0) / 2 / runs
            found.append(CallWork(activations=call.nbytes / runs, multiply_adds=macs, product="fp32" if macs else ""))
        else:
            found.append(None)
    return found


def layers_of(calls: Sequence[KernelCall]) -> list[int | None]:
    """The layer of each call, from the names of its weights; a call without a name belongs to the layer around it."""
    found: list[int | None] = []
    for call in calls:
        match = next((m for name in (*call.weights, call.name) if (m := _LAYER.search(name))), None)
        found.append(int(match[1]) if match else None)
    out = list(found)
    for k, call in enumerate(calls):
        if found[k] is None and not call.weights:
            before, behind = range(k - 1, -1, -1), range(k + 1, len(calls))
            around = {_beside(calls, found, places, call.method) for places in (before, behind)}
            out[k] = around.pop() if len(around) == 1 else None
    return out


def _beside(calls: Sequence[KernelCall], layers: list[int | None], places: range, method: str) -> int | None:
    """The layer of the nearest call of a method that has weights."""
    return next((layers[j] for j in places if calls[j].method == method and calls[j].weights), None)


def kernel_part(
    calls: Sequence[KernelCall],
    plan: Mapping[str, Any] | None,
    ceilings: Mapping[str, Any] | None,
    every: int,
    ticks: int,
    disturbed: int,
) -> dict[str, Any]:
    """The part `kernels` of a profile."""
    total = sum(call.ns for call in calls)
    rows = []
    for call, work, layer in zip(calls, works_of(calls, plan), layers_of(calls), strict=True):
        ms = call.ns / call.runs / 1e6
        rows.append(
            {
                "method": call.method,
                "index": call.index,
                "op": call.op,
                "layer": layer,
                "weights": list(call.weights),
                "runs": call.runs,
                "ms": ms,
                "share": call.ns / total if total else 0.0,
                **_reached(ms, work, ceilings),
            }
        )
    return {"every": every, "ticks": ticks, "disturbed": disturbed, "calls": rows}


def _reached(ms: float, work: CallWork | None, ceilings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bytes and operations of a run, their rates, and which ceiling is near."""
    if work is None:
        return dict.fromkeys(("bytes", "operations", "gb_s", "gflop_s", "of_bandwidth", "of_multiply", "bound"))
    operations, seconds = 2 * work.multiply_adds, max(ms, 1e-9) / 1e3
    rates = work.bytes / seconds / 1e9, operations / seconds / 1e9
    of_bandwidth = of_multiply = bound = None
    if ceilings is not None:
        of_bandwidth = rates[0] / ceilings["read_gb_s"]
        of_multiply = rates[1] / ceilings["multiply"][work.product] if work.product else None
        nearest = max(of_bandwidth, of_multiply or 0.0)
        bound = "latency" if nearest < EXPLAINED else "multiply" if nearest == of_multiply else "bandwidth"
    return {
        "bytes": round(work.bytes),
        "operations": round(operations),
        "gb_s": rates[0],
        "gflop_s": rates[1],
        "of_bandwidth": of_bandwidth,
        "of_multiply": of_multiply,
        "bound": bound,
    }


def fill(
    parts: Parts,
    ticks: KernelTicks,
    steps: Sequence[float],
    plan: Mapping[str, Any] | None,
    ceilings: Mapping[str, Any] | None,
) -> None:
    """The parts `kernels` and `profiling_cost`, once the session is over."""
    cost = profiling_cost(steps, ticks.timed)
    if isinstance(cost, str):
        parts.missing("profiling_cost", cost)
    else:
        parts.measured("profiling_cost", cost)
    calls, counted, disturbed = ticks.calls()
    if calls:
        parts.measured("kernels", kernel_part(calls, plan, ceilings, ticks.every, counted, disturbed))
    else:
        parts.missing("kernels", f"the session is too short: kernels are timed in one tick of {ticks.every}")
