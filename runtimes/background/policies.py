"""The words of injections: when they may enter, what becomes of them, the special tokens around them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tmlc.errors import UsageError
from tmlc.runtimes.core.text import Tokenizer


class Policy(StrEnum):
    """When an injection may enter."""

    SILENT = "silent"  # at the next edge; for silent ones only
    WHEN_IDLE = "when_idle"  # when nobody was heard for a second; after 5 s of waiting, as `next_gap`
    NEXT_GAP = "next_gap"  # when neither side was heard in the last tick; after 5 s of waiting, when the user was not
    INTERRUPT = "interrupt"  # at the next edge, before the others, over whoever speaks


class Fate(StrEnum):
    """What became of an injection."""

    ENTERED = "entered"  # its first token is in the session (again after each cut)
    DELIVERED = "delivered"  # appended, or said and played
    CUT = "cut"  # said in part or not played; it waits again
    EXPIRED = "expired"  # its ttl ran out while it waited
    SUPERSEDED = "superseded"  # a newer one with its key took its place
    DROPPED = "dropped"  # the session closed before


@dataclass(frozen=True, slots=True)
class InjectionEvent:
    """One change of one injection; `tick` is -1 where no tick has to do with it."""

    id: str
    fate: Fate
    policy: Policy
    spoken: bool
    tick: int = -1


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens around what is injected, by name; a package of another family names its own.

    `delegation` and `end_of_delegation` stand around a task that the model gives away.
    """

    injection: str = "<injection>"
    end_of_injection: str = "<end_of_injection>"
    delegation: str = "<delegation>"
    end_of_delegation: str = "<end_of_delegation>"

    def around_injections(self, tokenizer: Tokenizer | None) -> tuple[int, int]:
        """The two tokens. Raises UsageError when the package has no tokenizer, or not these tokens."""
        found = [tokenizer.special(n) if tokenizer else None for n in (self.injection, self.end_of_injection)]
        if found[0] is None or found[1] is None:
            raise UsageError(
                f"this package's tokenizer has no special tokens {self.injection} and {self.end_of_injection}",
                fix="name the special tokens that mark what is injected under `marks`, or serve without a background",
            )
        return found[0], found[1]
