"""The thread in which background models run: an event loop of its own, so that a model that blocks it holds up nobody
but other delegations; and a new thread when it is blocked for good."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine
from typing import Any

from tmlc.errors import CapacityError

STUCK_SECONDS = 5.0
"""A thread whose heart has not beaten for so long is blocked by a model that does not await; new work gets another."""
MAX_ABANDONED = 4
"""Threads that models have blocked; with more, no delegation starts any more."""
CLOSE_SECONDS = 1.0
"""What runs when the worker closes has so long to end after its cancellation."""
MAX_RUNNING = 1_024
"""Coroutines that are not at their end, those included that nobody waits for and that swallow their cancellation."""


class Worker:
    """Runs coroutines on a loop in a daemon thread. Thread-safe.

    Attributes:
        running: coroutines that are not at their end.
        abandoned: threads that were given up because a model blocked them.
    """

    def __init__(self, stuck_seconds: float = STUCK_SECONDS) -> None:
        self._stuck = stuck_seconds
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._beat = 0.0  # when the thread last showed that it is not blocked
        self.running = self.abandoned = 0
        self._closed = False

    def submit(self, work: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None]:
        """Starts `work`.

        Raises CapacityError: too many threads are blocked or too much runs, or the worker is closed.
        """
        with self._lock:
            try:
                loop = self._ready()
            except CapacityError:
                work.close()
                raise
            self.running += 1
            return asyncio.run_coroutine_threadsafe(self._counted(work), loop)

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            with self._lock:
                self.running -= 1

    def _ready(self) -> asyncio.AbstractEventLoop:
        if self._loop is not None and time.monotonic() - self._beat > self._stuck:
            self._loop.call_soon_threadsafe(self._loop.stop)  # ends it, should it ever come back
            self._loop = self._thread = None
            self.abandoned += 1
        if self._closed:
            raise CapacityError("the background model is closed", fix="make a new Background")
        if self.abandoned > MAX_ABANDONED or self.running >= MAX_RUNNING:
            raise CapacityError(
                f"the background model does not come back ({self.running} calls)",
                fix="a model must await what takes long",
            )
        if self._loop is None:
            self._loop, self._beat = asyncio.new_event_loop(), time.monotonic()
            self._thread = threading.Thread(
                target=self._serve, args=(self._loop,), name="tmlc-background", daemon=True
            )
            self._loop.call_soon(self._live, self._loop)
            self._thread.start()
        return self._loop

    def _live(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if loop is self._loop:
                self._beat = time.monotonic()
        loop.call_later(self._stuck / 10, self._live, loop)

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0))  # what was submitted last begins, so that it can end
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def close(self) -> None:
        """Cancels what runs and stops the thread; one that is blocked is left behind."""
        with self._lock:
            loop, thread, self._closed = self._loop, self._thread, True
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(2 * CLOSE_SECONDS)
