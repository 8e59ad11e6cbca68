"""Memory of the programs of a launch: global memory inside its operands, and shared memory with its hazards.

Two accesses of different warps to one place in shared memory, of which one writes, need a barrier of the program
between them, whatever the order in which they happen to run here. What an asynchronous copy writes may not be read
before a thread has waited for it, and by other warps not before a barrier behind that. Tensor cores that read by
themselves (the async proxy) see what a thread wrote only after that thread's fence. Tensor memory (tensor_memory.py) is
watched likewise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.kernels.triton.host_memory import ALIGN
from tmlc.kernels.triton.ptx.conflicts import Conflicts

Array = npt.NDArray[Any]
#: Addresses of global memory begin here, so that no small number is one.
BASE = 1 << 40
#: Bytes of global memory of which is known together whether a launch wrote any: no two buffers share some.
CHUNK = ALIGN
_WARPS = 64  # stamps are epoch·64 + warp
_MANY = _WARPS - 1
_ON_ITS_WAY = np.iinfo(np.int32).max
_WHOLE: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What a GPU would answer with an error, or with a result that is wrong now and then."""


def _differ(held: Array, written: Array) -> bool:
    """Whether two threads wrote different numbers to one place. Two NaNs are the same number: a GPU makes only one
    (0x7fffffff), where NumPy keeps those of the operands."""
    other = held != written
    if other.any() and held.dtype == np.uint32:
        other &= ~(np.isnan(held.view(np.float32)) & np.isnan(written.view(np.float32)))
    return bool(other.any())


