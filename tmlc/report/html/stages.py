"""The parts of a step as the report shows them: their order, their colours, and what a step at a percentile is
made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = 6
"""Stages with a colour of their own; the rest of them share one."""
BETWEEN, WAIT, OTHER = "between calls", "wait for the device", "other stages"
NEAR = 0.01
"""Ticks whose rank is this near to a percentile's tell what a step at the percentile is made of."""


@dataclass(frozen=True)
class Part:
    """A part of every step.

    Attributes:
        look: its colour's class.
        typical, worst: ms of it in a step at p50 and at p99; over all parts they add up to the step.
        share: of the time of all steps.
        column: ms in every tick that was kept, 0 where it did not run.
    """

    name: str
    look: str
    typical: float
    worst: float
    share: float
    column: np.ndarray


def parts_of(view: Mapping[str, Any]) -> list[Part]:
    """The parts of the steps, the largest stage first (calls of one method in a tick as one), what lies
    between the calls and the wait at the end.

    What a step at p50 or p99 is made of is the mean of the ticks whose rank is within a hundredth of it, scaled to it.
    """
    samples = view["samples"]
    step = _numbers(samples["step_ms"])
    stages: dict[str, np.ndarray] = {}
    for name in view["stages_ms"]:
        column = _numbers(samples["stages_ms"][name])
        stages[base(name)] = stages[base(name)] + column if base(name) in stages else column
    ordered = sorted(stages, key=lambda name: -float(stages[name].sum()))
    columns: dict[str, np.ndarray] = {name: stages[name] for name in ordered[:COLOURS]}
    if rest := [stages[name] for name in ordered[COLOURS:]]:
        columns[OTHER] = np.sum(rest, axis=0)
    columns[BETWEEN] = np.maximum(_numbers(samples["between_calls_ms"]), 0.0)
    if any(samples["wait_ms"]):
        columns[WAIT] = _numbers(samples["wait_ms"])
    ranks = np.argsort(step, kind="stable")
    made = {}
    for which, of in (("typical", 0.5), ("worst", 0.99)):
        centre, reach = of * (step.size - 1), max(NEAR * step.size, 0.5)
        near = ranks[max(0, round(centre - reach)) : round(centre + reach) + 1]
        means = np.array([float(column[near].mean()) for column in columns.values()])
        wanted = float(view["step_ms"]["p50" if of == 0.5 else "p99"])
        made[which] = means * (wanted / total) if (total := float(means.sum())) > 0 else means
    total = max(float(step.sum()), 1e-12)
    looks = {OTHER: "c-other", BETWEEN: "c-between", WAIT: "c-wait"}
    return [
        Part(
            name,
            looks.get(name, f"c{k + 1}"),
            float(made["typical"][k]),
            float(made["worst"][k]),
            float(column.sum()) / total,
            column,
        )
        for k, (name, column) in enumerate(columns.items())
    ]


def base(stage: str) -> str:
    """The stage that `decode[3]`, the fourth decode of a tick, is a part of: `decode`."""
    return stage.split("[", 1)[0]


def look_of(parts: list[Part], stage: str) -> str:
    """The colour's class of a stage by name."""
    return next((part.look for part in parts if part.name == stage), "c-other")


def _numbers(column: list[float | None]) -> np.ndarray:
    return np.array([value or 0.0 for value in column], np.float64)
