"""Runs one operation of the CPU library as a plan of its own: tests see kernels as the runtime does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tmlc.kernels import cpu

MAGIC = 0x544D4C43504C414E
SPACES = {"arena": 0, "slot": 1, "weight": 2, "input": 3, "output": 4}
DTYPES = {
    "f32": (0, np.float32),
    "bf16": (1, np.uint16),
    "i32": (2, np.int32),
    "i64": (3, np.int64),
    "u8": (4, np.uint8),
}


@dataclass
class Operand:
    """One row of a plan's tensor table: `a`·n + `b` rows; `data` are the values of a weight."""

    space: str
    dtype: str
    a: int
    b: int
    cols: int
    stride: int = 0
    data: np.ndarray | None = None

    def rows(self, n: int) -> int:
        return self.a * n + self.b


def out(dtype: str, a: int, cols: int, stride: int = 0) -> Operand:
    return Operand("output", dtype, a, 0, cols, stride)


def arg(dtype: str, a: int, cols: int, stride: int = 0) -> Operand:
    return Operand("input", dtype, a, 0, cols, stride)


def weight(data: np.ndarray, dtype: str = "f32") -> Operand:
    data = np.ascontiguousarray(data, DTYPES[dtype][1])
    return Operand("weight", dtype, 0, data.shape[0], data.shape[1], data=data)


def state(cols: int) -> Operand:
    return Operand("slot", "f32", 0, 1, cols)


class OneOp:
    """A plan of one call, its slot, and outputs that are full of garbage before every run."""

    def __init__(
        self,
        library: cpu.Library,
        op: str,
        operands: Sequence[Operand],
        i: Sequence[int],
        f: Sequence[float],
        max_n: int,
        threads: int,
    ) -> None:
        offsets = {"slot": 0, "weight": 0, "input": 0, "output": 0}
        weights, words, ids = bytearray(), [], {"input": [], "output": []}
        for number, t in enumerate(operands):
            code, kind = DTYPES[t.dtype]
            words += [SPACES[t.space], code, offsets[t.space], t.a, t.b, t.cols, t.stride or t.cols]
            size = t.rows(max_n) * (t.stride or t.cols) * np.dtype(kind).itemsize
            if t.data is not None:
                weights += t.data.tobytes() + bytes(-size % 64)
            if t.space in ids:
                ids[t.space].append(number)
            offsets[t.space] += 1 if t.space in ids else size + -size % 64
        head = [MAGIC, 2, 0, offsets["slot"], len(operands), 1]
        method = [max_n, len(ids["input"]), len(ids["output"]), 1, *ids["input"], *ids["output"]]
        call = [library.ops[op], len(operands), len(i), len(f), *range(len(operands)), *i]
        self.words = np.array(head + words + method + call, np.int64)
        self.words = np.concatenate([self.words, np.array(f, np.float64).view(np.int64)])
        store = np.zeros(len(weights) + 128, np.uint8)
        start = -store.ctypes.data % 64
        self.weights = store[start : start + len(weights)]
        self.weights[:] = np.frombuffer(bytes(weights), np.uint8)
        self.plan = cpu.Plan(library, self.words, self.weights, threads)
        self.pool = cpu.Pool(library, threads)
        room = np.zeros(offsets["slot"] + 128, np.uint8)
        start = -room.ctypes.data % 64
        self.slot = room[start : start + offsets["slot"]]
        self.inputs = [t for t in operands if t.space == "input"]
        (self.output,) = [t for t in operands if t.space == "output"]

    def __call__(self, n: int, *inputs: np.ndarray) -> np.ndarray:
        """Runs the call for n positions; returns its output. The gaps of strided rows must stay untouched."""
        padded = []
        for t, x in zip(self.inputs, inputs, strict=True):
            memory = np.full((len(x), t.stride or t.cols), 113, DTYPES[t.dtype][1])
            memory[:, : t.cols] = x
            padded.append(memory)
        t = self.output
        result = np.full((t.rows(n), t.stride or t.cols), 113, DTYPES[t.dtype][1])
        self.plan.run(self.pool, 0, n, self.slot, padded, [result])
        assert (result[:, t.cols :] == 113).all()
        return np.ascontiguousarray(result[:, : t.cols])


@pytest.fixture(params=cpu.available_isas() or [None])
def one_op(request: pytest.FixtureRequest) -> Callable[..., OneOp]:
    """Makes a plan of one call; each test runs on every instruction-set variant that this machine has."""
    library = cpu.load_library(request.param)

    def make(
        op: str,
        *operands: Operand,
        i: Sequence[int] = (),
        f: Sequence[float] = (),
        max_n: int = 64,
        threads: int = 1,
    ) -> OneOp:
        return OneOp(library, op, operands, i, f, max_n, threads)

    return make


@pytest.fixture
def operand() -> object:
    """The constructors of operands, for tests: operand.out, .arg, .weight, .state."""

    class Constructors:
        out, arg, weight, state = (
            staticmethod(out),
            staticmethod(arg),
            staticmethod(weight),
            staticmethod(state),
        )

    return Constructors
