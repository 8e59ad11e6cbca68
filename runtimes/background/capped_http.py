"""HTTP clients that stop reading where nobody would use more: the packages on top of them hold whole lines in memory.

Both packages of this room bring one of two libraries with the same interface (`httpx` or its successor `httpx2`).
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

MAX_LINE = 2 << 20
"""Bytes without a line feed; the last event of a long answer with many tools has about one MiB."""
MAX_BODY = 4 << 20
"""Bytes of one answer: enough for the longest text that is used, streamed a character an event."""


def library_of(client: type) -> Any:
    """The module of the library that the class `client` (a kind of `AsyncClient`) comes from."""
    base = next(kind for kind in client.__mro__ if kind.__name__ == "AsyncClient")
    return sys.modules[base.__module__.partition(".")[0]]


def capped(client: type, **options: Any) -> Any:
    """A client of this class whose answers end with the library's `ReadError` when they are longer than any should
    be, or compressed, which was not asked for."""
    library = library_of(client)
    stream_class: Any = library.AsyncByteStream

    class Capped(stream_class):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            line = body = 0
            async for piece in self._stream:
                body += len(piece)
                at = piece.rfind(b"\n")
                line = line + len(piece) if at < 0 else len(piece) - at - 1
                if body > MAX_BODY or line > MAX_LINE:
                    raise library.ReadError("the answer is longer than any should be")
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def cap(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise library.ReadError("the answer is compressed, which was not asked for")
        response.stream = Capped(response.stream)

    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    return client(event_hooks={"response": [cap]}, headers=headers, **options)
