"""The delegations of one session: started, followed, ended in time, and what they give put where injections wait.

The manager lives on one event loop (the gateway's) and runs no foreign code; the models run in the thread of a
`Worker`, and what they yield is checked there before it comes here. So a model that hangs, floods, lies or returns
megabytes costs its own delegation and nothing else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tmlc.errors import CapacityError, SessionError, TmlcError, UsageError
from tmlc.runtimes.background.injections import MAX_CHARACTERS, InjectionQueue
from tmlc.runtimes.background.model import (
    BackgroundModel,
    Context,
    Delegation,
    Event,
    Origin,
    Progress,
    Result,
    ToolCall,
)
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.worker import Worker

MAX_TASK = 8_000
"""Characters of a task; the rest is cut."""
MAX_PROGRESS = 400
MAX_EVENTS = 10_000
"""Events of one delegation; more is a flood and fails it."""
MIN_BETWEEN = 0.1
"""Seconds between two events of progress that leave the worker; those between are dropped."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many delegations a session may have, how long they take, and how their results enter.

    Attributes:
        live: delegations at a time.
        timeout: seconds until one is given up.
        progress_after: seconds in which the conversation has heard nothing of a delegation, after which its progress is
            injected, if there is news.
        spoken, policy: of results that say nothing else. A silent result goes in as data, for the model to speak of;
            a spoken one is said as it is.
        progress_spoken: is progress said, or silent?
        progress_text: progress of a model that has told nothing.
    """

    live: int = 4
    timeout: float = 120.0
    progress_after: float = 8.0
    spoken: bool = True
    policy: Policy = Policy.WHEN_IDLE
    progress_spoken: bool = False
    progress_text: str = "The background model is still working on it."


class Stage(StrEnum):
    """What happened to a delegation."""

    CREATED = "created"
    PROGRESS = "progress"
    TOOL = "tool"
    DONE = "done"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class DelegationEvent:
    """One change of one delegation.

    Attributes:
        seconds: since it began.
        text: of the progress or result (cut), or why it failed and what to do; the name of the tool.
        injection: id of the injection that the result or progress became ("" for none).
    """

    stage: Stage
    delegation: Delegation
    seconds: float
    text: str = field(default="", repr=False)
    injection: str = ""


@dataclass(slots=True, eq=False)
class _Live:
    delegation: Delegation
    began: float
    future: concurrent.futures.Future[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    silence: asyncio.TimerHandle | None = None
    progress: str = ""  # the newest that the model has told
    told: str = ""  # what the conversation was told last


class Delegations:
    """All methods on the loop on which it was made.

    Args:
        model: the reasoner. queue: where results wait. worker: where models run, shared by all sessions.
        duration_ms: of a tick.
        listener: called on the loop with each event.

    Attributes:
        dropped: events of progress that came too fast, and events after a result.
    """

    def __init__(
        self,
        model: BackgroundModel,
        queue: InjectionQueue,
        worker: Worker,
        *,
        limits: Limits | None = None,
        duration_ms: int = 200,
        listener: Callable[[DelegationEvent], None] | None = None,
    ) -> None:
        self._model, self._queue, self._worker = model, queue, worker
        self.limits = limits or Limits()
        self._duration_ms, self._listener = duration_ms, listener
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, _Live] = {}
        self._closed = False
        self.dropped = 0

    @property
    def live(self) -> tuple[Delegation, ...]:
        """Those that are not ended."""
        return tuple(one.delegation for one in self._live.values())

    def start(
        self,
        task: str,
        context: Context,
        *,
        tick: int,
        origin: Origin,
        key: str | None = None,
        spoken: bool | None = None,
        policy: Policy | None = None,
    ) -> Delegation:
        """Gives a task to the model. One that lives with the same key is cancelled first.

        Raises:
            UsageError: an empty task. CapacityError: as many live as may, or the models have blocked their threads.
            SessionError: the session has closed.
        """
        if self._closed:
            raise SessionError("the session takes no more delegations: it is closed", fix="open a new session")
        if not isinstance(task, str) or not task.strip():
            raise UsageError("a delegation needs a task with something in it", fix="say in it what is to be done")
        if key is not None:
            for one in [one for one in self._live.values() if one.delegation.key == key]:
                self._end(one, Stage.CANCELLED, "superseded")
        if len(self._live) >= self.limits.live:
            raise CapacityError(
                f"{len(self._live)} delegations of this session live already",
                fix="wait for one of them, cancel one, or give the new one the key of the one it replaces",
            )
        name = "dlg_" + secrets.token_urlsafe(12)
        offset = tick * self._duration_ms
        delegation = Delegation(name, task[:MAX_TASK], tick, offset, origin, key, spoken, policy)
        one = _Live(delegation, self._loop.time())
        one.future = self._worker.submit(
            _pump(self._model, delegation, context, lambda event, n: self._post(one, event, n))
        )
        self._live[name] = one
        one.future.add_done_callback(lambda _: self._post(one, "it ended without a result", 0))
        one.deadline = self._loop.call_later(self.limits.timeout, self._time_out, one)
        self._listen_for_silence(one)
        self._tell(Stage.CREATED, one)
        return delegation

    def cancel(self, id: str, why: str = "asked for") -> bool:
        """Ends a delegation; what it gives later is dropped. False: it does not live."""
        one = self._live.get(id)
        if one is not None:
            self._end(one, Stage.CANCELLED, why)
        return one is not None

    def close(self) -> None:
        """Cancels all; nothing starts any more."""
        self._closed = True
        for one in list(self._live.values()):
            self._end(one, Stage.CANCELLED, "the session closed")

    # What the models give.

    def _post(self, one: _Live, event: Event | str, dropped: int) -> None:
        """On the worker's thread: brings an event here."""
        try:
            self._loop.call_soon_threadsafe(self._take, one, event, dropped)
        except RuntimeError:  # the loop is closed, and the session with it
            log.debug("a delegation outlived its loop")

    def _take(self, one: _Live, event: Event | str, dropped: int) -> None:
        self.dropped += dropped
        if one.delegation.id not in self._live:
            return  # ended meanwhile: nothing of it may enter any more
        if isinstance(event, str):
            self._fail(one, Stage.FAILED, event)
        elif isinstance(event, Progress):
            one.progress = event.text or one.progress
            self._tell(Stage.PROGRESS, one, event.text)
        elif isinstance(event, ToolCall):
            self._tell(Stage.TOOL, one, event.name)
        else:
            self._deliver(one, event)

    def _deliver(self, one: _Live, result: Result) -> None:
        asked, limits = one.delegation, self.limits
        spoken = next(value for value in (result.spoken, asked.spoken, limits.spoken) if value is not None)
        policy = next(value for value in (result.policy, asked.policy, limits.policy) if value is not None)
        if spoken and policy is Policy.SILENT:
            spoken = False
        try:
            injection = self._queue.put(result.text, spoken=spoken, policy=policy, supersede=_key(one))
        except TmlcError as error:
            self._end(one, Stage.FAILED, f"its result could not be injected: {error.what}")
            return
        self._end(one, Stage.DONE, result.text[:MAX_PROGRESS], injection)

    def _fail(self, one: _Live, stage: Stage, why: str) -> None:
        """Ends a delegation without a result, and tells the conversation so."""
        text = f"The background model gave no answer to: {one.delegation.task[:200]}"
        injection = self._inject_note(one, text, spoken=False, policy=Policy.SILENT)
        self._end(one, stage, why, injection)

    def _time_out(self, one: _Live) -> None:
        self._fail(one, Stage.TIMEOUT, f"no result after {self.limits.timeout:g} s")

    def _listen_for_silence(self, one: _Live) -> None:
        one.silence = self._loop.call_later(self.limits.progress_after, self._silent, one)

    def _silent(self, one: _Live) -> None:
        """The conversation has heard nothing for a while: it is told how far it is, unless there is nothing new."""
        text, spoken = one.progress or self.limits.progress_text, self.limits.progress_spoken
        if text != one.told:
            one.told = text
            injection = self._inject_note(one, text, spoken, Policy.WHEN_IDLE if spoken else Policy.SILENT)
            self._tell(Stage.PROGRESS, one, text, injection)
        self._listen_for_silence(one)

    def _inject_note(self, one: _Live, text: str, spoken: bool, policy: Policy) -> str:
        """Injects what is not a result; "" when there is no room, which costs nothing but the note."""
        ttl = self.limits.progress_after * 2
        try:
            return self._queue.put(text, spoken=spoken, policy=policy, supersede=_key(one), ttl=ttl)
        except TmlcError as error:
            log.info("a note of a delegation was not injected: %s", error.what)
            return ""

    def _end(self, one: _Live, stage: Stage, text: str = "", injection: str = "") -> None:
        if self._live.pop(one.delegation.id, None) is None:
            return
        for timer in (one.deadline, one.silence):
            if timer is not None:
                timer.cancel()
        if one.future is not None and not one.future.done():
            one.future.cancel()
        self._tell(stage, one, text, injection)

    def _tell(self, stage: Stage, one: _Live, text: str = "", injection: str = "") -> None:
        if self._listener is None:
            return
        event = DelegationEvent(stage, one.delegation, self._loop.time() - one.began, text, injection)
        try:
            self._listener(event)
        except Exception:  # a listener's fault must not end a delegation
            log.exception("the listener of delegations failed")


