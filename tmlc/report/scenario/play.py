"""Plays the sessions of a case together, tick by tick on a clock, and says what each tick gave and took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tmlc.report.scenario.case import Case
from tmlc.runtimes.core.clock import Clock
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.media.player import Played
from tmlc.runtimes.media.recording import Recording

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine
    from tmlc.runtimes.core.session import Session

PLAIN = 128
"""Ids below it fill a context: bytes and common tokens in every vocabulary of the zoo."""
PIECE = 4096
"""Positions that are appended in one call when a context is filled."""


@dataclass(frozen=True)
class Together(Played):
    """One tick of all sessions: `step_ms` is the time of the whole batch, `output` that of the first session with
    `first_audio` of the last one to speak; `outputs` are those of all, in order.
    """

    outputs: tuple[TickOutput, ...]


def open_sessions(engine: Engine, case: Case, seed: int, ticks: int) -> list[Session]:
    """The sessions of a case, seeds `seed`, `seed + 1`, …, with the context behind them that it asks for.

    Args:
        ticks: that are to be played: a context that ends a session when it is full leaves room for them.
    """
    sessions = [engine.session(seed=seed + k) for k in range(case.sessions)]
    filled = _filled(engine, case, ticks)
    tokens = np.random.default_rng(0).integers(0, min(PLAIN, engine.model.vocab), filled).tolist()
    for session in sessions:
        for at in range(0, filled, PIECE):
            session.append(tokens=tokens[at : at + PIECE], logits="none")
    return sessions


def _filled(engine: Engine, case: Case, ticks: int) -> int:
    """Positions to append before the first tick."""
    capacity, layout = engine.capacity(), engine.layout
    if case.context != "full":
        return case.context
    if capacity.context_policy != "end":
        return capacity.context_limit
    tick = layout.audio_in + layout.video_positions + layout.text_in + layout.text_out + 2 + layout.audio_out
    return max(0, capacity.context_limit - ticks * tick)


def words_to_say(engine: Engine, case: Case) -> list[int]:
    """What each tick of a case is given to say; empty where the model chooses."""
    if case.speak == "free":
        return []
    layout = engine.layout
    usual = {layout.silence_token_id, layout.end_of_tick_token_id}
    return [next(token for token in range(3) if token not in usual)] * layout.text_out


def play_together(
    engine: Engine,
    sessions: Sequence[Session],
    recordings: Sequence[Recording],
    count: int,
    clock: Clock,
    say: Sequence[int] = (),
    ready: Callable[[int], None] = lambda index: None,
) -> Iterator[Together]:
    """The first `count` ticks of the sessions' recordings, one batch after the other; a package that takes one session
    at a time ticks them one by one. Tick k is due when its input is complete: one period after it began. `ready` is
    called with the number of each tick when its inputs are there and it is due.

    Raises:
        What `Session.tick` raises, of the first session that fails.
    """
    feeds = [recording.ticks(count) for recording in recordings]
    clock.start()
    for index in range(count):
        given = [_asked(next(feed), say) for feed in feeds]
        late = clock.wait(index + 1)
        ready(index)
        started = time.perf_counter_ns()
        outputs = tick_all(engine, sessions, given)
        taken = (time.perf_counter_ns() - started) / 1e6
        yield Together(index, given[0], _merged(outputs), taken, late * 1000, started, tuple(outputs))


def tick_all(engine: Engine, sessions: Sequence[Session], given: Sequence[TickInput]) -> list[TickOutput]:
    """One tick of all sessions, in one batch where the package takes several. Raises what the first to fail raised."""
    if engine.batched and len(sessions) > 1:
        results = engine.tick_batch(sessions, list(given))
    else:
        results = [session.tick(one) for session, one in zip(sessions, given, strict=True)]
    out = []
    for result in results:
        if not isinstance(result, TickOutput):
            raise result
        out.append(result)
    return out


def _asked(given: TickInput, say: Sequence[int]) -> TickInput:
    return replace(given, say=list(say)) if say else given


def _merged(outputs: Sequence[TickOutput]) -> TickOutput:
    """One output that stands for all: the calls of a batch are shared, its last session to speak decides."""
    if len(outputs) == 1:
        return outputs[0]
    timings = dict(outputs[0].timings)
    first = [out.timings["first_audio"] for out in outputs if "first_audio" in out.timings]
    if first:
        timings["first_audio"] = max(first)
    silent = int(all(out.stats.get("silent", 0) for out in outputs))
    return replace(outputs[0], timings=timings, stats={**outputs[0].stats, "silent": silent})
