"""A second tmlc engine on this machine as background model, at lower priority than the one that the sessions run on.

Its thread, and the threads of its kernels, which inherit that, are nicer to others (Linux); it pauses while the
scheduler's ladder says that the machine is needed for ticks; and it never shares a GPU with the first engine. One
delegation is thought about at a time, the others wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from tmlc.errors import BackgroundError, SessionError, TmlcError, UsageError
from tmlc.runtimes.background.injections import MAX_CHARACTERS
from tmlc.runtimes.background.model import BackgroundModel, Context, Delegation, Event, Progress, Result
from tmlc.runtimes.background.prompt import system_text, user_text
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.tick import TickInput

NICENESS = 10
MAX_WAITING = 64
PAUSE_SECONDS = 0.05
"""How often a paused engine looks whether it may go on."""
PIECE = 64
"""Tokens of the prompt between two looks."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    delegation: Delegation
    context: Context
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | Exception]
    cancelled: bool = False

    def give(self, event: Event | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and nobody waits
            self.cancelled = True


class EngineModel(BackgroundModel):
    """Thinks with a token model.

    Args:
        load: gives the engine; called once, in the model's own thread: `lambda: tmlc.load("thinker.tmlc", threads=1)`.
            It is closed with the model.
        first_target: target of the engine that the sessions run on, such as "cpu" or "triton:sm90".
        max_tokens: of an answer.
        niceness: how much nicer the threads are than this process, 0 to 19.

    Raises UsageError: niceness out of range. What is wrong with the engine fails the first delegation (or `ready`).
    """

    def __init__(
        self, load: Callable[[], Engine], *, first_target: str, max_tokens: int = 256, niceness: int = NICENESS
    ) -> None:
        if not 0 <= niceness <= 19:
            raise UsageError(
                f"niceness must be 0 to 19, not {niceness}", where="niceness", fix=f"leave it out for {NICENESS}"
            )
        self._load, self._first, self._max_tokens, self._niceness = load, first_target, max_tokens, niceness
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MAX_WAITING)
        self._loaded = threading.Event()
        self._fault: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tmlc-second-engine", daemon=True)
        self._thread.start()

    def ready(self, timeout: float | None = None) -> None:
        """Returns when the engine is loaded; raises what loading raised."""
        if not self._loaded.wait(timeout):
            raise BackgroundError("the second engine is still loading", fix="call ready() without a timeout")
        if self._fault is not None:
            raise self._fault

    async def run(self, delegation: Delegation, context: Context) -> AsyncIterator[Event]:
        job = _Job(delegation, context, asyncio.get_running_loop(), asyncio.Queue())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BackgroundError(
                f"{MAX_WAITING} delegations wait for the second engine already",
                fix="wait until some are answered, or lower `live` of the limits",
            ) from None
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            job.cancelled = True

    async def close(self) -> None:
        self._closing = True
        try:
            self._jobs.put_nowait(None)
        except queue.Full:
            log.debug("the second engine's queue is full; its thread sees that it is to end")
        await asyncio.to_thread(self._thread.join, 4.0)

    # The model's own thread.

    def _work(self) -> None:
        engine: Engine | None = None
        try:
            if sys.platform == "linux" and self._niceness:
                # Of this thread alone; those that it starts, the kernels' among them, inherit it.
                nice = os.getpriority(os.PRIO_PROCESS, 0) + self._niceness
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            engine = self._load()
            self._check(engine)
        except Exception as error:
            self._fault = error
        finally:
            self._loaded.set()
        try:
            while not self._closing:
                job = self._jobs.get()
                if job is None:
                    return
                if not job.cancelled:
                    self._answer(engine, job)
        finally:
            if engine is not None:
                engine.close()

    def _check(self, engine: Engine) -> None:
        if engine.kind != "tokens" or engine.tokenizer is None:
            raise UsageError(
                f"a background engine must be a token model with a tokenizer, not {engine.kind}",
                fix="name a package of a text model",
            )
        first, second = (target.partition(":")[0] for target in (self._first, engine.target))
        gpu = {"triton", "tensorrt"}
        if first in gpu and second in gpu:
            raise UsageError(
                f"both engines would be on the GPU ({self._first} and {engine.target})",
                fix="compile the background model for the CPU",
            )

    def _answer(self, engine: Engine | None, job: _Job) -> None:
        try:
            if self._fault is not None:
                raise self._fault
            assert engine is not None
            with engine.session() as session:
                text = self._think(engine, session, job)
            if text.strip():
                job.give(Result(text.strip()))
            elif not job.cancelled:
                job.give(BackgroundError("the second engine had nothing to say", fix="put the task in other words"))
        except TmlcError as error:
            job.give(error)
        except Exception as error:  # a fault of the engine ends this delegation, not the thread
            log.exception("the second engine failed")
            what = f"the second engine failed: {type(error).__name__}"
            job.give(BackgroundError(what, fix="see the traceback in the log"))

    def _think(self, engine: Engine, session: Any, job: _Job) -> str:
        """Reads the prompt and writes the answer, with a look at the ladder between any two pieces of work."""
        assert engine.tokenizer is not None
        prompt = f"{system_text(job.context)}\n\n{user_text(job.delegation, job.context)}\n\nAnswer:"
        tokens = engine.tokenizer.encode(prompt.encode("utf-8", "replace").decode())
        # The end of the prompt is the task: what does not fit into the context is left out at its start.
        tokens = tokens[-max(1, engine.capacity().context_limit - self._max_tokens - 1) :]
        for at in range(0, len(tokens), PIECE):
            if not self._may_go_on(job):
                return ""
            session.append(tokens=tokens[at : at + PIECE], logits="none")
        text, chosen, told = "", 0, time.monotonic()
        ends = set(engine.driver.layout.eos_token_ids)
        while chosen < self._max_tokens and len(text) <= MAX_CHARACTERS and self._may_go_on(job):
            try:
                out = session.tick(TickInput())
            except SessionError:
                break  # the context is used up: what there is, is the answer
            text, chosen = text + out.text, chosen + max(1, len(out.tokens))
            if out.tokens and out.tokens[-1] in ends:
                break
            if time.monotonic() - told > 1.0:
                told = time.monotonic()
                job.give(Progress(text[-200:]))
        return "" if job.cancelled else text

    def _may_go_on(self, job: _Job) -> bool:
        """Waits while the machine is needed for ticks. False: nobody wants this answer any more."""
        while self.preempted() and not job.cancelled and not self._closing:
            time.sleep(PAUSE_SECONDS)
        return not job.cancelled and not self._closing
