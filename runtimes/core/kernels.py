"""What a backend tells of its single kernel calls, when somebody asks it to time them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Touched:
    """What all runs of a call touched, as far as only running tells: different experts (of each run), cached positions
    that any row of a run saw, and cached positions that each row saw.
    """

    experts: int = 0
    keys: int = 0
    row_keys: int = 0


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One kernel call of a method, summed up over its timed runs.

    Attributes:
        method, index: where it stands: the method, and its place in what the target runs for it.
        op: the kernel, in the target's own words.
        name: of what it computes, where the target has a name for it; it may tell a layer.
        runs, rows: how often it ran, and with how many positions in all (0 where the target does not count them).
        ns: nanoseconds in all.
        touched: None where the target does not count it.
        nbytes, operations: of all runs, where the target itself knows them (multiply and add count as two).
        weights: names of the weights that it reads, where the target knows them.
    """

    method: str
    index: int
    op: str
    name: str
    runs: int
    rows: int
    ns: float
    touched: Touched | None = None
    nbytes: float | None = None
    operations: float | None = None
    weights: tuple[str, ...] = ()


class KernelTimer(ABC):
    """Times every kernel call of a backend between `start` and `stop`, and nothing at other times.

    The engine must be idle when a method of a timer is called. Its memory is reserved when it is made.
    """

    @abstractmethod
    def start(self) -> None:
        """Times every call from here on."""

    @abstractmethod
    def stop(self, disturbed: bool) -> bool:
        """Times none any more. `disturbed`: the system took a core away since `start`. Returns whether what was timed
        counts: a timer may have no room for more, or take the first time for warming up."""

    @abstractmethod
    def calls(self, disturbed: bool) -> list[KernelCall]:
        """What was timed, in the order of the methods and their calls, with what was disturbed or without; calls that
        never ran are left out. Ends the timer."""
