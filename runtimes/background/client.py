"""The client as the background model: a delegation is announced to it, and it answers when it has something.

This is how the Live protocol's client-owned delegations work: `session.delegation.created` goes out, and the client
appends thoughts and commentary under the delegation's id.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

from tmlc.runtimes.background.model import BackgroundModel, Context, Delegation, Event

MAX_PENDING = 64
"""Answers that one delegation may have waiting; more are refused."""


class ClientModel(BackgroundModel):
    """Waits for `answer`; the delegation lives until a `Result` comes, or its timeout."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = {}

    async def run(self, delegation: Delegation, context: Context) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        with self._lock:
            self._open[delegation.id] = asyncio.get_running_loop(), queue
        try:
            while True:
                yield await queue.get()
        finally:
            with self._lock:
                self._open.pop(delegation.id, None)

    def answer(self, id: str, event: Event) -> bool:
        """Hands in what the client says about a delegation; any thread. False: no such delegation waits, or too many
        answers of it do."""
        with self._lock:
            loop, queue = self._open.get(id, (None, None))
            if loop is None or queue is None or queue.qsize() >= MAX_PENDING:
                return False
            loop.call_soon_threadsafe(queue.put_nowait, event)
            return True
