"""What a background model is: it takes a delegation and the conversation so far, and answers in its own time.

Everything that it yields is data for the conversation, never an instruction to the server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from tmlc.runtimes.background.policies import Policy


class Origin(StrEnum):
    """Who asked for a delegation."""

    TOKEN = "token"  # the model, by its special tokens
    CLIENT = "client"
    RULE = "rule"


@dataclass(frozen=True, slots=True)
class Delegation:
    """A task that left the conversation.

    Attributes:
        id: unguessable name.
        task: what is asked, as text; it comes from the model, the client or a rule, and is not to be trusted.
        tick, offset_ms: where in the session it was asked, by tick and in milliseconds from the start.
        origin: who asked.
        key: a newer delegation with the same key cancels this one (None: nothing does).
        spoken, policy: how its result is to enter the conversation (None: as the session's settings say).
    """

    id: str
    task: str
    tick: int
    offset_ms: int
    origin: Origin
    key: str | None = None
    spoken: bool | None = None
    policy: Policy | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """What one side said or typed between two moments, in milliseconds from the start of the session."""

    speaker: str  # "user" or "model"
    text: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture that the model saw: uint8 [height, width, 3], read-only, and when."""

    pixels: np.ndarray
    at_ms: int


@dataclass(frozen=True, slots=True)
class Context:
    """The conversation as it was at the tick of the delegation, bounded (`transcript.py` says how).

    Attributes:
        lines: the newest lines, oldest first; frames: the newest pictures, oldest first.
        instructions: what the operator or the client asks of the background model.
        cut: lines that are left out because there were too many.
    """

    lines: tuple[Line, ...] = ()
    frames: tuple[Frame, ...] = field(default=(), repr=False)
    instructions: str = ""
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The model is still at it; `text` says how far, or nothing. Said to the conversation only after silence."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model has called a tool. For observers; the model runs its tools itself."""

    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer; nothing comes after it. `spoken` and `policy` override what the delegation asks for."""

    text: str
    spoken: bool | None = None
    policy: Policy | None = None


Event = Progress | ToolCall | Result


class BackgroundModel(ABC):
    """A slow reasoner. Shared by all sessions; `run` is called once a delegation, many at a time, in a thread of its
    own (`worker.py`): what it does there cannot hold up a tick or the gateway.

    Attributes:
        preempted: says whether this machine is needed for ticks now; `Background` sets it. Who computes on this machine
            pauses meanwhile.
    """

    preempted: Callable[[], bool] = staticmethod(lambda: False)

    @abstractmethod
    def run(self, delegation: Delegation, context: Context) -> AsyncIterator[Event]:
        """Yields progress and tool calls, then one `Result`. Cancelled at the timeout, when the session closes and when
        the delegation is superseded; an exception is a failed delegation."""

    async def close(self) -> None:  # noqa: B027  most models have nothing to close
        """The server stops: connections and processes end."""
