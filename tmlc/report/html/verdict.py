"""The three questions that a deployment asks, each answered in a sentence or two: the head of the report and of the
summary for a pull request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmlc.report.html.stages import base
from tmlc.report.tables import milliseconds

NAMED = 3


@dataclass(frozen=True)
class Verdict:
    """`state`: good, over or unsure; `word` and `rest` are the sentence of the head; then the three answers."""

    state: str
    word: str
    rest: str
    in_time: str
    where: str
    faster: str


def verdict(view: Mapping[str, Any]) -> Verdict:
    """From a profile in its JSON form."""
    turn, steps = view["turn_latency"], view["step_ms"]
    typical, worst, budget = turn["typical"]["total_ms"], turn["worst"]["total_ms"], turn["budget_ms"]
    noisy = bool(view["noise"] and view["noise"]["too_noisy"])
    inside = turn["within_budget"]
    state = "over" if not inside else "unsure" if noisy else "good"
    word = "It answers in time" if inside else "It does not answer in time"
    gap = budget - worst
    rest = (
        f"a turn takes {milliseconds(typical)}, the worst {milliseconds(worst)}, "
        f"{milliseconds(abs(gap))} {'inside' if gap >= 0 else 'over'} the budget of {budget:g} ms."
    )
    in_time = (
        f"A step's p99 is {milliseconds(steps['p99'])} of the {turn['step_budget_ms']:g} ms that the budget leaves; "
        f"{view['missed_deadlines']:,} of {view['ticks']:,} ticks missed their deadline."
    )
    grown = view["growth"]["ratio"]
    if grown is not None:
        in_time += f" The median step at the end is {grown:.2f} × that of the beginning."
    if noisy:
        in_time += f" The machine was not quiet: {'; '.join(view['noise']['why'])}."
    return Verdict(state, word, rest, in_time, _where(view), _faster(view))


def _where(view: Mapping[str, Any]) -> str:
    steps, stages = view["step_ms"], view["stages_ms"]
    shares: dict[str, float] = {}
    for name, stage in stages.items():
        shares[base(name)] = shares.get(base(name), 0.0) + stage["share"]
    largest = sorted(shares, key=lambda name: -shares[name])[:NAMED]
    told = ", ".join(f"{name} {shares[name]:.0%}" for name in largest)
    waiting = view["turn_latency"]["worst"]["tick_wait_ms"] / view["turn_latency"]["worst"]["total_ms"]
    return (
        f"Of a step of {milliseconds(steps['p50'])} (p50): {told}, between the calls "
        f"{view['between_calls_ms']['share']:.0%}. Of the worst turn, {waiting:.0%} is filling the tick."
    )


def _faster(view: Mapping[str, Any]) -> str:
    """The best advice that names a gain, else what comes first."""
    advice = [a for a in view["advice"] or [] if a["about"] != "machine"]
    if not advice:
        return "No rule found anything to say about these figures."
    best = max(advice, key=lambda a: a["gain"] or 0.0)
    return str(best["says"] if best["gain"] else advice[0]["says"])
