"""From what the clients of a bench wrote down to its figures. Definitions are in docs/bench.md; nothing here looks at a
clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tmlc.bench.client import Visited
from tmlc.bench.dialogues import Dialogue
from tmlc.report.latency import as_dict, spread

BUDGET_MS = 400.0
LATE_MS = 20.0
"""The load generator is too slow when one piece in a hundred leaves later than this: by a piece."""


def turns(visited: Visited, dialogue: Dialogue) -> list[dict[str, float | None]]:
    """Each utterance of one session whose end was said at least a second before the session's end.

    Of each: `end`, when it ended, in seconds of the bench; `answering_ms`, from the moment when the piece with its end
    was due to leave to the arrival of the tick that took it in; `turn_ms`, from its end to the arrival of the first
    voiced tick of those that took it in. None where no such tick came.
    """
    found: list[dict[str, float | None]] = []
    ticks, at = visited.ticks, 0
    for utterance in dialogue.until(visited.spoken - 1.0):
        samples = math.ceil(utterance.end * dialogue.rate)
        while at < len(ticks) and ticks[at][2] < samples:
            at += 1
        end = visited.begin + utterance.end
        answering = ticks[at][1] if at < len(ticks) else None
        voiced = next((tick[1] for tick in ticks[at:] if tick[3]), None)
        found.append(
            {
                "end": end,
                "answering_ms": None if answering is None else 1000 * (answering - end),
                "turn_ms": None if voiced is None else 1000 * (voiced - end),
            }
        )
    return found


def interruptions(visited: Visited, dialogue: Dialogue) -> list[float | None]:
    """Milliseconds from the beginning of each utterance that falls into the model's speech to the arrival of the first
    silent tick of those that heard it; None where the model went on past the utterance's end."""
    found: list[float | None] = []
    ticks, at = visited.ticks, 0
    for utterance in dialogue.until(visited.spoken - 1.0):
        begins = utterance.start * dialogue.rate
        while at < len(ticks) and ticks[at][2] <= begins:
            at += 1
        if at == 0 or at >= len(ticks) or not ticks[at - 1][3]:
            continue
        last = utterance.end * dialogue.rate
        silent = next((tick[1] for tick in ticks[at:] if not tick[3] and tick[2] <= last), None)
        found.append(None if silent is None else 1000 * (silent - visited.begin - utterance.start))
    return found


def ages(visited: Visited, rate: int) -> list[tuple[float, float]]:
    """Of each tick that took samples in: its arrival, and the milliseconds from the moment when the oldest of them was
    spoken. That is the turn latency of somebody who fell silent at the worst moment for this tick."""
    found, before = [], 0
    for _, arrival, samples, _ in visited.ticks:
        if samples > before:
            found.append((arrival, 1000 * (arrival - visited.begin - before / rate)))
            before = samples
    return found


def lost(visited: Visited) -> int:
    """Ticks of which nothing came: their indices are missing between those that did."""
    indices = [tick[0] for tick in visited.ticks]
    return indices[-1] - indices[0] + 1 - len(set(indices)) if indices else 0


def changes(visited: Visited) -> list[float]:
    """Milliseconds by which the distance of one tick's arrival from the last one's differs from their distance on the
    grid."""
    return [
        1000 * abs((b[1] - a[1]) - 0.2 * (b[0] - a[0]))
        for a, b in zip(visited.ticks, visited.ticks[1:], strict=False)
    ]  # fmt: skip


