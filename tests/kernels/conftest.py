"""Builds small plans by hand: the tests of the kernels speak words of docs/plan-format.md and nothing else of tmlc."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tmlc.kernels.cpu import MAGIC, VERSION, Library, Plan, Pool, available_isas, load_library

sys.path.insert(0, str(Path(__file__).parent))  # kernel_cases.py and replay.py, which several tests share

SPACES = dict(arena=0, slot=1, weight=2, input=3, output=4)
DTYPES = dict(f32=0, bf16=1, i32=2, i64=3, u8=4)
SIZES = dict(f32=4, bf16=2, i32=4, i64=8, u8=1)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(u: np.ndarray) -> np.ndarray:
    return (u.astype(np.uint32) << 16).view(np.float32)


def pack(w: np.ndarray, dtype: str) -> np.ndarray:
    """[m, k] float32 → blocks of 16 rows (docs/plan-format.md, "Packed weights") as [blocks, cols]."""
    m, k = w.shape
    blocks, k2 = -(-m // 16), k + k % 2 if dtype == "bf16" else k
    padded = np.zeros((blocks * 16, k2), np.float32)
    padded[:m, :k] = w
    if dtype == "f32":
        return np.ascontiguousarray(padded.reshape(blocks, 16, k2).transpose(0, 2, 1)).reshape(blocks, k2 * 16)
    pairs = to_bf16(padded).reshape(blocks, 16, k2 // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(pairs).reshape(blocks, k2 * 16)


def in_turn(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The blocks of an expert's gate and up matrices as `moe` reads them: gate 0, up 0, gate 1, …"""
    return np.stack([gate, up], 1).reshape(2 * len(gate), -1)


def as_stored(w: np.ndarray, dtype: str) -> np.ndarray:
    """What a weight is after rounding to its stored dtype, as float32."""
    return from_bf16(to_bf16(w)) if dtype == "bf16" else w.astype(np.float32)


