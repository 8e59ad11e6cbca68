"""How the bench speaks to a server: the official `openai` client, in one of its two dialects.

A tmlc server that is asked to (`session.tmlc.events`) says after the audio of each tick, in an event `tmlc.tick`, which
tick that was and how much of the client's audio is behind it; nothing else of a dialect is changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, ClassVar

from tmlc.errors import CheckError, UsageError


class Dialect(ABC):
    """One way to speak to a server.

    Args:
        url: of the server, with `/v1` or whatever it has before the dialect's own path.
        key: bearer key.
        model: as `/v1/models` names it.

    Attributes:
        rate: of the audio that goes both ways, in Hz.
        output, ended: the types of the events with the model's audio, and at the end of a session ("": the connection
            closes).
    """

    rate: ClassVar[int]
    output: ClassVar[str]
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

    def explain(self, error: Exception) -> tuple[str, str]:
        """What an attempt that raised `error` counts as (`refused` or `failed`), and one line about it."""
        response: Any = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            after = response.headers.get("Retry-After")
            detail = f"HTTP {status}" + (f", Retry-After {after}" if after else "")
            return ("refused" if status in (429, 503) else "failed"), detail
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".rstrip(": ")


class Live(Dialect):
    """`/v1/live/sessions`: the client begins, audio goes both ways at 16 kHz all the time."""

    rate, output, ended = 16000, "session.output_audio.delta", "session.closed"

    async def open(self) -> Any:
        connection = await self.client.live.connect().enter()
        try:
            format_ = {"type": "audio/pcm", "rate": self.rate}
            asked: Any = {"model": self.model, "audio": {"format": format_}, "tmlc": {"events": True}}
            await connection.session.start(session=asked)
            await _wait_for(connection, "session.started")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def say(self, connection: Any, payload: str) -> None:
        await connection.session.input_audio.append(audio=payload)

    async def close(self, connection: Any) -> None:
        await connection.session.close()


class Realtime(Dialect):
    """`/v1/realtime`: the server begins; audio goes both ways at 24 kHz."""

    rate, output, ended = 24000, "response.output_audio.delta", ""

    async def open(self) -> Any:
        connection = await self.client.realtime.connect(model=self.model).enter()
        try:
            await _wait_for(connection, "session.created")
            format_ = {"type": "audio/pcm", "rate": self.rate}
            audio = {"input": {"format": format_}, "output": {"format": format_}}
            asked: Any = {"type": "realtime", "audio": audio, "tmlc": {"events": True}}
            await connection.session.update(session=asked)
            await _wait_for(connection, "session.updated")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def say(self, connection: Any, payload: str) -> None:
        await connection.input_audio_buffer.append(audio=payload)

    async def close(self, connection: Any) -> None:
        await connection.close()


DIALECTS: dict[str, type[Dialect]] = {"live": Live, "realtime": Realtime}


async def _wait_for(connection: Any, kind: str) -> None:
    """Returns when the event came; CheckError when the server said no instead."""
    while True:
        event = await connection.recv()
        if event.type == kind:
            return
        if event.type == "error":
            fix = "give the --model and --dialect that the server has; its log says more"
            raise CheckError(f"{event.error.code}: {event.error.message}", where="the server's answer", fix=fix)
