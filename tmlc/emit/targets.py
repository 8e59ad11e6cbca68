"""What the compiler asks of a target: which ops it runs, and the engine it makes of a program.

Targets are named `family` or `family:argument` ("cpu", "tensorrt:sm89"). The room of a family is imported only when
the family is asked for, so that nobody needs the tool chain of a target that they do not use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from tmlc.errors import TargetError, UsageError
from tmlc.ir.program import Program
from tmlc.ir.weights import TensorSource
from tmlc.package.manifest import MethodInfo, StateInfo
from tmlc.package.safetensors_io import TensorEntry, WeightItem, layout

FAMILIES = {
    "cpu": "tmlc.emit.cpu_target",
    "onnx": "tmlc.emit.onnx.target",
    "tensorrt": "tmlc.emit.tensorrt.target",
    "triton": "tmlc.emit.triton.target",
}
"""Rooms with a `TARGET: type[Target]`, by family."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Coverage:
    """How often a method calls an op, and the kernel that runs it (None: the target cannot, for the reason given).

    `source` says where in the model the first of these calls comes from, `fix` what to do about a refusal.
    """

    method: str
    op: str
    count: int
    kernel: str | None
    reason: str = ""
    source: str = ""
    fix: str = ""


class StoredWeight(Protocol):
    """A tensor of the package: which weight of the program it comes from, and its stored form.

    `dtype`, `rows` and `cols` are the stored ones. With `scheme`, `pieces` gets the float weight that the codes of
    this scheme are made of, otherwise the weight itself, in the shape that the program gives it.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    def pieces(self, tensor: torch.Tensor) -> Iterator[np.ndarray]: ...


@dataclass
class Emitted:
    """An engine, as it goes into a package.

    Attributes:
        plan: the member of the package that a runtime opens first.
        layout: name of the form of the weights.
        files: members by name: JSON (anything but bytes), or bytes.
        weights: the tensors of `weights.safetensors`, in order.
        methods, states, slot_bytes: as they stand in the manifest.
        arena_bytes, scratch_bytes: memory that an engine needs beside weights and slots.
        features: what a reader must know to use the engine (the manifest's `required_features`).
        producer: versions of the tools that took part.
        notes: what whoever compiles should know.
    """

    plan: str
    layout: str
    files: dict[str, Any]
    weights: Sequence[StoredWeight]
    methods: tuple[MethodInfo, ...]
    states: tuple[StateInfo, ...]
    slot_bytes: int
    arena_bytes: int
    scratch_bytes: int
    features: tuple[str, ...]
    producer: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def weight_entries(weights: Sequence[StoredWeight]) -> tuple[dict[str, TensorEntry], int]:
    """Where each weight will lie in the package, and the bytes of all."""
    items = [WeightItem(w.name, w.dtype, (w.rows, w.cols), lambda: b"") for w in weights]
    _, entries, total = layout(items)
    return entries, total


class Target(ABC):
    """One target of the compiler.

    Args:
        name: as the user wrote it, and as it stands in the manifest.

    Attributes:
        family: the part of the name before the colon; the preset of that name is the target's pipeline.
        precisions, caches: what weights, and keys and values, can be.
    """

    family: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8", "int4")
    caches: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")

    def __init__(self, name: str) -> None:
        self.name = name

    def tune(self, file: Path) -> None:
        """Takes block sizes of kernels from a file that `tmlc tune` wrote.

        Raises:
            UsageError: the target has no block sizes to choose.
            EmitError: the file is no such table.
        """
        what = f"target {self.name} has no block sizes to choose"
        raise UsageError(what, where="--tuning", fix="Leave --tuning out, or compile for triton.")

    @abstractmethod
    def coverage(self, program: Program) -> list[Coverage]:
        """Which kernels a program would run on, and which of its ops have none, by method and op."""

    @abstractmethod
    def emit(self, program: Program, source: TensorSource, tell: Progress) -> Emitted:
        """Lowers a program that the target's pipeline made ready.

        Args:
            program: what to lower.
            source: the checkpoint's tensors, for targets whose engines hold weights.
            tell: gets (stage, done, total) where this takes long.

        Raises:
            EmitError: an op or an operand that the target cannot run; names the method, the op and its source.
            TargetError: a tool of the target is not installed.
        """


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: there is none, or its tools are not installed.
    """
    family = name.partition(":")[0]
    if family not in FAMILIES:
        raise TargetError(f"unknown target {name!r}", where="--target", fix=f"Use one of: {', '.join(FAMILIES)}.")
    made: Target = import_module(FAMILIES[family]).TARGET(name)
    return made


def check_choice(target: Target, precision: str | None, kv: str | None, known: Sequence[str]) -> None:
    """Raises UsageError for a precision, or a form of keys and values, that the target has not."""
    if precision is not None and precision not in target.precisions:
        other = precision in known
        what = f"target {target.name} has no precision {precision}" if other else f"unknown precision {precision!r}"
        raise UsageError(what, where="--precision", fix=f"Use one of: {', '.join(target.precisions)}.")
    if kv is not None and kv not in target.caches:
        raise UsageError(f"unknown kv {kv!r}", where="--kv", fix=f"Use one of: {', '.join(target.caches)}.")
