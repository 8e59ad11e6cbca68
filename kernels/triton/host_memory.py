"""Memory of this machine that stands for a GPU's: arrays for launches, and where their pointers lie in it."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.errors import EmitError
from tmlc.kernels.triton.launch import Launch, Pointer

ALIGN = 256
#: Memory that no one has allocated stays a hole in the file and takes no bytes.
DEFAULT_BYTES = 1 << 34

Buffers = Mapping[tuple[str, str], npt.NDArray[Any]]


class HostMemory:
    """Up to `nbytes` of memory, which a child process can share.

    Attributes:
        sm: the architecture that launches should be made for, where nobody says otherwise.
    """

    sm = 90

    def __init__(self, nbytes: int = DEFAULT_BYTES) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the memory is used)
        os.ftruncate(self._file.fileno(), nbytes)
        self._map = mmap.mmap(self._file.fileno(), nbytes)
        self._base = np.frombuffer(self._map, np.uint8)
        self._used = 0

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """Zeroed bytes at a multiple of 256. They are given back when the memory is closed."""
        start = self._used
        self._used = -(-(start + count) // ALIGN) * ALIGN
        if self._used > self._base.size:
            what = f"{self._used} bytes do not fit into the {self._base.size} of this memory"
            raise EmitError(what, where="host memory", fix="make it with more `nbytes`, or `release` what nobody needs")
        return self._base[start : start + count]

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A zeroed array."""
        kind = np.dtype(dtype)
        return self.bytes(int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)

    def put(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy."""
        copy = self.array(values.shape, values.dtype)
        copy[...] = values
        return copy

    def mark(self) -> int:
        """How much is allocated; `release` goes back to it."""
        return self._used

    def release(self, mark: int) -> None:
        """Gives back, zeroed, everything that was allocated since."""
        self._base[mark : self._used] = 0
        self._used = mark

    def places(self, launch: Launch, buffers: Buffers) -> tuple[list[int | float], list[tuple[int, int]]]:
        """The arguments of a launch, pointers as offsets into this memory, and what the launch may touch: (first,
        behind the last) offset of each piece.

        Args:
            buffers: arrays of this memory by (space, name), name "" but for weights, inputs and outputs. ("state", "")
                is the pool of slots; ("slots", "") and ("counts", "") are int64 and int32 arrays.

        Raises:
            EmitError: the launch names a buffer that is not there or too small.
        """
        args: list[int | float] = []
        ranges: list[tuple[int, int]] = []
        for arg in launch.args:
            if isinstance(arg, Pointer):
                start, size = self._place(launch, arg, buffers)
                args.append(start + arg.offset)
                bases = [int(slot) for slot in buffers["slots", ""]] if arg.space == "state" else [0]
                for at in bases:
                    if at + arg.offset + arg.nbytes > size:
                        what = f"{launch.kernel}: {arg} ends behind the {size} bytes of its buffer"
                        fix = "give a larger buffer, or correct the pointer where the op is lowered"
                        raise EmitError(what, where="host memory", fix=fix)
                    ranges.append((start + at + arg.offset, start + at + arg.offset + arg.nbytes))
            else:
                args.append(arg)
        return args, ranges

    def _place(self, launch: Launch, arg: Pointer, buffers: Buffers) -> tuple[int, int]:
        key = (arg.space, arg.name)
        if key not in buffers:
            what = f"{launch.kernel} reads {key}, which is not among the buffers {sorted(buffers)}"
            raise EmitError(what, where="host memory", fix=f"give an array of this memory under {key}")
        array = buffers[key]
        start = array.__array_interface__["data"][0] - self._base.__array_interface__["data"][0]
        if not 0 <= start <= self._used or not array.flags.c_contiguous:
            raise EmitError(f"the buffer {key} is not in this memory", fix="allocate it with `array` or `put`")
        return start, array.nbytes

    def close(self) -> None:
        """Arrays stay readable."""
        self._file.close()
