"""A plain Python callable as a background model: a function, a coroutine function, or an async generator function."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from tmlc.errors import CapacityError
from tmlc.runtimes.background.model import BackgroundModel, Context, Delegation, Event, Result

MAX_THREADS = 32
"""Calls of plain functions that may run at once, those included that nobody waits for any more."""


class CallableModel(BackgroundModel):
    """Asks `function(delegation, context)`.

    A plain function runs in a thread of its own: it may take as long as it likes, and when nobody waits for it any
    more its thread goes on until it returns (Python cannot end a thread), which is why they are counted and bounded. A
    coroutine function gives a text or an event; an async generator function gives events. A text is a `Result`.
    """

    def __init__(self, function: Callable[[Delegation, Context], Any], max_threads: int = MAX_THREADS) -> None:
        self._function, self._threads = function, threading.BoundedSemaphore(max_threads)

    async def run(self, delegation: Delegation, context: Context) -> AsyncIterator[Event]:
        function = self._function
        if inspect.isasyncgenfunction(function):
            async for event in function(delegation, context):
                yield event
            return
        if inspect.iscoroutinefunction(function):
            answer = await function(delegation, context)
        else:
            answer = await self._in_thread(delegation, context)
        yield Result(answer) if isinstance(answer, str) else answer

    async def _in_thread(self, delegation: Delegation, context: Context) -> Any:
        if not self._threads.acquire(blocking=False):
            raise CapacityError(
                "all threads of the background model are in calls that have not come back",
                fix="give the function a timeout of its own, or CallableModel a larger max_threads",
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def finish(answer: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(error)

        def call() -> None:
            answer, error = None, None
            try:
                answer = self._function(delegation, context)
            except BaseException as raised:  # SystemExit, too, is only this delegation's
                odd = isinstance(raised, StopIteration)  # which cannot be set on a future
                error = RuntimeError("the callable raised StopIteration") if odd else raised
            finally:
                self._threads.release()
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, answer, error)

        threading.Thread(target=call, name=f"tmlc-{delegation.id[:12]}", daemon=True).start()
        return await future
