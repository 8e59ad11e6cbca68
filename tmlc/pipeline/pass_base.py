"""What a pass is: one rewrite of a Program, its settings, and what it reports.

A pass author writes `run`; the manager (`tmlc.pipeline.manager`) owns the rest: prerequisites, verification,
timing, records, dumps and comparisons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from tmlc.ir.program import Fact, Program
    from tmlc.ir.weights import TensorSource


class PassConfig(BaseModel):
    """Settings of a pass as they stand in a pipeline file; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a match and was not rewritten, and why."""

    method: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.method}/{self.node}: {self.reason}"


@dataclass
class PassResult:
    """What a pass hands back: the rewritten program, how often it matched, what it nearly matched, remarks.

    `provides` are the facts that hold now; None means all that the pass class provides.
    """

    program: Program
    matches: int
    near_misses: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provides: frozenset[Fact] | None = None


@dataclass(frozen=True)
class PassContext:
    """Where a pass stands in its pipeline: step number (from 0), number of steps, a line of progress, and the
    checkpoint's tensors where there are any (a pass may look at values, never keep them)."""

    step: int = 0
    steps: int = 1
    progress: Callable[[str], None] = lambda line: None
    source: TensorSource | None = None


class Pass(ABC):
    """One rewrite of a program. The first line of a subclass's docstring says what it rewrites and what that buys.

    `run` gets a program that it may change freely (the manager keeps the previous one) and returns it. `requires` are
    facts that must hold before, `provides` facts that hold after.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[PassConfig]] = PassConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()

    def __init__(self, config: PassConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def lossy(self) -> bool:
        """True when the pass changes numbers on purpose (it rounds weights): `--check` then measures it more loosely,
        and the passes that follow against this one's outputs."""
        return False

    @property
    def tolerance(self) -> float | None:
        """How far a lossy pass may move outputs under `--check` (root mean square, relative); None: the usual bound."""
        return None

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrites `program` and reports what was done."""