class Global:
    """Host memory whose first byte has the address BASE.

    Args:
        memory: uint8 array.
        ranges: (first, behind the last) address that may be touched.
        written: bool, for each CHUNK bytes whether a launch wrote there; what this one writes is added.
    """

    def __init__(self, memory: Array, ranges: Sequence[tuple[int, int]], written: Array) -> None:
        self.memory, self.written = memory, written
        merged = sorted(ranges)
        self.starts = np.array([first for first, _ in merged], np.int64)
        self.ends = np.maximum.accumulate(np.array([last for _, last in merged], np.int64))

    def _place(self, addresses: Array, size: int, count: int, what: str) -> Array:
        at = addresses.astype(np.int64)
        if (at % (size * count)).any():
            raise Fault(f"{what} {count} times {size} bytes at {int(at[at % (size * count) != 0][0]):#x}, unaligned")
        place = np.searchsorted(self.starts, at, "right") - 1
        good = (place >= 0) & (at + size * count <= self.ends[np.maximum(place, 0)])
        if not good.all():
            raise Fault(f"{what} {size * count} bytes at {int(at[~good][0]):#x}, outside of the operands")
        return at - BASE

    def load(self, addresses: Array, size: int, count: int, early: bool) -> list[Array]:
        """`count` numbers of `size` bytes behind each other; `early`: before the wait for the launch before."""
        at = self._place(addresses, size, count, "reads")
        if early and self.written[at // CHUNK].any():
            raise Fault("reads what a launch wrote, and has not waited for the launch before")
        view = self.memory[: len(self.memory) // size * size].view(_WHOLE[size])
        return [view[at // size + number] for number in range(count)]

    def store(self, addresses: Array, values: Sequence[Array], size: int, early: bool) -> None:
        at = self._place(addresses, size, len(values), "writes")
        if early:
            raise Fault("writes, and has not waited for the launch before")
        view = self.memory[: len(self.memory) // size * size].view(_WHOLE[size])
        for number, value in enumerate(values):
            view[at // size + number] = value
        self.written[at // CHUNK] = True


@dataclass
class _Copy:
    """16 bytes or fewer on their way for each of some threads, and in which of their groups."""

    lanes: Array
    at: Array
    data: Array
    group: Array


class Shared:
    """Shared memory of some programs, each `size` bytes.

    Args:
        programs, size, lanes: how many programs, bytes of each, threads of all.
        program, warp: of each thread.
        grain: bytes that are watched together: 1 where a kernel has accesses of less than 4.
        name: of the memory, for messages.
        conflicts: counts the turns that accesses of threads take, where that is asked for.
    """

    def __init__(
        self, programs: int, size: int, program: Array, warp: Array, grain: int, name: str = "shared memory",
        conflicts: Conflicts | None = None,
    ) -> None:  # fmt: skip
        self.name, self.conflicts = name, conflicts
        self.size = -(-max(size, 16) // 16) * 16
        self.memory = np.full(programs * self.size, 0xFF, np.uint8)
        self.program, self.warp, self.grain = program, warp, grain
        self.epoch = np.zeros(programs, np.int32)
        self.writer = np.full(programs * self.size // grain, -1, np.int32)
        self.reader = np.full(programs * self.size // grain, -1, np.int32)
        self.unfenced = np.full(programs * self.size // 4, -1, np.int32)  # who wrote a word last, until its fence
        self.copies: list[_Copy] = []
        self.begun = np.zeros(len(program), np.int64)  # groups that a thread has closed

    def _flat(self, lanes: Array, addresses: Array, size: int, count: int) -> Array:
        at = addresses.astype(np.int64)
        if (at % (size * count)).any():
            bad = int(at[at % (size * count) != 0][0])
            raise Fault(f"{self.name} at {bad}: {count} times {size} bytes, unaligned")
        if (at + size * count > self.size).any():
            raise Fault(f"{self.name} at {int(np.max(at))} of {self.size}")
        return at + self.program[lanes] * self.size

    def _stamp(self, lanes: Array) -> Array:
        return self.epoch[self.program[lanes]] * _WARPS + self.warp[lanes].astype(np.int32)

    def _watch_read(self, lanes: Array, flat: Array, nbytes: int) -> None:
        stamp = self._stamp(lanes)
        for byte in range(0, nbytes, self.grain):
            where = (flat + byte) // self.grain
            found = self.writer[where]
            if (found == _ON_ITS_WAY).any():
                raise Fault(f"reads {self.name} that something is on its way to")
            if ((found // _WARPS == stamp // _WARPS) & (found != stamp) & (found >= 0)).any():
                raise Fault(f"reads {self.name} that another warp wrote, with no barrier between")
            before = self.reader[where]
            several = (before // _WARPS == stamp // _WARPS) & (before != stamp)
            now = np.where(several, stamp // _WARPS * _WARPS + _MANY, stamp)
            self.reader[where] = np.where(before == _ON_ITS_WAY, before, now)

    def _watch_write(self, lanes: Array, flat: Array, nbytes: int, pending: bool = False) -> None:
        stamp = self._stamp(lanes)
        for byte in range(0, nbytes, self.grain):
            where = (flat + byte) // self.grain
            for found, what in ((self.writer[where], "wrote"), (self.reader[where], "read")):
                if ((found // _WARPS == stamp // _WARPS) & (found != stamp) & (found >= 0)).any():
                    raise Fault(f"writes {self.name} that another warp {what}, with no barrier between")
            if (self.writer[where] == _ON_ITS_WAY).any():
                raise Fault(f"writes {self.name} that something is on its way to")
            if (self.reader[where] == _ON_ITS_WAY).any():
                raise Fault(f"writes {self.name} that is still being read")
            self.writer[where] = _ON_ITS_WAY if pending else stamp

    def load(self, lanes: Array, addresses: Array, size: int, count: int) -> list[Array]:
        flat = self._flat(lanes, addresses, size, count)
        self._watch_read(lanes, flat, size * count)
        view = self.memory.view(_WHOLE[size])
        return [view[flat // size + number] for number in range(count)]

    def store(self, lanes: Array, addresses: Array, values: Sequence[Array], size: int) -> None:
        flat = self._flat(lanes, addresses, size, len(values))
        self._watch_write(lanes, flat, size * len(values))
        view = self.memory.view(_WHOLE[size])
        for number, value in enumerate(values):
            view[flat // size + number] = value
            for byte in range(0, size, 4):
                self.unfenced[(flat + number * size + byte) // 4] = lanes
        if any(_differ(view[flat // size + number], value) for number, value in enumerate(values)):
            raise Fault(f"two threads write different numbers to one place in {self.name}")

    def turns(self, lanes: Array, addresses: Array, nbytes: int) -> None:
        """An instruction asks for so many bytes at each address."""
        if self.conflicts is not None:
            self.conflicts.count(lanes, addresses, nbytes)

    def rows(self, lanes: Array, addresses: Array) -> Array:
        """16 bytes at each address, as uint16 [threads, 8]: rows of matrices."""
        self.turns(lanes, addresses, 16)
        return np.stack(self.load(lanes, addresses, 4, 4), -1).view(np.uint16)

    def copy(self, lanes: Array, addresses: Array, data: Array) -> None:
        """Begins to copy data (uint8 [threads, bytes]) of an open group."""
        nbytes = data.shape[1]
        self.turns(lanes, addresses, nbytes)
        flat = self._flat(lanes, addresses, nbytes, 1)
        self._watch_write(lanes, flat, nbytes, pending=True)
        self.copies.append(_Copy(lanes, flat, data, self.begun[lanes].copy()))

    def commit(self, lanes: Array) -> None:
        self.begun[lanes] += 1

    def wait(self, lanes: Array, left: int) -> None:
        """Until at most `left` groups of each thread are on their way."""
        waiting = np.zeros(len(self.program), bool)
        waiting[lanes] = True
        kept = []
        for one in self.copies:
            over = waiting[one.lanes] & (one.group < self.begun[one.lanes] - left)
            if over.any():
                nbytes = one.data.shape[1]
                self.memory[one.at[over, None] + np.arange(nbytes)] = one.data[over]
                for word in range(0, nbytes, 4):
                    self.unfenced[(one.at[over] + word) // 4] = one.lanes[over]
                stamp = self._stamp(one.lanes[over])
                for byte in range(0, nbytes, self.grain):
                    self.writer[(one.at[over] + byte) // self.grain] = stamp
            if not over.all():
                rest = ~over
                kept.append(_Copy(one.lanes[rest], one.at[rest], one.data[rest], one.group[rest]))
        self.copies = kept

    def fence(self, lanes: Array) -> None:
        """What these threads have written is seen by tensor cores that read by themselves."""
        fencing = np.zeros(len(self.program) + 1, bool)  # the last stands for nobody
        fencing[lanes] = True
        self.unfenced[fencing[self.unfenced]] = -1

    def fenced(self, words: Array) -> None:
        """Tensor cores read these words of 4 bytes by themselves."""
        if (self.unfenced[words] >= 0).any():
            raise Fault(f"a product reads {self.name} that was written without a fence behind it")

    def check(self, lanes: Array, words: Array, writing: bool = True) -> None:
        """Whether these threads may read these words of 4 bytes, and write them."""
        self._watch_read(lanes, words * 4, 4)
        if writing:
            self._watch_write(lanes, words * 4, 4)

    def hold(self, reading: Array | None = None, writing: Array | None = None) -> None:
        """These words of 4 bytes are read or written by something that goes on by itself."""
        for watched, words in ((self.reader, reading), (self.writer, writing)):
            if words is not None:
                for byte in range(0, 4, self.grain):
                    watched[(words * 4 + byte) // self.grain] = _ON_ITS_WAY

    def release(self, lanes: Array | None, reading: Array | None = None, writing: Array | None = None) -> None:
        """That is over: as if these threads had done it just now; None: for everybody."""
        stamp = -1 if lanes is None else self._stamp(lanes)
        for watched, words in ((self.reader, reading), (self.writer, writing)):
            if words is not None:
                for byte in range(0, 4, self.grain):
                    watched[(words * 4 + byte) // self.grain] = stamp

    def barrier(self, programs: Array) -> None:
        """All threads of these programs have come to a barrier."""
        self.epoch[programs] += 1
