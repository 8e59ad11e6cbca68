"""Time and cues: rules that put a text into the conversation or give a task to the background model.

    - {every: 4 s, inject: "{time} have passed.", policy: silent}
    - {at: 10 s, inject: "Ten seconds.", spoken: true, policy: next_gap}
    - {when: silence_for 5 s, delegate: "Suggest what to talk about next."}
    - {when: user_stopped, inject: "The user has finished.", policy: silent}
    - {when: door_open, inject: "Somebody came in.", supersede: door, expire: 10 s}

Times are those of the session: the index of the tick times its length, never a clock on the wall. What a rule does
depends on the sequence of ticks alone, so the same ticks give the same injections at the same edges. A tick that is
jumped over (collapse) fires what was due in it once, at the next edge.

Rules run on the device thread, so their texts are tokens already when a session starts; only digits are put in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from tmlc.errors import UsageError
from tmlc.runtimes.background.injections import MAX_TOKENS
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.core.live import Moment
from tmlc.runtimes.core.text import Tokenizer

MAX_RULES = 64
MAX_TEXT = 500
"""Characters of what a rule injects."""

_UNITS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*(ms|s|min|h)")
_DETECTOR = re.compile(r"([a-z][a-z0-9_]{0,63})(?:\s+(.+))?")
_VARIABLES = re.compile(r"(\{time\}|\{seconds\})")


def milliseconds(value: Any) -> int:
    """`4 s`, `500 ms`, `1.5 min`, `1 h` as milliseconds. Raises ValueError for anything else."""
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("not a duration like `4 s`, `500 ms` or `2 min`")
    return round(float(found[1]) * _UNITS[found[2]])


class Cue(StrEnum):
    """Detectors that are built in."""

    USER_STARTED = "user_started"
    USER_STOPPED = "user_stopped"
    MODEL_STARTED = "model_started"
    MODEL_STOPPED = "model_stopped"
    SILENCE_FOR = "silence_for"  # neither side was heard for so long; once a silence


@dataclass(frozen=True, slots=True)
class Trigger:
    """When a rule fires: `kind` is "every", "at" or "when"; `ms` its time; `detector` its cue."""

    kind: str
    ms: int = 0
    detector: str = ""


def _detector(text: Any) -> str:
    """Reads `NAME` and `silence_for 5 s`; ValueError for anything else."""
    found = _DETECTOR.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise ValueError("no detector such as `user_stopped` or `silence_for 5 s`")
    if (found[1] == Cue.SILENCE_FOR) != (found[2] is not None):
        raise ValueError("silence_for needs a time, other detectors have none")
    if found[2]:
        milliseconds(found[2])
    return text.strip()


Milliseconds = Annotated[int, BeforeValidator(milliseconds), PlainSerializer(lambda ms: f"{ms} ms")]


class Rule(BaseModel):
    """One rule, as it is written in YAML or JSON.

    Attributes:
        every, at, when: what it fires on, one of them: a time, again and again; a time, once; a detector.
        inject: the text that enters; {time} becomes minutes:seconds of the session, {seconds} its whole seconds.
        delegate: the task that is given away, in place of `inject`.
        spoken, policy, coalesce, supersede, expire: as `InjectionQueue.put` takes them; for a delegation, `spoken` and
            `policy` are those of its result and `supersede` is the key by which a newer one cancels it.
        once: it fires the first time only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: Milliseconds | None = None
    at: Milliseconds | None = None
    when: Annotated[str, BeforeValidator(_detector)] | None = None
    inject: str | None = Field(None, min_length=1, max_length=MAX_TEXT)
    delegate: str | None = Field(None, min_length=1, max_length=MAX_TEXT)
    spoken: Annotated[bool | None, Field(strict=True)] = None
    policy: Policy | None = None
    coalesce: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[^\x00]+$")
    supersede: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[^\x00]+$")
    expire: Milliseconds | None = None
    once: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _whole(self) -> Rule:
        if sum(field is not None for field in (self.every, self.at, self.when)) != 1:
            raise ValueError("a rule has one of `every`, `at` and `when`")
        if self.every is not None and self.every < 200:
            raise ValueError("a rule can fire every 200 ms at most")
        if (self.inject is None) == (self.delegate is None):
            raise ValueError("a rule has either `inject` or `delegate`")
        if self.coalesce and self.supersede:
            raise ValueError("a rule has either `coalesce` or `supersede`")
        if self.spoken and self.policy is Policy.SILENT:
            raise ValueError("what is spoken cannot be silent")
        if self.delegate is not None and (self.coalesce or self.expire is not None):
            raise ValueError("`coalesce` and `expire` belong to `inject`")
        if self.expire is not None and self.expire < 1:
            raise ValueError("`expire` must be longer than nothing")
        if self.inject is not None and not (self.inject.strip()):
            raise ValueError("`inject` is an empty text")
        return self

    @property
    def on(self) -> Trigger:
        """What it fires on."""
        if self.every is not None:
            return Trigger("every", self.every)
        if self.at is not None:
            return Trigger("at", self.at)
        name, *time = (self.when or "").split(None, 1)
        return Trigger("when", milliseconds(time[0]) if time else 0, name)


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule fired at an edge; `tokens` are those of its text (none for a delegation)."""

    rule: Rule
    tick: int
    tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class _Watched:
    rule: Rule
    on: Trigger
    parts: list[tuple[int, ...] | str] = field(default_factory=list)
    done: bool = False


class RuleClock:
    """The rules of one session, edge by edge. `due` is called by the device thread; nothing in it waits.

    Args:
        period_ms: length of a tick.
    """

    def __init__(self, rules: Sequence[Rule], tokenizer: Tokenizer, period_ms: int) -> None:
        self._period_ms = period_ms
        self._watched = [_Watched(rule, rule.on, _parts(rule.inject or "", tokenizer)) for rule in rules]
        self._figures = {c: tuple(tokenizer.encode(c)) for c in "0123456789:"} if rules else {}
        self._last: Moment | None = None

    def due(self, moment: Moment, cues: Iterable[str] = ()) -> list[Fired]:
        """The rules that fire at this edge, in the order in which they are written.

        Args:
            cues: names of registered detectors that have seen something since the last edge.
        """
        fired, seen, last = [], set(cues), self._last
        for one in self._watched:
            if not one.done and self._fires(one.on, moment, last, seen):
                one.done = one.rule.once
                fired.append(Fired(one.rule, moment.tick, self._text(one.parts, moment.tick)))
        self._last = moment
        return fired

    def _fires(self, on: Trigger, moment: Moment, last: Moment | None, seen: set[str]) -> bool:
        now = moment.tick * self._period_ms
        before = (last.tick if last is not None else moment.tick - 1) * self._period_ms
        if on.kind == "every":
            return now // on.ms > before // on.ms and now > 0
        if on.kind == "at":
            return before < on.ms <= now
        was_user, was_model = (last.user_speaking, last.model_speaking) if last is not None else (False, False)
        was_quiet = last.quiet if last is not None else 0.0
        answers: dict[str, bool] = {
            Cue.USER_STARTED: moment.user_speaking and not was_user,
            Cue.USER_STOPPED: was_user and not moment.user_speaking,
            Cue.MODEL_STARTED: moment.model_speaking and not was_model,
            Cue.MODEL_STOPPED: was_model and not moment.model_speaking,
            # Tenths do not add up exactly: a nanosecond is not a tick.
            Cue.SILENCE_FOR: was_quiet + 1e-9 < on.ms / 1000 <= moment.quiet + 1e-9,
        }
        return answers.get(on.detector, on.detector in seen)

    def _text(self, parts: Sequence[tuple[int, ...] | str], tick: int) -> tuple[int, ...]:
        tokens: list[int] = []
        seconds = tick * self._period_ms // 1000
        for part in parts:
            if isinstance(part, tuple):
                tokens += part
            else:
                figures = f"{seconds // 60}:{seconds % 60:02}" if part == "{time}" else str(seconds)
                for figure in figures:
                    tokens += self._figures[figure]
        return tuple(tokens)


def _parts(text: str, tokenizer: Tokenizer) -> list[tuple[int, ...] | str]:
    """A text cut at its variables: tokens, and the names of variables.

    Raises UsageError: a text that has too many tokens.
    """
    parts: list[tuple[int, ...] | str] = []
    for piece in _VARIABLES.split(text):
        if piece:
            variable = _VARIABLES.fullmatch(piece) is not None
            parts.append(piece if variable else tuple(tokenizer.encode(piece.encode("utf-8", "replace").decode())))
    if sum(len(part) if isinstance(part, tuple) else 12 for part in parts) > MAX_TOKENS:
        raise UsageError(f"the text of a rule has more than {MAX_TOKENS} tokens", fix="write a shorter one")
    return parts


def check_detectors(rules: Iterable[Rule], registered: Mapping[str, object]) -> None:
    """Raises UsageError for a rule that waits for a detector that nobody registered, or one that hides a built-in."""
    known = {cue.value for cue in Cue}
    if hidden := known & set(registered):
        raise UsageError(f"a registered detector is called {min(hidden)!r}, as a built-in one is", fix="rename it")
    for rule in rules:
        if rule.on.kind == "when" and rule.on.detector not in known | set(registered):
            names = ", ".join(sorted(known | set(registered)))
            raise UsageError(f"no detector is called {rule.on.detector!r}", where="rules", fix=f"there are: {names}")
