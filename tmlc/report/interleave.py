"""Two engines of one model in one process, tick by tick in the order A B B A: what both get is the same, and what the
machine does meanwhile falls on both.

The change of a median is the median over pairs of neighbouring ticks of the geometric mean of their two ratios B / A,
so that who came first in a tick cancels. Its interval is a bootstrap of these pairs. A tick in which one of them was
silent and the other was not, or chose fewer tokens, did other work, and counts for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import UsageError
from tmlc.report.bootstrap import TAIL, independent, interval, quantile_draws, tail_mean, tails
from tmlc.report.compare import FAMILY_ERROR, GATED_SHARE, Figure, verdict_of
from tmlc.report.noise import WINDOWS, too_few, wandering, wide, windows
from tmlc.report.scenario.case import Case
from tmlc.report.scenario.inputs import parts
from tmlc.report.scenario.play import open_sessions, tick_all, words_to_say
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.media.recording import TickShape

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

WARM = 4
MANY = 3
"""Ticks that must lie above a quantile before it says something."""
DRIFTS, TAIL_DRIFTS = 2.0, 4.0
"""A change that is not so many times as large as it wanders between windows of the session is not called one: the
machine was busy for a while. A burst moves the slow ticks by more."""
NOT_STAGES = ("first_audio", "total", "wait")


@dataclass
class Outputs:
    """How the outputs of B differ from those of A, over all sessions and ticks.

    Attributes:
        ticks: compared.
        tokens_from, audio_from: the first tick in which tokens, or samples, differ; None: in no tick.
        audio_error: the largest difference of a sample while the tokens were still the same.
    """

    ticks: int = 0
    tokens_from: int | None = None
    audio_from: int | None = None
    audio_error: float = 0.0

    def add(self, a: TickOutput, b: TickOutput, tick: int) -> None:
        """One tick of one session of both."""
        self.ticks = tick + 1
        if a.tokens != b.tokens and self.tokens_from is None:
            self.tokens_from = tick
        if not np.array_equal(a.audio, b.audio):
            self.audio_from = tick if self.audio_from is None else self.audio_from
            if self.tokens_from is None and a.audio.size == b.audio.size:
                self.audio_error = max(self.audio_error, float(np.abs(a.audio - b.audio).max()))

    def __str__(self) -> str:
        if self.tokens_from is None and self.audio_from is None:
            return f"outputs equal bit for bit in {self.ticks} ticks"
        if self.tokens_from is None:
            return f"the same tokens in {self.ticks} ticks; samples differ by up to {self.audio_error:.1e}"
        return f"other tokens from tick {self.tokens_from} on"


@dataclass
class Interleaved:
    """Times of both sides in ms, one entry a tick, and which ticks did the same work."""

    a: list[float] = field(default_factory=list)
    b: list[float] = field(default_factory=list)
    stages: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    alike: list[bool] = field(default_factory=list)
    outputs: Outputs = field(default_factory=Outputs)

    def figures(self, error: float = FAMILY_ERROR, seed: int = 0) -> list[Figure]:
        """The median of the step and of each stage, in pairs; the slow ticks as `tmlc.report.compare` does."""
        kept = np.array(self.alike, bool)
        steps = np.array(self.a)[kept], np.array(self.b)[kept]
        names = [name for name, (x, y) in self.stages.items() if min(np.sum(x), np.sum(y)) > 0]
        each = error / (4 + len(names))
        found = [paired("step p50", np.array(self.a), np.array(self.b), kept, each, seed)]
        tails = (("step p95", 0.95), ("step p99", 0.99), (f"slowest {TAIL:.0%} of steps", None))
        found += [slow_ticks(name, *steps, of, each, seed + k) for k, (name, of) in enumerate(tails, 1)]
        for name in names:
            x, y = (np.array(column) for column in self.stages[name])
            ran = kept & (x > 0) & (y > 0)
            share = max(x[kept].sum() / steps[0].sum(), y[kept].sum() / steps[1].sum()) if kept.any() else 0.0
            found.append(paired(f"{name} p50", x, y, ran, each, seed, bool(share >= GATED_SHARE)))
        return found


def paired(
    name: str, a: np.ndarray, b: np.ndarray, kept: np.ndarray, error: float, seed: int, gated: bool = True
) -> Figure:
    """The change of the median from A to B by ratios within pairs of neighbouring ticks; `kept`: ticks that count."""
    if not kept.any():
        return Figure(name, 0.0, 0.0, 0.0, None, None, "too few ticks", gated)
    first, second = float(np.median(a[kept])), float(np.median(b[kept]))
    pairs = ratios(a, b, kept)
    if pairs.size < 2 * MANY:
        return Figure(name, first, second, second / max(first, 1e-9) - 1, None, None, "too few ticks", gated)
    change = float(np.median(pairs)) - 1
    m = independent(pairs, np.ones(pairs.size), 0.5)
    low, high = interval(quantile_draws(pairs, m, 0.5, np.random.default_rng(seed)) - 1, error)
    verdict = verdict_of(change, second - first, low, high, DRIFTS * (wander(windows(pairs)) or 0.0))
    return Figure(name, first, second, change, low, high, verdict, gated)


def ratios(a: np.ndarray, b: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """B / A of each pair of neighbouring ticks that both count: the geometric mean of two ratios."""
    whole = len(a) // 2 * 2
    both = kept[:whole].reshape(-1, 2).all(axis=1)
    each = np.maximum(b[:whole], 1e-9) / np.maximum(a[:whole], 1e-9)
    return np.sqrt(each.reshape(-1, 2).prod(axis=1))[both]


def wander(medians: np.ndarray | None) -> float | None:
    """How much a change wanders in the session, from its medians in windows; None: too few ticks for windows."""
    return None if medians is None else float(np.std(medians))


def slow_ticks(name: str, a: np.ndarray, b: np.ndarray, of: float | None, error: float, seed: int) -> Figure:
    """The quantile `of` of both, or the mean of the slowest ticks: a bootstrap of the difference. What both have in
    common, such as a step that grows with the conversation, is divided out before independent ticks are counted.
    """
    random = np.random.default_rng(seed)
    if of is None:
        first, second = tail_mean(a), tail_mean(b)
    else:
        first, second = (float(np.percentile(v, 100 * of, method="higher")) for v in (a, b))
    base = max(first, 1e-9)
    change = (second - first) / base
    quantile = 1 - TAIL if of is None else of
    one, two = windows(a), windows(b)
    level = np.ones(a.size)
    if one is not None and two is not None:
        centres = (np.arange(WINDOWS) + 0.5) / WINDOWS
        level = np.interp((np.arange(a.size) + 0.5) / a.size, centres, (one + two) / 2)
    m, n = (independent(v, level, quantile) for v in (a, b))
    if min(m, n) * (1 - quantile) < MANY:
        return Figure(name, first, second, change, None, None, "too few ticks", True)
    if of is None:
        difference = tails(b, n, random) - tails(a, m, random)
    else:
        difference = quantile_draws(b, n, of, random) - quantile_draws(a, m, of, random)
    low, high = interval(difference / base, error)
    moved = None if one is None or two is None else wander(two / one)
    verdict = verdict_of(change, second - first, low, high, TAIL_DRIFTS * (moved or 0.0))
    return Figure(name, first, second, change, low, high, verdict, True)


def interleave(
    a: Engine, b: Engine, case: Case, shape: TickShape, seed: int, report: Callable[[int, int], None]
) -> Interleaved:
    """Plays the case's sessions on both engines; the first ticks (its warm-up, at least WARM) count for nothing.

    Raises:
        UsageError: the two are not of models with the same ticks.
    """
    if (a.kind, a.layout) != (b.kind, b.layout):
        raise UsageError(
            f"{a.manifest.model.name} and {b.manifest.model.name} do not have the same ticks",
            where="two engines",
            fix="compare packages of one model",
        )
    count = round(case.seconds / shape.seconds)
    sides = [(engine, open_sessions(engine, case, seed, count), words_to_say(engine, case)) for engine in (a, b)]
    found = Interleaved()
    try:
        feeds = [part.recording.ticks(count) for part in parts(case, a, shape)]
        for tick in range(count):
            given = [next(feed) for feed in feeds]
            taken: list[float] = [0.0, 0.0]
            outputs: list[list[TickOutput]] = [[], []]
            for side in (0, 1) if tick % 2 == 0 else (1, 0):
                engine, sessions, say = sides[side]
                asked = [_saying(one, say) for one in given]
                begun = time.perf_counter_ns()
                outputs[side] = tick_all(engine, sessions, asked)
                taken[side] = (time.perf_counter_ns() - begun) / 1e6
            for x, y in zip(*outputs, strict=True):
                found.outputs.add(x, y, tick)
            if tick >= max(WARM, case.warm_up):
                _keep(found, taken, outputs)
            report(tick + 1, count)
    finally:
        for _, sessions, _ in sides:
            for session in sessions:
                session.close()
    return found


def _saying(given: TickInput, say: list[int]) -> TickInput:
    return TickInput(given.audio, given.video, given.text, given.tokens, given.inject, say or given.say)


def _keep(found: Interleaved, taken: list[float], outputs: list[list[TickOutput]]) -> None:
    found.a.append(taken[0])
    found.b.append(taken[1])
    works = [[(len(out.tokens), out.stats.get("silent", 0)) for out in side] for side in outputs]
    found.alike.append(works[0] == works[1])
    timings = [side[0].timings for side in outputs]
    for name in {**timings[0], **timings[1]}:
        if name in NOT_STAGES:
            continue
        columns = found.stages.setdefault(name, ([0.0] * (len(found.a) - 1), [0.0] * (len(found.a) - 1)))
        for column, timing in zip(columns, timings, strict=True):
            column.append(float(timing.get(name, 0.0)))
    for columns in found.stages.values():
        for column in columns:
            column += [0.0] * (len(found.a) - len(column))


def _noise(found: Interleaved, median: Figure) -> list[str]:
    """Why nothing should be concluded from the medians, if so."""
    if median.low is None or median.high is None:
        return [too_few(len(found.a), len(found.b))]
    moved = wander(windows(ratios(np.array(found.a), np.array(found.b), np.array(found.alike, bool))))
    return [*wide((median.high - median.low) / 2), *wandering(moved, "the change of the step")]


def against(a: Mapping[str, Any], b: Mapping[str, Any], found: Interleaved) -> dict[str, Any]:
    """The comparison in the JSON form of `tmlc.report.compare`, with `outputs`: how those of B differ.

    `a`, `b`: package and digest of both.
    """
    figures = found.figures()
    ticks, alike = len(found.alike), sum(found.alike)
    warnings = _noise(found, figures[0])
    if alike < ticks:
        warnings.append(f"in {ticks - alike} of {ticks} ticks they did other work, and these count for nothing")
    return {
        "a": {**a, "ticks": ticks, "sittings": 1},
        "b": {**b, "ticks": ticks, "sittings": 1},
        "confidence": 1 - FAMILY_ERROR / len(figures),
        "figures": [asdict(one) for one in figures],
        "warnings": warnings,
        "outputs": {**asdict(found.outputs), "says": str(found.outputs)},
    }
