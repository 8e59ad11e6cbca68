"""Tensor memory of Blackwell (sm_100): 128 lanes of 32-bit columns beside each program's registers, where products of
tensor cores keep their sums; and the barriers in shared memory at which such a product says that it is done.

A product runs by itself once a thread has begun it. Until somebody has waited at its barrier its sums may not be read,
nor its operands in shared memory be written. What a thread loads or stores here is over for others when the thread has
waited for it and a barrier of the program is behind that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.kernels.triton.ptx.arithmetic import bf16_values
from tmlc.kernels.triton.ptx.memory import Fault, Shared
from tmlc.kernels.triton.ptx.tensor import described
from tmlc.kernels.triton.ptx.text import unknown

Array = npt.NDArray[Any]
LANES, SIZES = 128, (32, 64, 128, 256, 512)
#: Column at which what a program is given begins: not 0, so that a kernel has to use the address that it gets.
FIRST_COLUMN = 64
#: Bits of an instruction descriptor: float32 sums of products of bf16, dense, nothing negated; then what may differ.
_PLAIN, _TURNED_A, _TURNED_B = 1 << 4 | 1 << 7 | 1 << 10, 1 << 15, 1 << 16


@dataclass
class _Product:
    """A product on its way: who began it, which words of tensor memory it writes and reads, which of shared memory it
    reads."""

    lane: int
    written: Array
    read: Array
    read_shared: Array
    barrier: "_Barrier | None" = None


@dataclass
class _Barrier:
    """A barrier of arrivals: its phase, and how many arrivals end one."""

    wanted: int
    arrived: int = 0
    phase: int = 0


class TensorMemory:
    """Tensor memory of some programs.

    Args:
        programs: how many.
        shared: their shared memory, whose threads these are.
    """

    def __init__(self, programs: int, shared: Shared) -> None:
        self.programs, self.shared = programs, shared
        self.columns = 0  # of each program that has some
        self.held = np.zeros(programs, bool)
        self.closed = np.zeros(programs, bool)
        self._cells: Shared | None = None
        self._loads: list[tuple[Array, Array]] = []  # (threads, words) that are read and not waited for
        self._stores: list[tuple[Array, Array]] = []
        self._products: list[_Product] = []
        self._barriers: dict[tuple[int, int], _Barrier] = {}

    # What a program has.

    def allocate(self, lanes: Array, columns: int) -> Array:
        """Columns for the program of each warp; the address that each thread gets."""
        if columns not in SIZES or (self.columns and columns != self.columns):
            raise unknown("allocation", f"{columns} columns of tensor memory, after {self.columns}")
        owners = self.shared.program[lanes[::32]]
        if len(np.unique(owners)) != len(owners) or self.held[owners].any():
            raise unknown("allocation", "a program asks for tensor memory twice")
        if self.closed[owners].any():
            raise Fault("a program asks for tensor memory after it said that it would not")
        if self._cells is None:
            self.columns = columns
            size = LANES * columns * 4
            self._cells = Shared(self.programs, size, self.shared.program, self.shared.warp, 4, "tensor memory")
            self._cells.epoch = self.shared.epoch  # a barrier orders both
        self.held[owners] = True
        return np.full(len(lanes), FIRST_COLUMN, np.uint32)

    def close(self, lanes: Array) -> None:
        """The programs of these threads ask for nothing more."""
        self.closed[self.shared.program[lanes]] = True

    def free(self, lanes: Array, addresses: Array, columns: int) -> None:
        owners = self.shared.program[lanes]
        if (addresses != FIRST_COLUMN).any() or columns != self.columns or not self.held[owners].all():
            raise Fault(f"gives back {columns} columns of tensor memory that it does not have")
        begun = [np.array([one.lane for one in self._products], np.int64)]
        begun += [threads for threads, _ in (*self._loads, *self._stores)]
        if np.isin(self.shared.program[np.concatenate(begun)], owners).any():
            raise Fault("gives tensor memory back that something is still under way to or from")
        self.held[owners] = False

    def end(self) -> None:
        """Every program has ended."""
        if self.held.any():
            raise Fault("a program ends and keeps tensor memory, for which the next one waits for ever")
        if self._products:
            raise Fault("a program ends, and a product is still on its way")

    @property
    def cells(self) -> Shared:
        if self._cells is None:
            raise Fault("tensor memory is used, and none was asked for")
        return self._cells

    # Threads move words.

    def _place(self, lanes: Array, addresses: Array, shape: str, split: int) -> tuple[Array, int]:
        """Byte of the first register of each thread; a warp reaches the quarter of the lanes that has its number."""
        first, column = addresses.astype(np.int64) >> 16, (addresses.astype(np.int64) & 0xFFFF) - FIRST_COLUMN
        thread = lanes % 32
        if shape == "32x32b":
            rows, ok = first + thread, first % 32 == 0
        elif shape == "16x32bx2":  # the upper half of a warp is in the same lanes, `split` columns further
            rows, ok = first + thread % 16, first % 16 == 0
            column = column + thread // 16 * split
        else:
            raise unknown("shape of tensor memory", shape)
        if not (ok & (rows // 32 == self.shared.warp[lanes] % 4)).all():
            raise Fault("a warp moves lanes of tensor memory that are of another one")
        if not self.held[self.shared.program[lanes]].all() or (column < 0).any():
            raise Fault("moves columns of tensor memory that the program does not have")
        return (rows * self.columns + column) * 4, int(np.max(column))

    def _words(self, lanes: Array, at: Array, count: int) -> Array:
        flat = at + self.shared.program[lanes] * self.cells.size
        return (flat[:, None] + 4 * np.arange(count)) // 4

    def load(self, lanes: Array, addresses: Array, count: int, shape: str, split: int) -> list[Array]:
        """`count` columns behind each other of each thread's lane."""
        at, last = self._place(lanes, addresses, shape, split)
        if last + count > self.columns:
            raise Fault("moves columns of tensor memory that the program does not have")
        found = [self.cells.load(lanes, at + 4 * number, 4, 1)[0] for number in range(count)]
        words = self._words(lanes, at, count)
        self.cells.hold(reading=words)
        self._loads.append((lanes, words))
        return found

    def store(self, lanes: Array, addresses: Array, values: list[Array], shape: str, split: int) -> None:
        """What `load` takes back."""
        at, last = self._place(lanes, addresses, shape, split)
        if last + len(values) > self.columns:
            raise Fault("moves columns of tensor memory that the program does not have")
        for number, value in enumerate(values):
            self.cells.store(lanes, at + 4 * number, [value], 4)
        words = self._words(lanes, at, len(values))
        self.cells.hold(writing=words)
        self._stores.append((lanes, words))

    def wait(self, lanes: Array, loads: bool) -> None:
        """What these threads have begun to load, or to store, is over."""
        left, waiting = [], np.isin(np.arange(len(self.shared.program)), lanes)
        for threads, words in self._loads if loads else self._stores:
            over = waiting[threads]
            by = np.repeat(threads[over], words.shape[1])
            done = words[over].reshape(-1)
            self.cells.release(by, **{"reading" if loads else "writing": done})
            if not over.all():
                left.append((threads[~over], words[~over]))
        if loads:
            self._loads = left
        else:
            self._stores = left

    # Products.

    def multiply(
        self, lanes: Array, target: Array, left: Array, right: Array, sizes: Array, adding: Array, inside: bool
    ) -> None:
        """tcgen05.mma of bf16, begun by one thread of each of some programs: D = A·B, where `adding` + D.

        Args:
            left: descriptors of A (int64); where it is `inside` tensor memory, its addresses.
            right: descriptors of B.
            sizes: instruction descriptors; the same for all.
        """
        kinds = np.unique(sizes)
        word = int(kinds[0])
        rows, cols = (word >> 24 & 31) * 16, (word >> 17 & 63) * 8
        plain = word & ~(_TURNED_A | _TURNED_B | 31 << 24 | 63 << 17)
        turned_a, turned_b = bool(word & _TURNED_A), bool(word & _TURNED_B)
        if len(kinds) > 1 or plain != _PLAIN or rows not in (64, 128) or not cols or (inside and turned_a):
            raise unknown("product", f"instruction descriptors {kinds[:4]}")
        readers, nothing = lanes[:, None], np.zeros((len(lanes), 0), np.int64)
        view = self.cells.memory.view(np.uint32)
        if inside:  # two numbers a word
            read, read_a = self._rectangle(lanes, left, rows, 8), nothing
            self.cells.check(np.broadcast_to(lanes[:, None, None], read.shape), read, writing=False)
            a = bf16_values(view[read].view(np.uint16)).astype(np.float64)
        else:
            read = nothing
            a, read_a = described(self.shared, readers, left, rows, turned_a, 1)
        b, read_b = described(self.shared, readers, right, cols, turned_b, 1)
        words = self._rectangle(lanes, target, rows, cols)
        before = np.concatenate([one.written for one in self._products] or [np.zeros(0, np.int64)])
        new = ~np.isin(words, before)  # products begun one after the other end so
        self.cells.check(np.broadcast_to(lanes[:, None, None], words.shape)[new], words[new])
        held = view[words].view(np.float32).astype(np.float64)
        sums = np.einsum("gik,gnk->gin", a, b, optimize=False) + np.where(adding[:, None, None], held, 0.0)
        view[words] = sums.astype(np.float32).view(np.uint32)
        self.cells.hold(writing=words, reading=read)
        for number, thread in enumerate(lanes):
            shared = np.concatenate([read_a[number].reshape(-1), read_b[number].reshape(-1)])
            self.shared.hold(reading=shared)
            self._products.append(
                _Product(int(thread), words[number].reshape(-1), read[number].reshape(-1), shared)
            )  # fmt: skip

    def _rectangle(self, lanes: Array, addresses: Array, rows: int, cols: int) -> Array:
        """Words [programs, rows, cols] of a product's operand; 64 rows are 16 lanes of each quarter."""
        lane, column = addresses.astype(np.int64) >> 16, (addresses.astype(np.int64) & 0xFFFF) - FIRST_COLUMN
        row = np.arange(rows)
        if rows == 64:
            row = row // 16 * 32 + row % 16
        owners = self.shared.program[lanes]
        if (lane % 16).any() or (lane > (16 if rows == 64 else 0)).any():
            raise Fault("a product of lanes of tensor memory that it cannot reach")
        if (column < 0).any() or (column + cols > self.columns).any() or not self.held[owners].all():
            raise Fault("a product of columns of tensor memory that the program does not have")
        words = (lane[:, None, None] + row[None, :, None]) * self.columns + column[:, None, None] + np.arange(cols)
        return words + (owners * (self.cells.size // 4))[:, None, None]

    def commit(self, lanes: Array, addresses: Array) -> None:
        """A barrier that hears of the end of all that each of these threads has begun."""
        for thread, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            barrier = self._barrier(thread, address)
            for product in self._products:
                if product.lane == thread and product.barrier is None:
                    product.barrier = barrier
            barrier.arrived += 1

    def _barrier(self, lane: int, address: int) -> _Barrier:
        found = self._barriers.get((int(self.shared.program[lane]), address))
        if found is None:
            raise Fault(f"shared memory at {address} is no barrier")
        return found

    def begin(self, lanes: Array, addresses: Array, count: int) -> None:
        """mbarrier.init: 8 bytes of shared memory become a barrier."""
        self.shared.store(lanes, addresses, [np.zeros(len(lanes), np.uint64)], 8)
        for thread, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            self._barriers[int(self.shared.program[thread]), address] = _Barrier(count)

    def destroy(self, lanes: Array, addresses: Array) -> None:
        """mbarrier.inval"""
        self.shared.store(lanes, addresses, [np.zeros(len(lanes), np.uint64)], 8)
        for thread, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            self._barrier(thread, address)
            del self._barriers[int(self.shared.program[thread]), address]

    def passed(self, lanes: Array, addresses: Array, parity: Array) -> Array:
        """mbarrier.try_wait: whether the phase of this parity is over. What was begun ends as soon as somebody waits
        for it."""
        self.shared.load(lanes, addresses, 8, 1)
        result = np.zeros(len(lanes), bool)
        for number, (thread, address) in enumerate(zip(lanes.tolist(), addresses.tolist(), strict=True)):
            barrier = self._barrier(thread, address)
            if barrier.arrived >= barrier.wanted:
                barrier.arrived -= barrier.wanted
                barrier.phase ^= 1
                self._finish(barrier)
            result[number] = barrier.phase != int(parity[number])
        return result

    def _finish(self, barrier: _Barrier) -> None:
        over = [product for product in self._products if product.barrier is barrier]
        self._products = [product for product in self._products if product.barrier is not barrier]
        kept = np.concatenate([one.written for one in self._products] or [np.zeros(0, np.int64)])
        for product in over:
            written = product.written[~np.isin(product.written, kept)]
            self.cells.release(None, writing=written, reading=product.read)
            self.shared.release(None, reading=product.read_shared)
