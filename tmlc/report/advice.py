"""What would make it faster, or the figures better: sentences that follow from the figures of a profile and from
nothing else, each with its figures and, where the cost model (docs/cost-model.md) or a measurement tells it, the gain.

A rule looks at one question and says nothing below its threshold. Gains are parts of the median step. They are not
added up: what one advice saves, another cannot save again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tmlc.report.plan.hardware import HERE_OP_US, HERE_REACH
from tmlc.report.plan.precision import BITS
from tmlc.report.tables import megabytes, milliseconds, table

AT_CEILING = 0.75
"""Part of a ceiling from which on a stage is called bound by it."""
FAR = 0.4
"""A kernel that reaches less than this of both ceilings is far from them."""
LEAST_SHARE = 0.05
"""Stages, kernels and gaps of a smaller part of the step are not worth a sentence."""
LEAST_GAIN = 0.02
GROWN = 1.05
MEMORY_GROWN = 8e6
FIRST_TICK = 5.0
"""A first tick this many times as long as the median is told of, even when the budget holds."""
TAIL = 1.5
"""A p99 this many times the median is told of, with the part of the step that makes it."""
SMALL_STEP = 0.25
"""Where the step is a smaller part of the worst turn, a faster step hardly shortens it."""
MANY_PAGES = 64e6
"""Weights of at least so many bytes are more pages than a processor's tables of addresses hold."""
LOWER = {"fp32": ("bf16", "int8"), "bf16": ("int8", "int4"), "int8": ("int4",), "fp8": ("int4",)}
"""Precisions with fewer bytes, nearest first."""


@dataclass(frozen=True)
class Advice:
    """`about`: a stage, a kernel, machine, memory …; `gain`: part of the median step, None: not told."""

    about: str
    says: str
    gain: float | None = None


Rule = Callable[[Mapping[str, Any]], list[Advice]]


