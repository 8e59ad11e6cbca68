"""The threads of a launch's programs: their registers and where they are, the memory that they see."""

from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.kernels.triton.ptx.arithmetic import KINDS
from tmlc.kernels.triton.ptx.conflicts import Conflicts
from tmlc.kernels.triton.ptx.memory import Global, Shared
from tmlc.kernels.triton.ptx.tensor_memory import TensorMemory
from tmlc.kernels.triton.ptx.text import Address, Number, Operand, Program, Register, Special, float_of, unknown

Array = npt.NDArray[Any]
_BANKS: dict[int, npt.DTypeLike] = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Threads:
    """The threads of some programs of a launch: registers, memory, and where each program is in the grid.

    Args:
        program: what they run.
        places: [programs, 3] in the grid.
        grid: its size.
        threads: of a program.
        params: values of the parameters.
        memory: global memory.
        shared_bytes: of a program.
        grain: bytes of shared memory that are watched together.
        overlap: whether the launch before may still run until a program waits for it.
        conflicts: of shared memory, where they are to be counted.
    """

    def __init__(
        self,
        program: Program,
        places: Array,
        grid: tuple[int, int, int],
        threads: int,
        params: dict[str, Any],
        memory: Global,
        shared_bytes: int,
        grain: int,
        overlap: bool,
        conflicts: Conflicts | None,
    ) -> None:
        count = len(places)
        self.lanes = count * threads
        self.all = np.arange(self.lanes)
        self.owner = self.all // threads
        tid = self.all % threads
        self.banks = {
            name: np.zeros((number, self.lanes), _BANKS[width]) for name, (width, number) in program.banks.items()
        }
        self.specials: dict[str, Any] = {"global_smem": 0, "%tid.x": tid, "%ntid.x": threads, "%laneid": tid % 32}
        for axis, letter in enumerate("xyz"):
            self.specials[f"%ctaid.{letter}"] = places[self.owner, axis]
            self.specials[f"%nctaid.{letter}"] = grid[axis]
        self.params, self.memory = params, memory
        self.shared = Shared(count, shared_bytes, self.owner, tid // 32, grain, conflicts=conflicts)
        self.tensor = TensorMemory(count, self.shared)
        self.waited = np.full(self.lanes, not overlap)  # for the launch before

    def read(self, operand: Operand | None, kind: str, at: Array | None) -> Array:
        """The operand of the threads `at` (None: all), as numbers of a PTX type."""
        dtype = np.dtype(KINDS[kind])
        if isinstance(operand, Register):
            row = self.banks[operand.bank][operand.index]
            row = row if at is None else row[at]
            if row.itemsize != dtype.itemsize:
                row = row.astype(f"u{dtype.itemsize}")
            return row.view(dtype)
        if isinstance(operand, Number):
            if dtype.kind == "f":
                return np.array(float_of(operand) if operand.bits else operand.value, dtype)
            if dtype.kind == "b":
                return np.array(operand.value != 0)
            return np.array(operand.value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Special) and operand.name in self.specials:
            value = np.asarray(self.specials[operand.name])
            return (value if at is None or not value.ndim else value[at]).astype(dtype)
        raise unknown("operand", operand)

    def write(self, operand: Operand | None, value: Array, kind: str, at: Array | None) -> None:
        if operand is None:
            return
        if not isinstance(operand, Register):
            raise unknown("result", operand)
        bank = self.banks[operand.bank]
        row, value = bank[operand.index], np.asarray(value, KINDS[kind])
        if row.itemsize != value.itemsize:  # extended as its type says
            value = value.astype(f"i{row.itemsize}" if value.dtype.kind == "i" else f"u{row.itemsize}")
        if at is None:
            row.view(value.dtype)[...] = value
        else:
            row.view(value.dtype)[at] = value

    def those(self, at: Array | None) -> Array:
        """The numbers of the threads `at`."""
        return self.all if at is None else at

    def full(self, value: Array, at: Array | None) -> Array:
        """One number for each thread."""
        return np.broadcast_to(value, (self.lanes if at is None else len(at),))

    def address(self, operand: Operand, at: Array | None) -> Array:
        assert isinstance(operand, Address)
        if isinstance(operand.base, Special):
            return self.full(np.array(self.specials[operand.base.name] + operand.offset, np.int64), at)
        wide = "u64" if self.banks[operand.base.bank].itemsize == 8 else "u32"
        return self.read(operand.base, wide, at).astype(np.int64) + operand.offset
