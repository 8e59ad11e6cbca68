"""One client of the bench: holds one session with the official `openai` client and writes down what came, and when.

It sends its dialogue on an absolute grid: piece n, which a microphone would have filled at `begin + (n + 1) · piece`,
leaves at that moment or, when this process is late, as soon as it can; a late piece never moves the later ones.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmlc.bench.dialects import Dialect
from tmlc.bench.dialogues import Dialogue
from tmlc.bench.plan import Visit
from tmlc.errors import CheckError
from tmlc.runtimes.core.voice import GOES_ON, HOP_SECONDS

CONNECT_SECONDS, CLOSE_SECONDS = 10.0, 5.0


@dataclass
class Histogram:
    """How often something took how long, in bins of 0.1 ms up to 1 s; the last bin holds all that is longer."""

    counts: Counter[int] = field(default_factory=Counter)
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[min(10_000, int(max(0.0, seconds) * 10_000))] += 1
        self.longest = max(self.longest, seconds)

    def to_json(self) -> dict[str, Any]:
        return {"bins": {str(k): n for k, n in sorted(self.counts.items())}, "longest": self.longest}


@dataclass
class Visited:
    """What became of one attempt. Times are seconds since the bench began, on the clock that all its processes share.

    Attributes:
        outcome: `held` (to its end, closed by us), `refused` (before a session began, by 429 or 503), `failed` (no
            session for another reason), `cut` (the session ended before we ended it).
        begin: when its first sample was spoken.
        spoken: seconds of its dialogue that were sent.
        ticks: of each tick that came: index, arrival, samples of ours that it and the ticks before it took in, and
            whether it is voiced.
        errors: error events by code.
    """

    number: int
    at: float
    outcome: str = "failed"
    detail: str = ""
    begin: float = 0.0
    spoken: float = 0.0
    ticks: list[tuple[int, float, int, bool]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Client:
    """Holds one session.

    Args:
        dialect: how the server is spoken to.
        zero: the moment on `time.monotonic` when the bench began.
        piece: seconds of audio in one message.
        late, blocked: get how late pieces left because of this process, and how long the server kept a message from
            leaving.
    """

    def __init__(
        self, dialect: Dialect, dialogue: Dialogue, visit: Visit, zero: float, piece: float, late: Histogram,
        blocked: Histogram,
    ) -> None:  # fmt: skip
        self.dialect, self.dialogue, self.visit, self.zero = dialect, dialogue, visit, zero
        self.piece, self.late, self.blocked = piece, late, blocked
        self.seen = Visited(visit.number, visit.at)
        self._closing = False

    def now(self) -> float:
        return time.monotonic() - self.zero

    async def run(self) -> Visited:
        """Comes at its time, holds the session, leaves. Raises nothing: what went wrong is in the answer."""
        await self._until(self.visit.at)
        seen = self.seen
        seen.at = self.now()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await self.dialect.open()
        except Exception as error:
            seen.outcome, seen.detail = self.dialect.explain(error)
            return seen
        try:
            await self._hold(connection)
        except Exception as error:
            seen.outcome, seen.detail = "cut", self.dialect.explain(error)[1]
        finally:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await connection.close()
            except Exception as error:  # the server is gone: what counts has been counted
                seen.detail = seen.detail or f"closing: {type(error).__name__}"
        return seen

    async def _hold(self, connection: Any) -> None:
        seen = self.seen
        seen.begin = self.now()
        listening = asyncio.create_task(self._listen(connection))
        speaking = asyncio.create_task(self._speak(connection, seen.begin + self.visit.seconds))
        try:
            await asyncio.wait([listening, speaking], return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()
                seen.outcome = "cut"
                return
            speaking.result()
            self._closing = True
            await self.dialect.close(connection)
            async with asyncio.timeout(CLOSE_SECONDS):
                await listening
            seen.outcome = "held"
        except TimeoutError:
            seen.outcome, seen.detail = "cut", f"the server did not end the session within {CLOSE_SECONDS:g} s"
        finally:
            for task in (listening, speaking):
                task.cancel()
            await asyncio.gather(listening, speaking, return_exceptions=True)

    async def _until(self, at: float) -> None:
        while (left := at - self.now()) > 0:
            await asyncio.sleep(left)

    async def _speak(self, connection: Any, end: float) -> None:
        rate, begin, number = self.dialogue.rate, self.seen.begin, 0
        count, free = round(self.piece * rate), begin
        while True:
            due = begin + (number + 1) * self.piece
            if due > end:
                return
            samples = self.dialogue.piece(number * count, count)
            payload = base64.b64encode((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()).decode()
            await self._until(due)
            leaves = self.now()
            self.late.add(leaves - max(due, free))
            await self.dialect.say(connection, payload)
            free = self.now()
            self.blocked.add(free - leaves)
            number += 1
            self.seen.spoken = number * self.piece

    async def _listen(self, connection: Any) -> None:
        seen, rate = self.seen, self.dialogue.rate
        came: float | None = None  # when the audio of the tick that follows came
        sound = False
        async for event in connection:
            arrival = self.now()
            if event.type == self.dialect.output:
                pcm = np.frombuffer(base64.b64decode(event.delta), "<i2")
                came, sound = arrival if came is None else came, sound or voiced(pcm.astype(np.float32) / 32768, rate)
            elif event.type == "tmlc.tick":
                if not hasattr(event, "heard_ms"):
                    raise CheckError("the server does not say what its ticks heard", fix="bench a newer server")
                heard = round(event.heard_ms * rate / 1000)
                seen.ticks.append((event.tick, arrival if came is None else came, heard, sound))
                came, sound = None, False
            elif event.type == "error":
                seen.errors[str(event.error.code or event.error.type)] += 1
            elif event.type == self.dialect.ended:
                if not self._closing:
                    seen.detail = str(getattr(event, "reason", ""))
                return


def voiced(audio: np.ndarray, rate: int) -> bool:
    """Is a hop of 50 ms of these samples (float32, full scale 1) not silent?"""
    hop = max(1, round(HOP_SECONDS * rate))
    return any(float(part @ part) >= GOES_ON**2 * part.size for part in np.split(audio, range(hop, audio.size, hop)))
