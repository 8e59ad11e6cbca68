"""One tick of several sessions together: who takes part, and what each of them gets.

Nothing here waits for a session, so calls on any threads, with any sessions in any order, cannot lock each other out.
Whatever is wrong with one session is that session's result; the others go on, and get the bits that they would get
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING

from tmlc.errors import ContextFullError, SessionError, UsageError
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.session import Session, SessionState
from tmlc.runtimes.core.tick import Job, TickInput, TickOutput, Tokens

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

Result = TickOutput | Exception


def tick_batch(
    engine: Engine,
    sessions: Sequence[Session],
    inputs: Sequence[TickInput | None],
    missed: Sequence[Sequence[TickInput]] | None = None,
) -> list[Result]:
    """See `Engine.tick_batch`."""
    earlier = missed if missed is not None else [()] * len(sessions)
    _check_call(engine, sessions, inputs, earlier)
    # Of each session, the missed ticks and then the newest one.
    given = [[*late, tick or TickInput()] for late, tick in zip(earlier, inputs, strict=True)]
    results: dict[int, Result] = {}
    tokens: dict[int, list[Tokens]] = {}
    for k, session in enumerate(sessions):
        try:
            tokens[k] = session._check(given[k])
        except Exception as error:
            results[k] = error
    taken: list[int] = []
    # By slot, so that of two batches that overlap the one that is first at a shared session is first at all of them.
    for k in sorted(tokens, key=lambda k: sessions[k].index):
        try:
            sessions[k]._begin({SessionState.NEW, SessionState.OPEN})
            taken.append(k)
        except SessionError as error:
            results[k] = error
    taken.sort()
    if taken:
        found = _run(engine, [sessions[k] for k in taken], [given[k] for k in taken], [tokens[k] for k in taken])
        results |= dict(zip(taken, found, strict=True))
    return [results[k] for k in range(len(sessions))]


def _check_call(
    engine: Engine,
    sessions: Sequence[Session],
    inputs: Sequence[TickInput | None],
    missed: Sequence[Sequence[TickInput]],
) -> None:
    """Raises UsageError for a call that makes no sense whatever the sessions are."""
    if not len(sessions) == len(inputs) == len(missed):
        raise UsageError(f"{len(sessions)} sessions and {len(inputs)} inputs", fix="give each session its own input")
    if any(session.engine is not engine for session in sessions):
        raise UsageError("a session of another engine", fix="tick sessions on the engine that opened them")
    if len({id(session) for session in sessions}) != len(sessions):
        raise UsageError("the same session is given twice", fix="a session takes one tick at a time")
    if len(sessions) > 1 and engine.backend.unbatched:
        raise UsageError(
            f"this package takes one session at a time ({engine.backend.unbatched})",
            fix="tick its sessions one by one, or compile the checkpoint again with this version of tmlc",
        )


def _run(
    engine: Engine, sessions: list[Session], given: list[list[TickInput]], tokens: list[list[Tokens]]
) -> list[Result]:
    """The tick of sessions that are all taken; gives them back in the state where it left them."""
    waited = 0
    try:
        jobs = []
        for session, ticks, ids in zip(sessions, given, tokens, strict=True):
            *missed, newest = session._fill(ticks, ids)
            jobs.append(Job(session._slot, session._talk, newest, missed))
        begun = perf_counter_ns()
        with engine.device():
            waited = perf_counter_ns() - begun
            results = engine.driver.tick(jobs)
    except BaseException as error:
        # An interrupt, too, may have left the slots between two positions.
        for session in sessions:
            session._end(SessionState.POISONED)
        if not isinstance(error, Exception):
            raise
        return [error] * len(sessions)
    for k, (session, ticks, result) in enumerate(zip(sessions, given, results, strict=True)):
        if not isinstance(result, TickOutput):
            full = isinstance(result, ContextFullError)
            session._end(SessionState.CLOSED if full else SessionState.POISONED)
            continue
        result.timings["wait"] = waited / 1e6
        session._end(SessionState.OPEN)
        if session._log is not None:
            try:
                session._log(ticklog.ticked(ticks[-1], result, ticks[:-1]))
            except Exception as error:
                results[k] = error
    return results
