"""Who comes when: the sessions of a bench, fixed before it begins, so that a slow server changes nothing of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tmlc.errors import UsageError

GAP = 1.0
"""Seconds after which a new session takes the place of one that ended, with fixed arrivals: a server that is full has
freed its slot by then."""


@dataclass(frozen=True)
class Visit:
    """One attempt to hold a session: begun `at` seconds after the bench began, meant to last `seconds`."""

    number: int
    at: float
    seconds: float
    dialogue: int
    seed: int


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        sessions: that are open at once, when every attempt succeeds (with Poisson arrivals: on average).
        seconds: length of the bench.
        ramp: seconds over which the first `sessions` begin.
        hold: seconds that a session lasts; None: to the end.
        arrivals: `fixed`: at even distances. `poisson`: independent of each other.
        piece: milliseconds of audio in one message.
        seed: of arrivals and dialogues.
    """

    sessions: int
    seconds: float
    ramp: float
    hold: float | None
    arrivals: str
    piece: int
    seed: int

    def __post_init__(self) -> None:
        if self.arrivals not in ("fixed", "poisson"):
            raise UsageError(f"unknown arrivals {self.arrivals!r}", where="--arrivals", fix="use fixed or poisson")
        if self.arrivals == "poisson" and self.hold is None:
            raise UsageError("Poisson arrivals need sessions that end", where="--arrivals", fix="give --hold SECONDS")
        if not 0 <= self.ramp < self.seconds:
            fix = "give more --seconds, or a shorter --ramp"
            raise UsageError("the ramp is as long as the bench, or longer", where="--ramp", fix=fix)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def visits(load: Load, dialogues: int) -> list[Visit]:
    """All attempts of a bench, in order. The rate follows from the number of sessions and from how long one lasts: as
    many arrive in `hold` seconds as are to be open at once."""
    chance = np.random.default_rng((load.seed, 1))
    starts: list[float] = []
    if load.hold is None:
        starts = [load.ramp * k / load.sessions for k in range(load.sessions)]
    elif load.arrivals == "fixed":
        first = [load.ramp * k / load.sessions for k in range(load.sessions)]
        period = load.hold + GAP
        starts = [at + period * turn for turn in range(int(load.seconds / period) + 1) for at in first]
    else:
        at = 0.0
        while (at := at + chance.exponential(load.hold / load.sessions)) < load.seconds:
            starts.append(at)
    starts = [at for at in starts if at < load.seconds]
    return [
        Visit(number, at, min(load.hold or load.seconds, load.seconds - at), number % dialogues, load.seed + number)
        for number, at in enumerate(starts)
    ]
