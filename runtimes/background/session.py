"""The background of a server and of each of its sessions, put together: what the gateway uses.

    background = Background(model)                       # one a server
    beside = background.open(engine.tokenizer, layout)   # one a session, on the event loop
    seat = scheduler.open(sink, inbox=beside, ...)
    beside.tick(published)                               # on the loop, once for each `Published`, in order
    beside.delegate("…");  beside.inject("…", spoken=True);  beside.played(tick);  beside.close()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmlc.errors import TmlcError, UsageError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.background.delegations import DelegationEvent, Delegations, Limits
from tmlc.runtimes.background.detectors import Detector, Sight, Watch
from tmlc.runtimes.background.injections import InjectionQueue
from tmlc.runtimes.background.model import BackgroundModel, Delegation, Origin
from tmlc.runtimes.background.policies import InjectionEvent, Marks, Policy
from tmlc.runtimes.background.rules import Fired, Rule, RuleClock, check_detectors
from tmlc.runtimes.background.tokens import DelegationReader
from tmlc.runtimes.background.transcript import Transcript
from tmlc.runtimes.background.worker import Worker
from tmlc.runtimes.core.live import Delivery, Moment, Published
from tmlc.runtimes.core.text import Tokenizer

log = logging.getLogger(__name__)


class Background:
    """What all sessions of a server share. Thread-safe; `open` on the event loop that the sessions live on.

    Args:
        model: who thinks; None when nobody does: injections and rules work, delegations are refused.
        limits, marks, instructions, rules: see `Limits`, `Marks`, `Context`, `Rule`.
        detectors: what the rules may wait for, beside the built-in ones, by name.
        preempted: does this machine need all it has for ticks? (The scheduler's ladder knows.)

    Raises UsageError: a rule that cannot work here.
    """

    def __init__(
        self,
        model: BackgroundModel | None = None,
        *,
        limits: Limits | None = None,
        marks: Marks | None = None,
        instructions: str = "",
        rules: Sequence[Rule] = (),
        detectors: Mapping[str, Detector] | None = None,
        preempted: Callable[[], bool] | None = None,
    ) -> None:
        self.model, self.limits, self.marks = model, limits or Limits(), marks or Marks()
        self.instructions, self.rules, self.detectors = instructions, tuple(rules), dict(detectors or {})
        check_detectors(self.rules, self.detectors)
        if model is not None and preempted is not None:
            model.preempted = preempted
        self.worker = Worker()

    def open(
        self,
        tokenizer: Tokenizer | None,
        layout: TickLayout,
        *,
        vocab: int | None = None,
        playback: bool = False,
        instructions: str | None = None,
        on_injection: Callable[[InjectionEvent], None] | None = None,
        on_delegation: Callable[[DelegationEvent], None] | None = None,
    ) -> BackgroundSession:
        """The background of one session.

        Args:
            tokenizer, layout, vocab: of the engine.
            playback: the client reports what it played; see `InjectionQueue`.
            instructions: in place of the server's.
            on_injection, on_delegation: called on this event loop.

        Raises UsageError: the package has no tokens that mark an injection.
        """
        return BackgroundSession(
            self, tokenizer, layout, vocab, playback, instructions, on_injection, on_delegation
        )

    async def close(self) -> None:
        """Ends the models and their threads."""
        if self.model is not None:
            future = self.worker.submit(self.model.close())
            try:
                await asyncio.wait_for(asyncio.wrap_future(future), 5.0)
            except Exception as error:
                log.warning("the background model did not close: %s", type(error).__name__)
        await asyncio.to_thread(self.worker.close)


@dataclass(frozen=True, slots=True)
class Noted:
    """What the background saw in one tick's output.

    Attributes:
        text: what the model said to the user; tasks that it delegates are no part of it.
        delegations: those that this tick started.
    """

    text: str
    delegations: tuple[Delegation, ...] = ()


class BackgroundSession:
    """Made by `Background.open`. An `Inbox`: `take` and `published` for the device thread, the rest on the loop.

    Attributes:
        queue, delegations, watch: the parts; `delegations` is None without a model.
        on_task: gets the tasks of the model and of rules, on the loop, where the client does them; None: the
            background model does.
        refused: delegations of the model, and what rules would have done, that found no room.
    """

    def __init__(
        self,
        shared: Background,
        tokenizer: Tokenizer | None,
        layout: TickLayout,
        vocab: int | None,
        playback: bool,
        instructions: str | None,
        on_injection: Callable[[InjectionEvent], None] | None,
        on_delegation: Callable[[DelegationEvent], None] | None,
    ) -> None:
        shared.marks.around_injections(tokenizer)
        assert tokenizer is not None
        self._loop = asyncio.get_running_loop()
        self._period_ms = layout.duration_ms
        self._on_injection = on_injection
        self.on_task: Callable[[str], None] | None = None
        self._instructions = shared.instructions if instructions is None else instructions
        self.queue = InjectionQueue(
            tokenizer, shared.marks, say_room=layout.text_out, vocab=vocab, playback=playback, listener=self._injected
        )
        self.delegations: Delegations | None = None
        if shared.model is not None:
            self.delegations = Delegations(
                shared.model, self.queue, shared.worker,
                limits=shared.limits, duration_ms=layout.duration_ms, listener=on_delegation,
            )  # fmt: skip
        self._rules = RuleClock(shared.rules, tokenizer, layout.duration_ms) if shared.rules else None
        self.watch = Watch(shared.detectors, shared.worker)
        self._reader = DelegationReader(tokenizer, shared.marks)
        self._transcript = Transcript()
        self._tick = 0
        self.refused = 0

    # Inbox, on the device thread.

    def take(self, moment: Moment) -> Delivery:
        """What enters at this edge; rules that are due come first."""
        if self._rules is not None:
            for fired in self._rules.due(moment, self.watch.seen()):
                self._fire(fired)
        return self.queue.take(moment)

    def _fire(self, fired: Fired) -> None:
        rule = fired.rule
        if rule.delegate is not None:
            self._on_loop(self._delegate_by_rule, fired)
            return
        spoken = bool(rule.spoken)
        policy = rule.policy or (Policy.WHEN_IDLE if spoken else Policy.SILENT)
        ttl = None if rule.expire is None else rule.expire / 1000
        try:
            self.queue.put_tokens(
                fired.tokens, spoken=spoken, policy=policy, coalesce=rule.coalesce, supersede=rule.supersede, ttl=ttl
            )
        except TmlcError:  # a full queue or a closed one: nothing that a tick should fail for
            self.refused += 1

    def _delegate_by_rule(self, fired: Fired) -> None:
        rule = fired.rule
        assert rule.delegate is not None
        if self.on_task is not None:
            self.on_task(rule.delegate)
            return
        try:
            self.delegate(
                rule.delegate, Origin.RULE, tick=fired.tick, key=rule.supersede, spoken=rule.spoken, policy=rule.policy
            )
        except TmlcError as error:
            self.refused += 1
            log.info("a delegation by rule was refused: %s", error.what)

    def published(self, out: Published) -> None:
        """The tick was done."""
        self.queue.published(out)

    # The gateway, on the loop.

    def tick(self, out: Published) -> Noted:
        """Follows the conversation: once for each tick that was published, in order."""
        self._tick = out.output.index + 1
        at = out.output.index * self._period_ms
        text, tasks = self._reader.push(out.output.tokens)
        if text:
            self._transcript.add("model", text, at, at + self._period_ms)
        started = []
        for task in tasks:
            if self.on_task is not None:
                self.on_task(task)
                continue
            try:
                started.append(self.delegate(task, Origin.TOKEN))
            except TmlcError as error:
                self.refused += 1
                log.info("a delegation of the model was refused: %s", error.what)
        if self.watch:
            context = self._transcript.context(self._instructions)
            self.watch.look(Sight(out.output.index, out.user_speaking, out.model_speaking, context))
        return Noted(text, tuple(started))

    def heard(self, text: str, start_ms: int | None = None, end_ms: int | None = None) -> None:
        """What the user typed now, or said at a known time: part of what a background model is told."""
        now = self._tick * self._period_ms
        start = now if start_ms is None else start_ms
        self._transcript.add("user", text, start, max(start, now if end_ms is None else end_ms))

    def saw(self, frame: np.ndarray) -> None:
        """A picture that the model was shown: uint8 [height, width, 3]."""
        self._transcript.see(frame, self._tick * self._period_ms)

    def delegate(
        self,
        task: str,
        origin: Origin = Origin.CLIENT,
        *,
        tick: int | None = None,
        key: str | None = None,
        spoken: bool | None = None,
        policy: Policy | None = None,
    ) -> Delegation:
        """Gives a task to the background model; see `Delegations.start`. `tick` None: now.

        Raises UsageError also when the server has no background model.
        """
        if self.delegations is None:
            raise UsageError("this server has no background model", fix="name one in the background's settings")
        context = self._transcript.context(self._instructions)
        at = self._tick if tick is None else tick
        return self.delegations.start(
            task, context, tick=at, origin=origin, key=key, spoken=spoken, policy=policy
        )

    def inject(
        self,
        text: str,
        *,
        spoken: bool = False,
        policy: Policy = Policy.WHEN_IDLE,
        coalesce: str | None = None,
        supersede: str | None = None,
        ttl: float | None = None,
    ) -> str:
        """Puts a text into the conversation; see `InjectionQueue.put`."""
        return self.queue.put(text, spoken=spoken, policy=policy, coalesce=coalesce, supersede=supersede, ttl=ttl)

    def played(self, tick: int | None = None, *, ms: float | None = None) -> None:
        """The client has played all output up to and with `tick`, or the first `ms` of the session's output.

        Raises UsageError: both or neither are given.
        """
        if (tick is None) == (ms is None):
            raise UsageError("playback is reported by tick or by milliseconds", fix="give one of the two")
        self.queue.played(tick if tick is not None else int((ms or 0.0) // self._period_ms) - 1)

    def unplayed(self, first: int, last: int) -> None:
        """The client has thrown away the output of the ticks from `first` to `last`."""
        self.queue.unplayed(first, last)

    def close(self) -> list[str]:
        """Cancels delegations; returns the ids of injections that were not delivered. Twice does nothing."""
        if self.delegations is not None:
            self.delegations.close()
        return self.queue.close()

    def _injected(self, event: InjectionEvent) -> None:
        """On any thread."""
        if self._on_injection is not None:
            self._on_loop(self._on_injection, event)

    def _on_loop(self, call: Callable[[Any], None], value: Any) -> None:
        """Calls `call(value)` on the loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(call, value)
        except RuntimeError:  # the loop is closed, and nobody listens
            log.debug("a session's background outlived its loop")
