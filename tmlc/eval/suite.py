"""The suite: episodes of each task that no training has seen, played and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tmlc.errors import UsageError
from tmlc.eval.failures import Failures
from tmlc.eval.play import check_layout, played
from tmlc.eval.recogniser import Recogniser
from tmlc.eval.record import Heard
from tmlc.eval.rules import RULES
from tmlc.eval.summary import Result, speech, summary
from tmlc.model_zoo.interaction.tasks import TASKS, SpeechBank
from tmlc.runtimes.core.engine import Engine

SCHEMA = 1
Progress = Callable[[str, int, int], None]


def chosen_tasks(names: str | None) -> list[str]:
    """The tasks of "a,b,…" in the order of the suite, or all of them.

    Raises:
        UsageError: one that does not exist.
    """
    if names is None:
        return list(TASKS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        what = f"no task {', '.join(unknown)}" if unknown else "no task is named"
        raise UsageError(what, where="--tasks", fix=f"choose from: {', '.join(TASKS)}")
    return [name for name in TASKS if name in wanted]


def evaluate(
    engine: Engine,
    tasks: Sequence[str],
    episodes: int,
    seed: int,
    report: Progress = lambda stage, done, total: None,
    failures: Failures | None = None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Plays `episodes` episodes of each task and judges them.

    Args:
        engine: all its free sessions are ticked together.
        tasks: their names.
        episodes: of each task; their seeds are `seed`, `seed + 1`, … of the split "test".
        seed: the first.
        report: progress.
        failures: where episodes that did not get the full score are written.
        model: the package, for the report.

    Returns:
        What `tmlc eval --json` prints; docs/eval.md describes it.
    """
    check_layout(engine)
    bank = SpeechBank.load()
    recogniser = Recogniser(bank)
    view = head(engine, model, seed) | {"split": "test", "tasks": {}}
    kept: list[Result] = []
    spent = seconds = 0.0
    for name in tasks:
        given = [TASKS[name].episode(seed + n, "test", bank) for n in range(episodes)]
        results: dict[int, Result] = {}
        begun = time.perf_counter()
        for index, record in played(engine, given, seed):
            spent += time.perf_counter() - begun
            heard = Heard(record, recogniser)
            results[index] = Result.of(given[index], heard, RULES[name](given[index], heard))
            if failures is not None:
                failures.note(results[index], heard)
            report(name, len(results), episodes)
            begun = time.perf_counter()
        spent += time.perf_counter() - begun
        seconds += sum(episode.ticks for episode in given) * engine.layout.duration_ms / 1000
        ordered = [results[n] for n in range(episodes)]
        view["tasks"][name] = summary(ordered)
        kept += ordered
    return view | speech(kept) | {"seconds": seconds, "times_real_time": seconds / spent if spent else None}


def head(engine: Engine, model: Path | None, seed: int) -> dict[str, Any]:
    """What was evaluated: the first entries of every report."""
    return {
        "schema": SCHEMA,
        "model": engine.manifest.model.name,
        "package": None if model is None else model.name,
        "digest": engine.digest,
        "target": engine.target,
        "precision": engine.manifest.targets[engine.target].precision,
        "seed": seed,
    }
