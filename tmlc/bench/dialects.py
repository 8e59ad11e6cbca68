"""How the bench speaks to a server: the official `openai` client, in one of its two dialects.

A tmlc server says with each piece of output audio, under the key `tmlc` of the known event, which tick it belongs to
and how much of the client's audio had been taken in; nothing else of a dialect is changed.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from tmlc.errors import CheckError, UsageError


@dataclass(frozen=True)
class Heard:
    """One tick's output as it came.

    Attributes:
        tick: its index.
        samples: of the client's audio that this tick and those before it took in, at the rate that the client sends.
        audio: float32, full scale 1.
    """

    tick: int
    samples: int
    audio: np.ndarray


class Dialect(ABC):
    """One way to speak to a server.

    Args:
        url: of the server, with `/v1` or whatever it has before the dialect's own path.
        key: bearer key.
        model: as `/v1/models` names it.
    """

    rate: ClassVar[int]
    ended: ClassVar[str]

    def __init__(self, url: str, key: str, model: str) -> None:
        if find_spec("openai") is None or find_spec("websockets") is None:
            raise UsageError("the bench needs the openai client", fix="install it with: pip install 'tmlc[bench]'")
        from openai import AsyncOpenAI

        self.model = model
        self.client = AsyncOpenAI(api_key=key, base_url=url, max_retries=0)

    @abstractmethod
    async def open(self) -> Any:
        """A connection whose session has begun. Raises what the client raises, and CheckError."""

    @abstractmethod
    async def say(self, connection: Any, payload: str) -> None:
        """Sends one piece of audio, base64 of PCM16."""

    @abstractmethod
    async def close(self, connection: Any) -> None:
        """Asks the server to end the session; `ended` follows, or the connection closes."""

    @abstractmethod
    def heard(self, event: Any) -> Heard | None:
        """The tick that an event of the server brings; None for other events."""

    def explain(self, error: Exception) -> tuple[str, str]:
        """What an attempt that raised `error` counts as (`refused` or `failed`), and one line about it."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            after = response.headers.get("Retry-After")
            detail = f"HTTP {status}" + (f", Retry-After {after}" if after else "")
            return ("refused" if status in (429, 503) else "failed"), detail
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".rstrip(": ")


class Live(Dialect):
    """`/v1/live/sessions`: the client begins, audio goes both ways at 16 kHz all the time."""

    rate, ended = 16000, "session.closed"

    async def open(self) -> Any:
        connection = await self.client.live.connect().enter()
        try:
            format_ = {"type": "audio/pcm", "rate": self.rate}
            await connection.session.start(session={"model": self.model, "audio": {"format": format_}})
            await _wait_for(connection, "session.started")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def say(self, connection: Any, payload: str) -> None:
        await connection.session.input_audio.append(audio=payload)

    async def close(self, connection: Any) -> None:
        await connection.session.close()

    def heard(self, event: Any) -> Heard | None:
        return _heard(event) if event.type == "session.output_audio.delta" else None


class Realtime(Dialect):
    """`/v1/realtime`: the server begins; audio goes both ways at 24 kHz."""

    rate, ended = 24000, ""

    async def open(self) -> Any:
        connection = await self.client.realtime.connect(model=self.model).enter()
        try:
            await _wait_for(connection, "session.created")
            format_ = {"type": "audio/pcm", "rate": self.rate}
            audio = {"input": {"format": format_}, "output": {"format": format_}}
            await connection.session.update(session={"type": "realtime", "audio": audio})
            await _wait_for(connection, "session.updated")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def say(self, connection: Any, payload: str) -> None:
        await connection.input_audio_buffer.append(audio=payload)

    async def close(self, connection: Any) -> None:
        await connection.close()

    def heard(self, event: Any) -> Heard | None:
        return _heard(event) if event.type == "response.output_audio.delta" else None


DIALECTS: dict[str, type[Dialect]] = {"live": Live, "realtime": Realtime}


async def _wait_for(connection: Any, kind: str) -> None:
    """Returns when the event came; CheckError when the server said no instead."""
    while True:
        event = await connection.recv()
        if event.type == kind:
            return
        if event.type == "error":
            raise CheckError(f"{event.error.code}: {event.error.message}")


def _heard(event: Any) -> Heard:
    """The tick of a piece of output audio. CheckError: the server does not say which."""
    ours = getattr(event, "tmlc", None)
    if not isinstance(ours, dict) or not {"tick", "heard"} <= set(ours):
        raise CheckError("the server does not say which tick its audio belongs to", fix="bench a server of tmlc")
    audio = np.frombuffer(base64.b64decode(event.delta), "<i2").astype(np.float32) / 32768
    return Heard(int(ours["tick"]), int(ours["heard"]), audio)