def _key(one: _Live) -> str:
    """Newer news of a delegation replace older ones that wait. No client's key begins with a zero."""
    return f"\0{one.delegation.key or one.delegation.id}"


async def _pump(
    model: BackgroundModel, delegation: Delegation, context: Context, post: Callable[[Event | str, int], None]
) -> None:
    """On the worker's loop: runs a model to its end, and passes on what is what it should be; a str is a failure.

    A model that only yields gives the loop back after each event: others run, and it can be cancelled.
    """
    loop = asyncio.get_running_loop()
    dropped, last, done = 0, -MIN_BETWEEN, False
    try:
        events = model.run(delegation, context)
        try:
            for _ in range(MAX_EVENTS):
                event = checked(await anext(events))
                if isinstance(event, Progress) and loop.time() - last < MIN_BETWEEN:
                    dropped += 1
                else:
                    last = loop.time() if isinstance(event, Progress) else last
                    post(event, dropped)
                    dropped = 0
                if isinstance(event, Result):
                    done = True
                    break
                await asyncio.sleep(0)
            else:
                post(f"it gave more than {MAX_EVENTS} events", dropped)
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()
            elif inspect.iscoroutine(events):
                events.close()
    except (asyncio.CancelledError, StopAsyncIteration):
        return  # cancelled, or ended: without a result, that is what the end of this call says
    except BaseException as error:  # whatever a model raises is its delegation's failure, SystemExit too
        when = " after its result" if done else ""
        # What is not ours may quote the conversation: of that the log has the name only.
        why = _reason(error)
        said = why if isinstance(error, TmlcError) else type(error).__name__
        log.log(logging.INFO if done else logging.WARNING, "a background model failed%s: %s", when, said)
        if not done:
            post(why, dropped)


