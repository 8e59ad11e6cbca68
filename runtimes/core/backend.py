"""What the runtime asks of a target: run one method of the program over the slots of a few sessions.

The tick driver, sessions and snapshots know nothing else about a target, so a CPU plan, a CUDA graph or
an ONNX session can stand behind the same engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tmlc.errors import CapacityError, InputError, PackageError, UsageError
from tmlc.runtimes.core.chains import Chains
from tmlc.runtimes.core.kernels import KernelTimer
from tmlc.runtimes.core.slots import HostSlots, Slot, SlotMemory

DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "u8": np.dtype(np.uint8),
}
"""Plan dtypes and what holds them in numpy (bfloat16 as its bits)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One argument of a method: `a·n + b` rows of `cols` elements, dense, for a call with n new positions."""

    dtype: str
    a: int
    b: int
    cols: int

    def rows(self, n: int) -> int:
        return self.a * n + self.b

    def allocate(self, n: int) -> np.ndarray:
        """A zeroed array of the shape this argument has in a call with n positions."""
        return np.zeros((self.rows(n), self.cols), DTYPES[self.dtype])

    def __str__(self) -> str:
        rows = [f"{self.a}n".removeprefix("1")] * (self.a > 0) + [str(self.b)] * (self.b > 0 or self.a == 0)
        return f"{self.dtype}[{'+'.join(rows)},{self.cols}]"


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """The signature of one method, and the most positions (`max_n`) that one call may bring."""

    name: str
    max_n: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"

    def require(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raises PackageError when the method is not the one that the runtime would call."""
        wanted = MethodSpec(self.name, self.max_n, tuple(inputs), tuple(outputs))
        if self != wanted:
            raise PackageError(
                f"method {self} does not have the form that this runtime calls: {wanted}",
                fix="compile the checkpoint again with this version of tmlc",
            )


class Backend(ABC):
    """One loaded target. Not thread-safe: the engine lets one thread in at a time.

    Attributes:
        target: the name of the target, as in the package ("cpu").
        methods: signatures by name.
        slot_bytes: bytes of session state that every call reads and writes.
        isa, threads: the variant of the kernels and the number of threads, for reports.
        cores: the core of each thread where they are pinned; the first is meant for whoever calls.
        unbatched: why a call takes one session only; empty when it takes several.
        chains: parts of a tick that the target runs at once; None: it runs methods only.
    """

    target: str
    methods: Mapping[str, MethodSpec]
    slot_bytes: int
    isa: str
    threads: int
    cores: tuple[int, ...] | None = None
    unbatched: str = ""
    chains: Chains | None = None

    def slots(self, count: int) -> SlotMemory:
        """Reserves the states of `count` sessions, where `call` reads and writes them: host memory, unless the target
        keeps them elsewhere. Asked for once for an engine; freed with the backend.

        Raises UsageError for a count that no engine has, CapacityError when there is not the memory.
        """
        return HostSlots(count, self.slot_bytes)

    @abstractmethod
    def call(
        self, method: str, parts: Sequence[tuple[int, Slot]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        """Runs `method` for one session or several, each of which gets the bits that it would get alone.

        `parts` holds, for each session, its number of new positions and its slot (a handle of `slots`; in host memory
        uint8[slot_bytes], 64-byte aligned), none twice. `inputs` are dense arrays of exactly its shapes for all
        positions together, the rows of the first session first, and so are the answers: views of buffers that the
        backend owns, valid until the next call of the same method. Nothing is allocated but the views.

        Raises ContextFullError when a session's bounded context is used up, KernelError when a slot is damaged
        or a kernel met an index out of range. With `error.part` set, the call was refused for that session and
        changed none of them; without it, the content of all these slots is undefined.
        """

    def kernel_timer(self) -> KernelTimer:
        """Times single kernel calls; off until it is started.

        Raises UsageError, with the reason, where the target cannot.
        """
        raise UsageError(
            "this target has no times of single kernel calls",
            where=f"target {self.target}",
            fix="take the times of whole methods (TickOutput.timings), or load the target cpu",
        )

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes that the target holds besides the slots: at least "weights", "arena" and "scratch"."""

    @abstractmethod
    def close(self) -> None:
        """Frees the target; no call may follow."""


def no_outputs(of: str) -> CapacityError:
    """The error of output buffers that cannot be reserved."""
    return CapacityError(
        f"cannot reserve the output buffers of the {of}",
        fix="free memory of this machine, or compile with a smaller --max-append",
    )


def check_inputs(method: MethodSpec, n: int, inputs: Sequence[np.ndarray]) -> None:
    """Raises InputError unless `inputs` are what `method` takes in a call with n positions."""
    if not 1 <= n <= method.max_n:
        raise _refused(method, f"{method.name} takes 1 to {method.max_n} positions a call, not {n}")
    if len(inputs) != len(method.inputs):
        raise _refused(method, f"{method.name} takes {len(method.inputs)} arguments, not {len(inputs)}")
    for index, (array, spec) in enumerate(zip(inputs, method.inputs, strict=True)):
        shape = (spec.a * n + spec.b, spec.cols)
        if array.shape != shape or array.dtype != DTYPES[spec.dtype] or not array.flags.c_contiguous:
            raise _refused(
                method,
                f"argument {index} of {method.name} must be dense {spec.dtype}{list(shape)}, "
                f"not {array.dtype}{list(array.shape)}",
            )


def _refused(method: MethodSpec, what: str) -> InputError:
    """The error of a call that is not of the form of `method`."""
    return InputError(what, where=f"method {method.name}", fix=f"call {method}, with n from 1 to {method.max_n}")