def growth(samples: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """The median of the last minute of `samples` (moment, value) against that of the first; of thirds when they span
    less than three minutes."""
    ordered = sorted(samples)
    if len(ordered) < 3:
        return {"window_seconds": 0.0, "first_ms": None, "last_ms": None, "ratio": None}
    begin, end = ordered[0][0], ordered[-1][0]
    window = min(60.0, (end - begin) / 3)
    first = float(np.median([value for at, value in ordered if at <= begin + window]))
    last = float(np.median([value for at, value in ordered if at >= end - window]))
    return {"window_seconds": window, "first_ms": first, "last_ms": last, "ratio": last / first if first > 0 else None}


def slope(samples: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """How the server's memory (moment in s, MB) went on after it had warmed up: `warm_seconds` from the first sample,
    300 or a third of them all, then the line of least squares. None of fewer than three samples after that."""
    if not samples:
        return None
    begin, end = samples[0][0], samples[-1][0]
    warm = min(300.0, (end - begin) / 3)
    at, value = np.array([sample for sample in samples if sample[0] >= begin + warm]).reshape(-1, 2).T
    if at.size < 3:
        return None
    return {
        "warm_seconds": warm, "start_mb": samples[0][1], "warm_mb": float(value[0]), "end_mb": float(value[-1]),
        "mb_per_minute": float(60 * np.polyfit(at - at[0], value, 1)[0]),
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    return as_dict(spread(values)) if values else None


def _quantile(bins: Counter[int], part: float) -> float:
    """Milliseconds, the upper edge of the bin of the nearest rank."""
    rank, total = math.ceil(part * sum(bins.values())), 0
    for edge in sorted(bins):
        total += bins[edge]
        if total >= rank:
            return (edge + 1) / 10
    return 0.0


def of_histograms(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """p50, p99 and the longest of histograms of several processes, in ms."""
    bins, longest = Counter[int](), 0.0
    for part in parts:
        bins.update({int(k): n for k, n in part["bins"].items()})
        longest = max(longest, part["longest"])
    return {
        "count": sum(bins.values()), "p50": _quantile(bins, 0.5), "p99": _quantile(bins, 0.99), "max": 1000 * longest,
    }  # fmt: skip


def summary(visits: Sequence[Visited], dialogues: Sequence[Dialogue], chosen: Sequence[int]) -> dict[str, Any]:
    """All client-side figures of a bench; `chosen` is the dialogue of each visit."""
    turn, answering, unanswered, stop, went_on = [], [], 0, [], 0
    aged: list[tuple[float, float]] = []
    answered: list[tuple[float, float]] = []
    missing, jitter = 0, []
    errors = Counter[str]()
    for visited, which in zip(visits, chosen, strict=True):
        dialogue = dialogues[which]
        errors.update(visited.errors)
        for found in turns(visited, dialogue):
            unanswered += found["answering_ms"] is None
            if found["answering_ms"] is not None:
                answering.append(found["answering_ms"])
                answered.append((found["end"] or 0.0, found["answering_ms"]))
            if found["turn_ms"] is not None:
                turn.append(found["turn_ms"])
        for stopped in interruptions(visited, dialogue):
            if stopped is None:
                went_on += 1
            else:
                stop.append(stopped)
        aged += ages(visited, dialogue.rate)
        missing += lost(visited)
        jitter += changes(visited)
    late = sum(age > BUDGET_MS for _, age in aged)
    ticks = len(aged) + missing
    return {
        "attempts": {"all": len(visits), **dict.fromkeys(("held", "refused", "failed", "cut"), 0),
                     **Counter(visited.outcome for visited in visits)},
        "errors": dict(sorted(errors.items())),
        "details": dict(Counter(visited.detail for visited in visits if visited.detail).most_common(5)),
        "turn_latency_ms": _spread(turn),
        "answering_tick_ms": _spread(answering),
        "turns": {"all": len(answering) + unanswered, "voiced": len(turn), "unanswered": unanswered},
        "tick_age_ms": _spread([age for _, age in aged]),
        "tick_jitter_ms": _spread(jitter),
        "ticks": {"arrived": len(aged), "lost": missing, "late": late},
        "misses": (late + missing) / ticks if ticks else None,
        "growth": growth(aged),
        "latency_growth": growth(answered),
        "stop_latency_ms": _spread(stop),
        "interruptions": {"all": len(stop) + went_on, "stopped": len(stop), "went_on": went_on},
    }  # fmt: skip