def _reason(error: BaseException) -> str:
    """Why a model failed, short, and what to do if it says so; never raises, whatever the error's own methods do."""
    try:
        text = f"{error.what}. {error.fix}" if isinstance(error, TmlcError) else str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {' '.join(text[:500].split())[:300]}"


def checked(event: object) -> Event:
    """`event` with its texts cut to what may leave the worker. Raises UsageError for what is not an event."""
    if isinstance(event, Result):
        # One character more than is kept: the queue sees that it is too long, marks the cut and counts it.
        text = _cut(event.text, MAX_CHARACTERS + 1) or "(empty)"
        if event.spoken is not None and not isinstance(event.spoken, bool):
            raise UsageError(
                "the model gave a result of which nobody can say whether it is spoken",
                fix="give Result.spoken as True, False or None",
            )
        return Result(text, event.spoken, None if event.policy is None else Policy(event.policy))
    if isinstance(event, Progress):
        return Progress(_cut(event.text, MAX_PROGRESS))
    if isinstance(event, ToolCall):
        return ToolCall(_cut(event.name, 200), _cut(event.arguments, MAX_PROGRESS))
    raise UsageError(
        f"the model gave {type(event).__name__} and neither Progress, ToolCall nor Result",
        fix="give a text as Result(text)",
    )


def _cut(text: object, most: int) -> str:
    """The first characters of `text`, as a plain str. Raises UsageError when it is none."""
    if not isinstance(text, str):
        raise UsageError(f"the model gave {type(text).__name__} where a text belongs", fix="make a str of it")
    return str.__getitem__(text, slice(0, most))
