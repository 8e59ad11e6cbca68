"""A profile as Chrome trace events (JSON object form), which ui.perfetto.dev and chrome://tracing open.

Written after the Trace Event Format: complete events (X) with `ts` and `dur` in µs that nest within a thread, instants
(i) with a scope, counters (C), names of processes and threads as metadata (M). A profile keeps how long each stage
of a tick took and not when: stages lie one behind the other from the start of their tick, in the order of the profile,
and ticks on their grid. `otherData` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOST_TICKS = 3000
"""Of a longer session every second, third … tick is written, and the first MOST_MISSES over the budget."""
MOST_MISSES = 500
MOST_CALLS = 5000
SESSION, KERNELS = 1, 2


def trace_text(view: Mapping[str, Any]) -> str:
    """The trace of a profile in its JSON form: one event a line."""
    events = [*_session(view), *_kernels(view)]
    lines = ",\n".join(json.dumps(event, ensure_ascii=True, allow_nan=False, separators=(",", ":")) for event in events)
    other = {
        "model": view["model"],
        "package": view["package"],
        "digest": view["digest"],
        "order": "stages lie one behind the other in each tick; a profile keeps how long they took and not when",
        "kernels": "a mean tick: each call as long as all its runs in one",
    }
    return f'{{"displayTimeUnit":"ms","otherData":{json.dumps(other)},"traceEvents":[\n{lines}\n]}}\n'


def _name(pid: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": what, "args": {"name": name}}


def _span(pid: int, tid: int, name: str, kind: str, start: int, end: int, **told: Any) -> dict[str, Any]:
    """A complete event from and to nanoseconds."""
    span = {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "cat": kind,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
    }
    return {**span, "args": told} if told else span


def _session(view: Mapping[str, Any]) -> list[dict[str, Any]]:
    samples, turn = view["samples"], view["turn_latency"]
    steps, budget = samples["step_ms"], turn["step_budget_ms"]
    period = round(turn["worst"]["tick_wait_ms"] * samples["every"] * 1e6)
    every = -(-len(steps) // MOST_TICKS)
    over = [k for k, ms in enumerate(steps) if ms > budget][:MOST_MISSES]
    events = [
        _name(SESSION, 0, "process_name", f"session of {view['model']}"),
        _name(SESSION, 1, "thread_name", "ticks"),
    ]
    columns = {**samples["stages_ms"], "between calls": samples["between_calls_ms"], "wait": samples["wait_ms"]}
    free = 0
    for k in sorted({*range(0, len(steps), every), *over}):
        start = max(k * period, free)
        free = end = start + round(steps[k] * 1e6)
        # The first tick is not among the samples.
        events.append(_span(SESSION, 1, "tick", "tick", start, end, tick=1 + k * samples["every"], step_ms=steps[k]))
        at = start
        for name, column in columns.items():
            if column[k]:
                until = min(end, at + max(0, round(column[k] * 1e6)))
                if until > at:
                    events.append(_span(SESSION, 1, name, "stage", at, until))
                at = until
        counts = {"step": steps[k], "budget": budget}
        events.append({"ph": "C", "pid": SESSION, "tid": 1, "name": "step, ms", "ts": start / 1000, "args": counts})
        if steps[k] > budget:
            told = {"step_ms": steps[k], "budget_ms": budget}
            events.append({"ph": "i", "s": "t", "pid": SESSION, "tid": 1, "name": "over budget", "cat": "miss",
                           "ts": end / 1000, "args": told})  # fmt: skip
    return events


def _kernels(view: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mean tick of the timed ones, a thread a method, its calls in the order of the plan."""
    kernels = view["kernels"]
    if not kernels or not kernels["ticks"]:
        return []
    calls = sorted((c for c in kernels["calls"] if c["runs"]), key=lambda c: -c["share"])[:MOST_CALLS]
    methods = list(dict.fromkeys(c["method"] for c in calls))
    events = [_name(KERNELS, 0, "process_name", f"kernels: a mean of {kernels['ticks']} ticks")]
    for tid, method in enumerate(methods, 1):
        events.append(_name(KERNELS, tid, "thread_name", method))
        at = 0
        for call in sorted((c for c in calls if c["method"] == method), key=lambda c: c["index"]):
            until = at + round(call["runs"] * call["ms"] / kernels["ticks"] * 1e6)
            told = {key: call[key] for key in ("index", "layer", "bytes", "operations", "gb_s", "gflop_s", "bound")}
            events.append(
                _span(KERNELS, tid, call["op"], "kernel", at, until, **told, runs=call["runs"] / kernels["ticks"])
            )
            at = until
    return events