def quantised(rng, m, k, scheme):
    """Random codes of a matrix as (what they stand for [m, k] float64, packed uint8 [blocks, bytes])."""
    group = 64 if scheme == "i4g64" else 32
    groups, blocks = -(-k // group), -(-m // 16)
    scales = (rng.random((blocks * 16, groups)) * 0.02 + 1e-3).astype(np.float16)
    scales[m:] = 0
    if scheme == "i8g32":
        codes = rng.integers(0, 256, (blocks * 16, groups, group), np.uint8)
        below = np.full((blocks * 16, groups), 128.0)
    else:
        codes = rng.integers(0, 16, (blocks * 16, groups, group), np.uint8)
        zeros = rng.integers(0, 256, (blocks * 16, groups), np.uint8)
        below = zeros / 16
    wide = (codes.astype(np.float64) - below[..., None]) * scales.astype(np.float64)[..., None]
    packed = []
    for b in range(blocks):
        rows = slice(16 * b, 16 * b + 16)
        for begin in range(0, groups, 4):
            run = range(begin, min(begin + 4, groups))
            for g in run:
                quads = codes[rows, g].reshape(16, group // 4, 4).transpose(1, 0, 2)  # [quad][row][input]
                if scheme == "i8g32":
                    packed += [quads.tobytes()]
                else:
                    for half in range(group // 32):
                        eight = quads[8 * half : 8 * half + 8]
                        packed += [(eight[:4] | eight[4:] << 4).tobytes()]
            packed += [scales[rows, g].tobytes() for g in run]
            if scheme != "i8g32":
                packed += [zeros[rows, g].tobytes() for g in run]
    return wide.reshape(blocks * 16, -1)[:m, :k], np.frombuffer(b"".join(packed), np.uint8).reshape(blocks, -1)


@dataclass
class Builder:
    """A plan under construction; tensor numbers are what its methods return and take."""

    max_n: int = 64
    tensors: list[list[int]] = field(default_factory=list)
    methods: list[tuple] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    arena_bytes: int = 0
    slot_bytes: int = 0

    def tensor(self, space: str, dtype: str, rows: tuple[int, int], cols: int, offset: int = 0, stride: int = 0) -> int:
        self.tensors.append([SPACES[space], DTYPES[dtype], offset, *rows, cols, stride or cols])
        return len(self.tensors) - 1

    def arena(self, dtype: str, rows: tuple[int, int], cols: int) -> int:
        at = self.arena_bytes
        size = (rows[0] * self.max_n + rows[1]) * cols * SIZES[dtype]
        self.arena_bytes = -(-(at + size) // 64) * 64
        return self.tensor("arena", dtype, rows, cols, at)

    def slot(self, dtype: str, rows: int, cols: int) -> int:
        at = self.slot_bytes
        self.slot_bytes = -(-(at + rows * cols * SIZES[dtype]) // 64) * 64
        return self.tensor("slot", dtype, (0, rows), cols, at)

    def weight(self, array: np.ndarray) -> int:
        """float32 as f32, uint16 as bf16, uint8 as bytes."""
        array = np.atleast_2d(array)
        self.weights += bytes(-len(self.weights) % 64)
        at = len(self.weights)
        self.weights += np.ascontiguousarray(array).tobytes()
        dtype = {"uint16": "bf16", "uint8": "u8"}.get(array.dtype.name, "f32")
        return self.tensor("weight", dtype, (0, array.shape[0]), array.shape[1], at)

    def input(self, index: int, dtype: str, cols: int, rows: tuple[int, int] = (1, 0)) -> int:
        return self.tensor("input", dtype, rows, cols, index)

    def output(self, index: int, dtype: str, cols: int, rows: tuple[int, int] = (1, 0)) -> int:
        return self.tensor("output", dtype, rows, cols, index)

    def method(self, inputs: Sequence[int], outputs: Sequence[int], code: Sequence[tuple]) -> None:
        """code: (op, tensors, ints, floats); ints and floats may be left out."""
        self.methods.append((list(inputs), list(outputs), list(code)))

    def words(self, library: Library) -> np.ndarray:
        out = [MAGIC, VERSION, self.arena_bytes, self.slot_bytes, len(self.tensors), len(self.methods)]
        for t in self.tensors:
            out += t
        for inputs, outputs, code in self.methods:
            out += [self.max_n, len(inputs), len(outputs), len(code), *inputs, *outputs]
            for op, t, *rest in code:
                i = list(rest[0]) if rest else []
                f = list(rest[1]) if len(rest) > 1 else []
                opcode = library.ops[op] if isinstance(op, str) else op
                out += [opcode, len(t), len(i), len(f), *t, *i]
                out += [struct.unpack("<q", struct.pack("<d", x))[0] for x in f]
        return np.array(out, np.int64)

    def weight_array(self) -> np.ndarray:
        raw = np.zeros(len(self.weights) + 64, np.uint8)
        start = -raw.ctypes.data % 64
        raw[start : start + len(self.weights)] = np.frombuffer(bytes(self.weights), np.uint8)
        return raw[start : start + len(self.weights)]

    def build(self, library: Library, threads: int = 1) -> Plan:
        return Plan(library, self.words(library), self.weight_array(), threads)


@dataclass
class Bench:
    """One instruction-set variant, and what a test needs to use it."""

    library: Library
    Builder = Builder
    pack = staticmethod(pack)
    as_stored = staticmethod(as_stored)
    in_turn = staticmethod(in_turn)
    to_bf16 = staticmethod(to_bf16)
    from_bf16 = staticmethod(from_bf16)
    quantised = staticmethod(quantised)
    _pools: dict[int, Pool] = field(default_factory=dict)

    def pool(self, threads: int) -> Pool | None:
        if threads == 1:
            return None
        if threads not in self._pools:
            self._pools[threads] = Pool(self.library, threads)
        return self._pools[threads]

    def op(
        self,
        name: str,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray] = (),
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
        out: Sequence[tuple[str, int]] = (("f32", 0),),
        threads: int = 1,
        split: Sequence[int] | None = None,
        strided: bool = False,
    ) -> list[np.ndarray]:
        """Runs one stateless operation: operands are outputs, inputs (n rows each), weights (fixed).

        Args:
            out: dtype and columns of each output; columns 0 means those of the first input.
            split: row counts of several calls that together make the whole.
            strided: operands live inside wider rows of the arena, with poison around them.
        """
        n = inputs[0].shape[0]
        b = Builder(max_n=max(split or [n]))
        kinds = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", np.dtype(np.int64): "i64"}
        ins = [b.input(k, kinds[x.dtype], x.shape[1]) for k, x in enumerate(inputs)]
        outs = [b.output(k, d, c or inputs[0].shape[1]) for k, (d, c) in enumerate(out)]
        fixed = [b.weight(w) for w in weights]
        code = []
        t_in, t_out = ins, outs
        if strided:
            t_in, t_out = [self._wide(b, t) for t in ins], [self._wide(b, t) for t in outs]
            code += [("copy", [w, t]) for w, t in zip(t_in, ins, strict=True)]
        code.append((name, [*t_out, *t_in, *fixed], ints, floats))
        if strided:
            code += [("copy", [t, w]) for w, t in zip(t_out, outs, strict=True)]
        b.method(ins, outs, code)
        plan = b.build(self.library, threads)
        slot = np.zeros(0, np.uint8)
        dtypes = dict(f32=np.float32, i32=np.int32)
        results = [np.full((n, c or inputs[0].shape[1]), -77, dtypes[d]) for d, c in out]
        start = 0
        for count in split or [n]:
            rows = slice(start, start + count)
            plan.run(
                self.pool(threads),
                0,
                count,
                slot,
                [np.ascontiguousarray(x[rows]) for x in inputs],
                [r[rows] for r in results],
            )
            start += count
        return results

    @staticmethod
    def _wide(b: Builder, t: int) -> int:
        _, dtype, _, rows_a, rows_b, cols, _ = b.tensors[t]
        names = {v: k for k, v in DTYPES.items()}
        whole = b.arena(names[dtype], (rows_a, rows_b), cols + 7)
        offset = b.tensors[whole][2] + 3 * SIZES[names[dtype]]
        return b.tensor("arena", names[dtype], (rows_a, rows_b), cols, offset, cols + 7)


_BENCHES = {isa: Bench(load_library(isa)) for isa in available_isas()}


@pytest.fixture(params=list(_BENCHES))
def bench(request: pytest.FixtureRequest) -> Bench:
    """Every instruction-set variant that this machine can run, one after another."""
    return _BENCHES[request.param]


@pytest.fixture
def best() -> Bench:
    """The best variant only, for tests of the executor."""
    return next(iter(_BENCHES.values()))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