def advise(view: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All advice for a profile in its JSON form: a noisy machine first, since it weakens the rest; then by gain."""
    found = [advice for rule in RULES for advice in rule(view)]
    found.sort(key=lambda a: (a.about != "machine", -(a.gain or 0.0)))
    return [asdict(advice) for advice in found]


def noise(view: Mapping[str, Any]) -> list[Advice]:
    record = view["noise"]
    if not record or not record["too_noisy"]:
        return []
    why = "; ".join(record["why"])
    return [Advice("machine", f"Measure again before you conclude anything: {why}.")]


def budget(view: Mapping[str, Any]) -> list[Advice]:
    turn, p99 = view["turn_latency"], view["step_ms"]["p99"]
    allowed = turn["step_budget_ms"]
    if p99 > allowed:
        says = (
            f"The step's p99 of {milliseconds(p99)} is over the {milliseconds(allowed)} that the budget leaves: it "
            f"must fall by {1 - allowed / p99:.0%}."
        )
        return [Advice("budget", says)]
    worst = turn["worst"]
    share = worst["step_ms"] / worst["total_ms"]
    if share >= SMALL_STEP:
        return []
    says = (
        f"The step is {share:.0%} of the worst turn of {milliseconds(worst['total_ms'])}, and filling the tick "
        f"{worst['tick_wait_ms'] / worst['total_ms']:.0%}: a faster step can take at most "
        f"{milliseconds(worst['step_ms'])} off a turn; what it buys is sessions and energy."
    )
    return [Advice("budget", says)]


def _calls(view: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The timed kernel calls that ran, for which the ceilings are known."""
    if not view["kernels"] or not view["ceilings"] or not view["kernels"]["ticks"]:
        return []
    return [c for c in view["kernels"]["calls"] if c["runs"] and c["ms"]]


def _a_tick(view: Mapping[str, Any], call: Mapping[str, Any]) -> float:
    """ms of a call in a mean tick."""
    return call["runs"] * call["ms"] / view["kernels"]["ticks"]


def _of_step(view: Mapping[str, Any], saved_ms: float) -> float:
    return saved_ms / max(view["step_ms"]["p50"], 1e-9)


def fewer_bytes(view: Mapping[str, Any]) -> list[Advice]:
    """Stages that read as fast as the machine can: only fewer bytes help."""
    precision = view["settings"].get("precision")
    sizes = {e["name"]: e["bytes"] for e in view["memory_map"] or [] if e["what"] == "weights"}
    made = []
    for method in dict.fromkeys(c["method"] for c in _calls(view)):
        calls = [c for c in _calls(view) if c["method"] == method]
        ms = sum(_a_tick(view, c) for c in calls)
        reading = [c for c in calls if c["bound"] == "bandwidth" and c["of_bandwidth"] is not None]
        reading_ms = sum(_a_tick(view, c) for c in reading)
        if not reading_ms or reading_ms < 0.5 * ms or _of_step(view, ms) < LEAST_SHARE:
            continue
        reached = sum(_a_tick(view, c) * c["of_bandwidth"] for c in reading) / reading_ms
        if reached < AT_CEILING:
            continue
        nbytes = sum(c["runs"] * c["bytes"] for c in reading) / view["kernels"]["ticks"]
        says = (
            f"{method} reads {megabytes(nbytes)} a tick at {reached:.0%} of the machine's bandwidth: only fewer bytes "
            "help"
        )
        saved = {to: _saved(view, reading, sizes, precision, to) for to in LOWER.get(precision or "", ())}
        worth = [(to, _of_step(view, ms)) for to, ms in saved.items() if _of_step(view, ms) >= LEAST_GAIN]
        if worth:
            told = ", ".join(f"{to} would save {gain:.0%} of the step" for to, gain in worth)
            says += f"; from {precision}, {told} (predicted; `tmlc eval` says what it costs)"
        made.append(Advice(method, says + ".", max((gain for _, gain in worth), default=None)))
    return made


def _saved(
    view: Mapping[str, Any], calls: list[Mapping[str, Any]], sizes: Mapping[str, int], now: str, to: str
) -> float:
    """ms of a tick that calls bound by bandwidth would save with their weights stored in another precision: the cost
    model's time, the larger of reading and multiplying, scaled so that it is right for what was measured.
    """
    rates = view["ceilings"]["multiply"]
    rate = rates.get(to if to in rates else "int8", 0.0)
    saved = 0.0
    for call in calls:
        weights = min(float(call["bytes"]), float(sum(sizes.get(name, 0) for name in call["weights"])))
        fewer = call["bytes"] - weights * (1 - BITS[to] / BITS[now])
        multiplying = call["operations"] / (rate * 1e6 * HERE_REACH["products"]) if rate else 0.0
        after = max(call["ms"] * fewer / call["bytes"], min(multiplying, call["ms"])) if call["bytes"] else call["ms"]
        saved += _a_tick(view, call) * (1 - after / call["ms"])
    return saved


def far_from_ceilings(view: Mapping[str, Any]) -> list[Advice]:
    """Kernels that are slow for another reason than bytes or products."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for call in _calls(view):
        groups.setdefault((call["method"], call["op"]), []).append(call)
    made = []
    for (method, op), calls in groups.items():
        ms = sum(_a_tick(view, c) for c in calls)
        reading = sum(_a_tick(view, c) * (c["of_bandwidth"] or 0.0) for c in calls) / ms
        multiplying = sum(_a_tick(view, c) * (c["of_multiply"] or 0.0) for c in calls) / ms
        share = _of_step(view, ms)
        if share < LEAST_SHARE or max(reading, multiplying) >= FAR:
            continue
        model = sum(_modelled(c) * c["runs"] for c in calls) / view["kernels"]["ticks"]
        gain = _of_step(view, ms - model)
        if gain < LEAST_GAIN:
            continue
        runs = sum(c["runs"] for c in calls) / view["kernels"]["ticks"]
        says = (
            f"{op} in {method} takes {share:.0%} of the step ({milliseconds(ms)}, {runs:.3g} × a tick) and reaches "
            f"{reading:.0%} of the bandwidth and {multiplying:.0%} of the multiply rate: at what the cost model "
            f"expects of a kernel it would save {gain:.0%}."
        )
        made.append(Advice(f"{method}: {op}", says, gain))
    return made


def _modelled(call: Mapping[str, Any]) -> float:
    """ms of a run by the cost model: the measured time scaled from the part of its ceiling that it reaches to the part
    that kernels reach, and what an op costs beside that; never more than was measured.
    """
    parts = [call["of_bandwidth"] or 0.0, call["of_multiply"] or 0.0]
    times = [
        call["ms"] * p / reach for p, reach in zip(parts, (HERE_REACH["bytes"], HERE_REACH["products"]), strict=True)
    ]
    return float(min(call["ms"], max(times) + HERE_OP_US / 1000))


def threads(view: Mapping[str, Any]) -> list[Advice]:
    used, cores = view["machine"]["threads"], view["machine"]["cores"]
    if used > cores:
        says = (
            f"{used} kernel threads share {cores} cores, and wait for each other at every barrier: "
            f"use --threads {cores}."
        )
        return [Advice("machine", says)]
    if used == cores or not (calls := _calls(view)):
        return []
    # More threads share one memory: only what it does not bound is taken to gain.
    free = sum(_a_tick(view, c) for c in calls if c["bound"] == "multiply")
    gain = _of_step(view, free * (1 - used / cores))
    says = f"{used} of {cores} cores are used"
    if gain >= LEAST_GAIN:
        bound = _of_step(view, free)
        says += f"; {bound:.0%} of the step is bound by products: --threads {cores} would save {gain:.0%}."
        return [Advice("threads", says, gain)]
    return [Advice("threads", f"{says}, and reading bounds the step: try --threads {cores} and measure.")]


def huge_pages(view: Mapping[str, Any]) -> list[Advice]:
    settings, weights = view["settings"], view["bytes"]["weights"]
    if settings["target"] != "cpu" or settings["huge_pages"] or weights < MANY_PAGES:
        return []
    says = (
        f"The weights of {megabytes(weights)} are mapped in {weights / 4096:,.0f} pages of 4 KiB: --huge-pages makes "
        f"them {weights / 2**21:,.0f}, at the price of a slower load; measure both."
    )
    return [Advice("memory", says)]


def between_calls(view: Mapping[str, Any]) -> list[Advice]:
    made = []
    for key, what, remedy in (
        ("between_calls_ms", "between the calls", "fewer calls a tick, or a faster core for Python"),
        ("wait_ms", "waiting for the device", "more work for it at a time, such as more sessions in a batch"),
    ):
        part = view[key]
        if part["share"] >= LEAST_SHARE:
            says = (
                f"{part['share']:.0%} of the step ({milliseconds(part['p50'])} at p50) is spent {what}, where no "
                f"kernel runs: {remedy}."
            )
            made.append(Advice(what, says))
    return made


def tail(view: Mapping[str, Any]) -> list[Advice]:
    """Which part of the step makes the slow ticks slow."""
    steps = view["step_ms"]
    if steps["p50"] <= 0 or steps["p99"] < TAIL * steps["p50"]:
        return []
    samples = view["samples"]
    step = np.array(samples["step_ms"], np.float64)
    slow, usual = step >= steps["p95"], step <= steps["p50"]
    columns = {**samples["stages_ms"], "between calls": samples["between_calls_ms"], "waiting": samples["wait_ms"]}
    more = {}
    for name, column in columns.items():
        values = np.array([ms or 0.0 for ms in column], np.float64)
        more[name] = float(values[slow].mean() - values[usual].mean()) if slow.any() and usual.any() else 0.0
    total = sum(more.values())
    name = max(more, key=lambda n: more[n])
    says = f"The step's p99 is {steps['p99'] / steps['p50']:.1f} × its median"
    if total > 0:
        says += f"; {more[name] / total:.0%} of what slow ticks take longer is {name}"
    return [Advice(name if total > 0 else "step", says + ".")]


def first_tick(view: Mapping[str, Any]) -> list[Advice]:
    first, usual, allowed = view["first_tick_ms"], view["step_ms"]["p50"], view["turn_latency"]["step_budget_ms"]
    if first <= allowed and first < FIRST_TICK * usual:
        return []
    over = f", over the {milliseconds(allowed)} of the budget" if first > allowed else ""
    says = (
        f"The first tick took {milliseconds(first)}, {first / max(usual, 1e-9):.1f} × the median{over}: play a tick of "
        "silence before the first person is let in."
    )
    return [Advice("first tick", says)]


def growth(view: Mapping[str, Any]) -> list[Advice]:
    """Steps or memory that grow with the conversation. Of steps on a noisy machine nothing is said: what else ran there
    changes the medians as much.
    """
    made, grown = [], view["growth"]
    noisy = bool(view["noise"] and view["noise"]["too_noisy"])
    if not noisy and grown["ratio"] is not None and grown["ratio"] >= GROWN:
        minutes = max(view["seconds"] - grown["window_seconds"], 1e-9) / 60
        a_minute = (grown["last_ms"] - grown["first_ms"]) / minutes
        room = view["turn_latency"]["step_budget_ms"] - view["step_ms"]["p99"]
        says = (
            f"The median step grew {grown['ratio']:.2f} × ({milliseconds(grown['first_ms'])} to "
            f"{milliseconds(grown['last_ms'])}), by {a_minute:.2g} ms a minute"
        )
        if room > 0:
            says += f": going on so, the p99 is over the budget after {room / a_minute:.0f} more minutes"
        made.append(Advice("growth", f"{says}. A smaller context (`tmlc compile --context`) bounds it."))
    early, end = view["memory"]["resident_early_bytes"], view["memory"]["resident_end_bytes"]
    if early and end and end - early >= MEMORY_GROWN:
        says = (
            f"Resident memory grew from {megabytes(early)} to {megabytes(end)} in {view['seconds']:.0f} s: "
            "pages touched for the first time, or something that is kept."
        )
        made.append(Advice("memory", says))
    return made


def misses(view: Mapping[str, Any]) -> list[Advice]:
    """Missed deadlines though the p99 holds: lateness, or single slow ticks."""
    missed, ticks = view["missed_deadlines"], view["ticks"]
    if not missed or not view["turn_latency"]["within_budget"]:
        return []
    late = view["latest_start_ms"]
    why = (
        f"the latest began {milliseconds(late)} late"
        if late > 0
        else f"the slowest step took {milliseconds(view['step_ms']['max'])}"
    )
    pin = (
        ""
        if view["settings"]["pin"] or view["settings"]["target"] != "cpu"
        else " --pin keeps kernel threads in place."
    )
    says = f"{missed} of {ticks} ticks missed their deadline though the p99 holds: {why}.{pin}"
    return [Advice("misses", says)]


def costly_passes(view: Mapping[str, Any]) -> list[Advice]:
    """Passes without which the step was measured to be faster."""
    made = []
    for row in view["ablation"] or []:
        interval = row["interval"]
        if row["change"] is None or not interval or interval[1] >= 0 or -row["change"] < LEAST_GAIN:
            continue
        says = (
            f"Without the pass {row['pass']} the median step was {-row['change']:.1%} shorter "
            f"({-interval[1]:.1%} to {-interval[0]:.1%}): compile with --disable {row['pass']}."
        )
        made.append(Advice("passes", says, -row["change"]))
    return made


RULES: tuple[Rule, ...] = (
    noise, budget, fewer_bytes, far_from_ceilings, threads, huge_pages, between_calls, tail, first_tick, growth, misses,
    costly_passes,
)  # fmt: skip


def add_advice(view: dict[str, Any]) -> None:
    """The part `advice` of a profile whose other parts are complete."""
    view["advice"] = advise(view)
    view["not_measured"].pop("advice", None)


def advice_tables(view: Mapping[str, Any]) -> list[Any]:
    """The advice for a person at a terminal."""
    if not view["advice"]:
        return []
    rows = table("what would make it faster", "saves", "")
    for advice in view["advice"]:
        rows.add_row("" if advice["gain"] is None else f"{advice['gain']:.0%}", advice["says"])
    return [rows]
