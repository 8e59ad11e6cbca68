"""What waits to enter a session, and at which edge it does: the policies, and what counts as delivered.

Two kinds. A **silent** injection is appended as tokens that nobody hears, between the marks <injection> and
<end_of_injection>; a part of it at one edge has marks of its own, so that what the user says between two edges never
stands inside them. A **spoken** one is said by the model in place of what it would have chosen; an empty pair of marks
goes before. The text of both is encoded as typed text is: no text can produce a mark.

A spoken injection is delivered when it was played. One that is cut off (the user speaks over it for two ticks, or the
client says that some of it never sounded) waits again and is said from its start; after `MAX_REPEATS` of these it is
appended silently, so that the model at least knows.

Producers call from any thread, `take` and `published` come from the device thread; the lock is held for microseconds,
and text becomes tokens outside of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from tmlc.errors import CapacityError, InputError, SessionError, UsageError
from tmlc.runtimes.background.policies import Fate, InjectionEvent, Marks, Policy
from tmlc.runtimes.core.live import NOTHING, Delivery, Moment, Published
from tmlc.runtimes.core.text import Tokenizer
from tmlc.runtimes.core.tick import MAX_INJECTED

MAX_WAITING = 64
"""Injections of one session that are not delivered yet. When it is reached, the newest is refused."""
MAX_WAITING_TOKENS = 16_384
"""Tokens of all of them together; the same rule."""
MAX_TOKENS = 2_048
"""Tokens of one injection; a longer text is cut, ends in `CUT_MARK`, and is counted."""
MAX_CHARACTERS = 8_192
"""Characters that are looked at of one text; the rest is cut before it becomes tokens."""
CUT_MARK = " […]"
IDLE_SECONDS = 1.0
"""Nobody was heard for so long: idle."""
IDLE_PATIENCE = 5.0
"""After waiting so long for idleness, the next gap will do."""
GAP_PATIENCE = 5.0
"""After waiting so long for a gap, the model's own voice no longer counts: a model that never pauses is interrupted."""
BARGE_TICKS = 2
"""Ticks in a row with the user's voice over a spoken injection that cut it off."""
MAX_REPEATS = 2
"""How often a spoken injection that was cut off is said again."""
PLAYBACK_SECONDS = 30.0
"""With playback reports: a said injection of which nothing is heard for so long counts as not played."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Item:
    """An injection that is not delivered yet."""

    order: int
    id: str
    tokens: tuple[int, ...]
    spoken: bool
    policy: Policy
    coalesce: str | None
    supersede: str | None
    ttl: float | None
    born: float | None = None  # the edge at which it was first seen; its ttl counts from there
    since: float | None = None  # the edge from which it waits: `born`, or the one after it was cut off
    at: int = 0  # tokens that have entered
    cuts: int = 0
    first_tick: int = -1
    last_tick: int = -1
    said_at: float = 0.0
    voice_before: bool = False  # the user's voice was there when it began: it is not an answer to it
    voice_over: int = 0

    @property
    def keys(self) -> set[str]:
        return {key for key in (self.coalesce, self.supersede) if key is not None}


class InjectionQueue:
    """An `Inbox`: what waits to enter one session.

    Args:
        tokenizer: of the package.
        marks: its special tokens.
        say_room: tokens that one tick can say (`text_out`); 0 for a model that cannot be made to speak.
        vocab: tokens that the engine knows; a text with another one is refused before it could end a session.
        playback: the client reports what it has played (`played`, `unplayed`). Otherwise a spoken injection is
            delivered when the last of it was handed out.
        listener: called with each event, by the thread that caused it; it must return at once.

    Attributes:
        cut_texts: texts that were longer than an injection may be.
        refused: injections that found the queue full.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        marks: Marks | None = None,
        *,
        say_room: int,
        vocab: int | None = None,
        playback: bool = False,
        listener: Callable[[InjectionEvent], None] | None = None,
    ) -> None:
        self._begin, self._end = (marks or Marks()).around_injections(tokenizer)
        assert tokenizer is not None
        self._tokenizer, self._say_room, self._vocab = tokenizer, say_room, vocab
        self._cut_mark = tokenizer.encode(CUT_MARK)
        self._join = tuple(tokenizer.encode("\n"))
        self._known([self._begin, self._end, *self._cut_mark, *self._join])
        self.playback = playback
        self._listener = listener
        self._lock = threading.Lock()
        self._events: list[InjectionEvent] = []
        self._waiting: list[_Item] = []  # by order
        self._thinking: _Item | None = None
        self._saying: _Item | None = None
        self._said: list[_Item] = []
        self._tokens = self._order = 0
        self._closed = False
        self.cut_texts = self.refused = 0

    # What producers do.

    def put(
        self,
        text: str,
        *,
        spoken: bool = False,
        policy: Policy = Policy.WHEN_IDLE,
        coalesce: str | None = None,
        supersede: str | None = None,
        ttl: float | None = None,
    ) -> str:
        """Adds one injection; any thread.

        Args:
            text: what is to enter. Longer than `MAX_TOKENS`: it is cut. Lone surrogates become question marks.
            coalesce: joins the last waiting injection of this key and kind, on a line of its own, and the more urgent
                of their policies holds; a pair that would be too long stays a pair.
            supersede: takes the place of those with this key that wait, and ends one that is being said.
            ttl: seconds from the next edge after which it is dropped, unless it has begun.

        Returns:
            The id of the injection that the text is in.

        Raises:
            UsageError: an empty text, both keys, a spoken one that is to be silent, a model that cannot speak, a ttl
                that is not positive.
            CapacityError: the queue is full; SessionError: it is closed; InputError: see `vocab`.
        """
        if not isinstance(text, str) or not text:
            raise UsageError("an injection must be a text with something in it", fix="give a str that is not empty")
        return self.put_tokens(
            self._encode(text), spoken=spoken, policy=policy, coalesce=coalesce, supersede=supersede, ttl=ttl
        )

    def put_tokens(
        self,
        tokens: tuple[int, ...],
        *,
        spoken: bool,
        policy: Policy,
        coalesce: str | None = None,
        supersede: str | None = None,
        ttl: float | None = None,
    ) -> str:
        """As `put`, of a text that is tokens of this tokenizer already: 1 to `MAX_TOKENS`."""
        self._check(spoken, policy, coalesce, supersede, ttl)
        try:
            with self._lock:
                return self._put(tokens, spoken, policy, coalesce, supersede, ttl)
        finally:
            self._tell()

    def _check(
        self, spoken: bool, policy: Policy, coalesce: str | None, supersede: str | None, ttl: float | None
    ) -> None:
        if coalesce is not None and supersede is not None:
            raise UsageError(
                "an injection cannot both join and replace those before it", fix="give either coalesce or supersede"
            )
        if spoken and policy is Policy.SILENT:
            raise UsageError("a spoken injection cannot be silent", fix="take when_idle, next_gap or interrupt")
        if spoken and not self._say_room:
            raise UsageError("this model cannot be made to speak", fix="inject silently")
        if ttl is not None and not 0 < ttl < 1e9:
            raise UsageError(
                f"a ttl must be a positive number of seconds, not {ttl}",
                fix="leave it out for an injection that waits as long as it must",
            )

    def _encode(self, text: str) -> tuple[int, ...]:
        cut = len(text) > MAX_CHARACTERS
        text = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode()
        tokens, room = self._tokenizer.encode(text), MAX_TOKENS - len(self._cut_mark)
        cut |= len(tokens) > MAX_TOKENS
        while cut and len(tokens) > room:
            text = text[: min(len(text) - 1, len(text) * room // len(tokens))]
            tokens = self._tokenizer.encode(text)
        if cut:
            with self._lock:
                self.cut_texts += 1
        self._known(tokens)
        return tuple(tokens + self._cut_mark if cut else tokens)

    def _known(self, tokens: list[int]) -> None:
        """Raises InputError when the engine does not know one of these tokens."""
        if self._vocab is not None and max(tokens, default=0) >= self._vocab:
            raise InputError(
                f"the tokenizer gives token {max(tokens)}, the engine knows those below {self._vocab}",
                fix="compile the checkpoint with the tokenizer.json that it was trained with",
            )

    def _put(
        self,
        tokens: tuple[int, ...],
        spoken: bool,
        policy: Policy,
        coalesce: str | None,
        supersede: str | None,
        ttl: float | None,
    ) -> str:
        if self._closed:
            raise SessionError("the session takes no more injections: it is closed", fix="open a new session")
        if supersede is not None:
            self._replace(supersede)
        if coalesce is not None and (joined := self._joined(tokens, spoken, policy, coalesce, ttl)) is not None:
            return joined
        if self._held() >= MAX_WAITING or self._tokens + len(tokens) > MAX_WAITING_TOKENS:
            self.refused += 1
            raise CapacityError(
                f"{self._held()} injections with {self._tokens} tokens wait already",
                fix="wait until some of them are delivered, or give them keys to coalesce or supersede by",
            )
        self._order += 1
        name = "inj_" + secrets.token_urlsafe(12)
        self._waiting.append(_Item(self._order, name, tokens, spoken, policy, coalesce, supersede, ttl))
        self._tokens += len(tokens)
        return name

    def _joined(
        self, tokens: tuple[int, ...], spoken: bool, policy: Policy, key: str, ttl: float | None
    ) -> str | None:
        """The id of the waiting injection that took these tokens in."""
        last = next((item for item in reversed(self._waiting) if key in item.keys), None)
        if last is None or last.spoken != spoken or last.cuts:
            return None
        extra = len(self._join) + len(tokens)
        if len(last.tokens) + extra > MAX_TOKENS or self._tokens + extra > MAX_WAITING_TOKENS:
            return None
        last.tokens += self._join + tokens
        last.policy = max(last.policy, policy, key=_URGENCY.index)
        last.ttl, last.born = ttl, None
        self._tokens += extra
        return last.id

    def _replace(self, key: str) -> None:
        for item in [item for item in self._waiting if key in item.keys]:
            self._waiting.remove(item)
            self._forget(item, Fate.SUPERSEDED)
        if self._saying is not None and key in self._saying.keys:
            self._forget(self._saying, Fate.SUPERSEDED)
            self._saying = None
        for item in [item for item in self._said if key in item.keys]:
            # It was said to the end: whether it was heard no longer matters.
            self._said.remove(item)
            self._forget(item, Fate.SUPERSEDED)

    def cancel(self, id: str) -> bool:
        """Takes back an injection that has not begun. False: it has, or is gone."""
        with self._lock:
            found = next((item for item in self._waiting if item.id == id), None)
            if found is not None:
                self._waiting.remove(found)
                self._forget(found, Fate.DROPPED)
        self._tell()
        return found is not None

    def played(self, tick: int) -> None:
        """The client has played the output of all ticks up to `tick`; any thread."""
        with self._lock:
            for item in [item for item in self._said if item.last_tick <= tick]:
                self._said.remove(item)
                self._forget(item, Fate.DELIVERED, item.last_tick)
        self._tell()

    def unplayed(self, first: int, last: int) -> None:
        """The output of the ticks from `first` to `last` never sounded (the client threw it away); any thread. What was
        said there waits again."""
        with self._lock:
            for item in [item for item in self._said if item.first_tick <= last and item.last_tick >= first]:
                self._said.remove(item)
                self._cut(item, None)
            saying = self._saying
            if saying is not None and saying.first_tick <= last and saying.last_tick >= first:
                self._saying = None
                self._cut(saying, None)
        self._tell()

    def close(self) -> list[str]:
        """No more goes in or out. Returns the ids of what was not delivered."""
        with self._lock:
            self._closed = True
            left = sorted(self._all(), key=lambda item: item.order)
            self._waiting, self._said, self._thinking, self._saying = [], [], None, None
            for item in left:
                self._forget(item, Fate.DROPPED)
        self._tell()
        return [item.id for item in left]

    @property
    def waiting(self) -> int:
        """Injections that are not delivered yet."""
        with self._lock:
            return self._held()

    @property
    def busy(self) -> bool:
        """Is something being said, or waiting to be?"""
        with self._lock:
            return self._saying is not None or any(item.spoken for item in self._waiting)

    # What the device thread does.

    def take(self, moment: Moment) -> Delivery:
        """What enters at this edge."""
        with self._lock:
            delivery = self._take(moment) if self._held() else NOTHING
        self._tell()
        return delivery

    def published(self, out: Published) -> None:
        """Without playback reports, what was said to its end counts as delivered here."""
        if self.playback or not out.delivery.parts:
            return
        parts = set(out.delivery.parts)
        with self._lock:
            for item in [item for item in self._said if item.id in parts]:
                self._said.remove(item)
                self._forget(item, Fate.DELIVERED, item.last_tick)
        self._tell()

    def _take(self, moment: Moment) -> Delivery:
        self._age(moment)
        self._listen(moment)
        inject: list[int] = []
        parts: list[str] = []
        room = min(moment.inject_room, MAX_INJECTED)
        say = self._speak(moment, inject, room, parts)
        self._think(moment, inject, room, parts)
        return Delivery(tuple(inject), say, tuple(parts))

    def _age(self, moment: Moment) -> None:
        """Starts the clocks of new injections; drops those that waited too long."""
        for item in list(self._waiting):
            if item.since is None:
                item.since = moment.now
            if item.born is None:
                item.born = moment.now
            elif item.ttl is not None and moment.now - item.born >= item.ttl:
                self._waiting.remove(item)
                self._forget(item, Fate.EXPIRED, moment.tick)
        if self.playback:
            for item in [item for item in self._said if moment.now - item.said_at >= PLAYBACK_SECONDS]:
                self._said.remove(item)
                self._cut(item, moment)

    def _listen(self, moment: Moment) -> None:
        """Cuts off what is being said when the user speaks over it."""
        item = self._saying
        if item is None:
            return
        item.voice_before &= moment.user_speaking
        over = moment.user_speaking and not item.voice_before
        item.voice_over = item.voice_over + 1 if over else 0
        if item.voice_over >= BARGE_TICKS:
            self._saying = None
            self._cut(item, moment)

    def _speak(self, moment: Moment, inject: list[int], room: int, parts: list[str]) -> tuple[int, ...]:
        """The tokens that this tick says."""
        most = min(moment.say_room, self._say_room)
        if most <= 0:
            return ()
        item = self._saying
        if item is None:
            item = self._next(moment, spoken=True)
            if item is None or room < 2:
                return ()
            inject += (self._begin, self._end)
            self._enter(item, moment)
            item.voice_before, item.voice_over, item.first_tick = moment.user_speaking, 0, moment.tick
            self._saying = item
        say = item.tokens[item.at : item.at + most]
        item.at += len(say)
        item.last_tick = moment.tick
        if item.at == len(item.tokens):
            self._saying, item.said_at = None, moment.now
            self._said.append(item)
            parts.append(item.id)
        return say

    def _think(self, moment: Moment, inject: list[int], room: int, parts: list[str]) -> None:
        """Appends silent injections, in order, until there is no room for one more token and its marks."""
        while len(inject) + 3 <= room:
            item = self._thinking
            if item is None:
                item = self._next(moment, spoken=False)
                if item is None:
                    return
                self._enter(item, moment)
                self._thinking = item
            part = item.tokens[item.at : item.at + room - len(inject) - 2]
            inject += (self._begin, *part, self._end)
            item.at += len(part)
            if item.at == len(item.tokens):
                self._thinking = None
                parts.append(item.id)
                self._forget(item, Fate.DELIVERED, moment.tick)

    def _next(self, moment: Moment, spoken: bool) -> _Item | None:
        """The injection that may enter now: those that interrupt first, else in order; of one key always in order."""
        ahead: set[str] = set().union(*(item.keys for item in self._begun()))
        chosen: _Item | None = None
        for item in self._waiting:
            if item.spoken == spoken and not item.keys & ahead and self._may_enter(item, moment):
                if item.policy is Policy.INTERRUPT:
                    return item
                chosen = chosen or item
            ahead |= item.keys
        return chosen

    @staticmethod
    def _may_enter(item: _Item, moment: Moment) -> bool:
        if item.policy in (Policy.SILENT, Policy.INTERRUPT):
            return True
        waited = moment.now - (item.since if item.since is not None else moment.now) + 1e-9
        if item.policy is Policy.WHEN_IDLE:
            if waited < IDLE_PATIENCE:
                return moment.quiet >= IDLE_SECONDS - 1e-9
            waited -= IDLE_PATIENCE
        return not moment.user_speaking and (not moment.model_speaking or waited >= GAP_PATIENCE)

    def _enter(self, item: _Item, moment: Moment) -> None:
        self._waiting.remove(item)
        self._note(item, Fate.ENTERED, moment.tick)

    def _cut(self, item: _Item, moment: Moment | None) -> None:
        """What was cut off waits again, from its start."""
        self._note(item, Fate.CUT, item.last_tick)
        item.at, item.cuts = 0, item.cuts + 1
        item.since = moment.now if moment is not None else None
        if item.cuts > MAX_REPEATS:
            item.spoken, item.policy = False, Policy.SILENT
        elif item.policy is Policy.INTERRUPT:
            item.policy = Policy.NEXT_GAP  # it had its chance to be rude
        insort(self._waiting, item, key=lambda item: item.order)

    # Bookkeeping; the caller holds the lock.

    def _all(self) -> list[_Item]:
        return [*self._waiting, *self._begun()]

    def _begun(self) -> list[_Item]:
        return [item for item in (self._thinking, self._saying, *self._said) if item is not None]

    def _held(self) -> int:
        return len(self._waiting) + len(self._said) + (self._thinking is not None) + (self._saying is not None)

    def _forget(self, item: _Item, fate: Fate, tick: int = -1) -> None:
        self._tokens -= len(item.tokens)
        self._note(item, fate, tick)

    def _note(self, item: _Item, fate: Fate, tick: int) -> None:
        self._events.append(InjectionEvent(item.id, fate, item.policy, item.spoken, tick))

    def _tell(self) -> None:
        """Hands out the events, outside of the lock."""
        if not self._events:
            return
        with self._lock:
            events, self._events = self._events, []
        if self._listener is None:
            return
        for event in events:
            try:
                self._listener(event)
            except Exception:  # a listener's fault must not reach the device thread
                log.exception("the listener of an injection queue failed")


_URGENCY = [Policy.WHEN_IDLE, Policy.NEXT_GAP, Policy.SILENT, Policy.INTERRUPT]
