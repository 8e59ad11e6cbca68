"""From the verdicts of many episodes to the figures of a model: scores with intervals, rates, times, words, clicks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from tmlc.eval.clicks import Jumps, all_edges
from tmlc.eval.intervals import bootstrap, interval, wilson
from tmlc.eval.record import Heard
from tmlc.eval.rules import Verdict
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks.words import MODEL_WORDS


@dataclass
class Result:
    """One episode, judged: all that is kept of it for the figures."""

    episode: Episode
    verdict: Verdict
    clear: tuple[int, int]
    jumps: Jumps
    error: str

    @classmethod
    def of(cls, episode: Episode, heard: Heard, verdict: Verdict) -> Result:
        return cls(episode, verdict, clear_words(heard), heard.jumps, heard.record.error)


def clear_words(heard: Heard) -> tuple[int, int]:
    """(words that the recogniser hears as they were written, words that were written); a word that was broken off is
    not counted."""
    written = [word for word in "".join(heard.record.text).split() if word in MODEL_WORDS]
    spoken = [word.word for word in heard.words]
    blocks = SequenceMatcher(None, written, spoken, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks), len(written)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The figures of one task: score and interval, rates with intervals, quantiles of times."""
    scores = [result.verdict.score for result in results]
    return {
        "score": float(np.mean(scores)),
        "interval": list(interval(scores)),
        "episodes": len(results),
        "errors": sum(bool(result.error) for result in results),
    } | figures([result.verdict for result in results])


def figures(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Rates with intervals, quantiles of times and, where there are some, means with intervals, over all verdicts."""
    counts: dict[str, list[int]] = {}
    times: dict[str, list[float]] = {}
    means: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, (passed, of) in verdict.counts.items():
            total = counts.setdefault(name, [0, 0])
            total[0] += passed
            total[1] += of
        for name, values in verdict.times.items():
            times.setdefault(name, []).extend(values)
        for name, values in verdict.means.items():
            means.setdefault(name, []).extend(values)
    found = {
        "rates": {name: _rate(passed, of) for name, (passed, of) in counts.items()},
        "times": {name: _quantiles(values) for name, values in times.items() if values},
    }
    return found | ({"means": {name: _mean(values) for name, values in means.items()}} if means else {})


def _rate(passed: int, of: int) -> dict[str, Any]:
    return {"rate": passed / of if of else None, "interval": list(wilson(passed, of)), "of": of}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    low, p95 = np.quantile(values, [0.5, 0.95])
    return {"median": float(low), "p95": float(p95), "max": float(max(values)), "of": len(values)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "interval": list(bootstrap(values)), "of": len(values)}


def speech(results: Iterable[Result]) -> dict[str, Any]:
    """How clear the words are, and whether the voice clicks at the edges of ticks, over all episodes."""
    kept = list(results)
    clear, of = (sum(result.clear[n] for result in kept) for n in (0, 1))
    return {"words": _rate(clear, of), "clicks": all_edges([result.jumps for result in kept])}
