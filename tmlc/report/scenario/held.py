"""How many sessions an engine holds at the budget: tried, by doubling until a step's p99 is over and then by bisection,
with the inputs of the case. Never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import CapacityError
from tmlc.report.scenario.case import MAX_SESSIONS, Case
from tmlc.report.scenario.inputs import parts
from tmlc.report.scenario.play import open_sessions, play_together, words_to_say
from tmlc.runtimes.core.clock import InputClock
from tmlc.runtimes.media.recording import TickShape

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

TICKS = 200
"""Ticks of a try: its p99 is the second largest."""
MEMORY = 0.8
"""Part of the machine's free memory that the states of sessions may take."""


@dataclass(frozen=True)
class Try:
    """So many sessions were played for `ticks` ticks. A try ends as soon as its p99 cannot be within the budget."""

    sessions: int
    step_p99_ms: float
    fits: bool
    ticks: int


@dataclass
class Search:
    """The search itself, over any measure; `limit` says what ended it.

    Args:
        measure: plays so many sessions; CapacityError where there is no room for them.
        most: never tries more.
    """

    measure: Callable[[int], Try]
    most: int
    tried: list[Try] = field(default_factory=list)
    limit: str = ""

    def run(self) -> int:
        """The most sessions that fit; 0 when one does not."""
        low, high = 0, 1
        while self._fits(high):
            low = high
            if low == self.most:
                self.limit = self.limit or f"no more than {self.most} were tried"
                return low
            high = min(2 * high, self.most)
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(middle):
                low = middle
            else:
                high = middle
        return low

    def _fits(self, sessions: int) -> bool:
        try:
            found = self.measure(sessions)
        except CapacityError as error:
            self.limit = f"memory: {error.what}"
            return False
        self.tried.append(found)
        if not found.fits:
            self.limit = f"budget: a step of {sessions} took {found.step_p99_ms:.1f} ms at p99"
        return found.fits


def over(ticks: int) -> int:
    """Steps of `ticks` that may be over the budget while the p99 (nearest rank, rounded up) is within it."""
    return ticks - 1 - math.ceil(0.99 * (ticks - 1))


def sessions_held(
    load: Callable[[int], Engine],
    case: Case,
    shape: TickShape,
    step_ms: float,
    report: Callable[[str, int, int], None],
    most: int = MAX_SESSIONS,
    ticks: int = TICKS,
) -> dict[str, Any]:
    """The record `sessions_held` of a profile.

    Args:
        load: the engine with room for so many sessions; it is closed here.
        case: its inputs, context and words; its own number of sessions, length and clock do not matter.
        step_ms: what a step may take at p99.
    """
    engine: Engine | None = None

    def measure(sessions: int) -> Try:
        nonlocal engine
        if engine is None or engine.capacity().sessions < sessions:
            if engine is not None:
                _check_room(engine, sessions)
                engine.close()
                engine = None
            engine = load(sessions)
        report(f"trying {sessions} sessions", 0, 1)
        found = play_sessions(engine, case, shape, sessions, ticks, step_ms)
        report(f"trying {sessions} sessions", 1, 1)
        return found

    search = Search(measure, most)
    try:
        held = search.run()
    finally:
        if engine is not None:
            engine.close()
    return {"held": held, "tried": [asdict(one) for one in search.tried], "limit": search.limit}


def play_sessions(
    engine: Engine, case: Case, shape: TickShape, sessions: int, ticks: int, step_ms: float
) -> Try:
    """One try: `ticks` counted ticks of so many sessions, one batch after the other."""
    wanted = case.warm_up + ticks
    tried = sized(case, sessions, wanted * shape.seconds)
    opened = open_sessions(engine, tried, 0, wanted)
    try:
        feeds = [part.recording for part in parts(tried, engine, shape)]
        steps: list[float] = []
        late = 0
        for played in play_together(engine, opened, feeds, wanted, InputClock(), words_to_say(engine, tried)):
            if played.index < case.warm_up:
                continue
            steps.append(played.step_ms)
            late += played.step_ms > step_ms
            if late > over(ticks):
                break
    finally:
        for session in opened:
            session.close()
    p99 = float(np.percentile(steps, 99, method="higher"))
    return Try(sessions, p99, late <= over(ticks), len(steps))


def sized(case: Case, sessions: int, seconds: float) -> Case:
    """The case with other sizes, its ticks one after the other."""
    return case.model_copy(update={"sessions": sessions, "seconds": seconds, "loop": "closed", "repetitions": 1})


def _check_room(engine: Engine, sessions: int) -> None:
    """CapacityError when the states of so many sessions would not leave the machine any memory."""
    free = free_bytes()
    needed = sessions * engine.capacity().session_bytes
    if free is not None and needed > MEMORY * (free + engine.capacity().reserved_bytes):
        what = f"the states of {sessions} sessions take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise CapacityError(what, fix="load with fewer sessions, or compile with a shorter context")


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that programs could still take; None where the system does not say (only Linux does)."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
