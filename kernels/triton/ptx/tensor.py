"""Instructions of whole warps: matrices between registers and shared memory, products of tensor cores, exchanges
between threads. Layouts are those of the PTX manual.

A product sums in float64 and rounds once, to float32; how a tensor core rounds inside is not written down anywhere.
What is held: which numbers meet, and in which order instructions follow each other.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.kernels.triton.ptx.arithmetic import bf16_values
from tmlc.kernels.triton.ptx.memory import Fault, Shared

Array = npt.NDArray[Any]
_LANE = np.arange(32)
#: Bits of an address that the swizzles of a descriptor change: (xor from, how many), by its mode.
_SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}


def load_matrices(shared: Shared, lanes: Array, addresses: Array, count: int, transposed: bool) -> list[Array]:
    """ldmatrix: `count` matrices of 8 × 8 of 16 bits; thread t of a warp says where row t % 8 of matrix t // 8 is."""
    per = 8 * count
    asked = addresses.reshape(-1, 32)[:, :per]
    rows = shared.rows(lanes.reshape(-1, 32)[:, :per].reshape(-1), asked.reshape(-1)).reshape(-1, count, 8, 8)
    if transposed:
        rows = rows.transpose(0, 1, 3, 2)
    found = []
    for number in range(count):
        pairs = rows[:, number][:, (_LANE // 4)[:, None], (_LANE % 4 * 2)[:, None] + np.arange(2)]
        found.append(np.ascontiguousarray(pairs).view(np.uint32).reshape(-1))
    return found


def store_matrices(shared: Shared, lanes: Array, addresses: Array, values: list[Array], transposed: bool) -> None:
    """stmatrix: what `load_matrices` takes back."""
    per = 8 * len(values)
    warps = len(lanes) // 32
    rows = np.empty((warps, len(values), 8, 8), np.uint16)
    for number, value in enumerate(values):
        pairs = np.ascontiguousarray(value).view(np.uint16).reshape(warps, 32, 2)
        rows[:, number, (_LANE // 4)[:, None], (_LANE % 4 * 2)[:, None] + np.arange(2)] = pairs
    if transposed:
        rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
    words = rows.reshape(warps * per, 8).view(np.uint32)
    own, at = (each.reshape(-1, 32)[:, :per].reshape(-1) for each in (lanes, addresses))
    shared.turns(own, at, 16)
    shared.store(own, at, [words[:, i] for i in range(4)], 4)


def _pairs(registers: list[Array]) -> Array:
    """float64 [warps, 32, registers, 2] of registers with two bf16 numbers."""
    bits = np.stack(registers, -1).view(np.uint16).reshape(-1, 32, len(registers), 2)
    return bf16_values(bits).astype(np.float64)


def multiply(a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """mma.m16n8k16 of bf16: registers of D = A·B + C, float32 bits."""
    row, col = _LANE // 4, (_LANE % 4 * 2)[:, None] + np.arange(2)
    held, other = _pairs(a), _pairs(b)
    warps = len(held)
    left, right = np.empty((warps, 16, 16)), np.empty((warps, 16, 8))
    for number in range(4):  # registers 0..3: rows +0 +8 +0 +8, columns +0 +0 +8 +8
        left[:, (row + 8 * (number % 2))[:, None], col + 8 * (number // 2)] = held[:, :, number]
    for number in range(2):
        right[:, col + 8 * number, row[:, None]] = other[:, :, number]
    sums = np.einsum("wik,wkn->win", left, right, optimize=False)
    found = []
    for number, addend in enumerate(c):
        at = sums[:, row + 8 * (number // 2), _LANE % 4 * 2 + number % 2].reshape(-1)
        found.append((at + addend.view(np.float32).astype(np.float64)).astype(np.float32).view(np.uint32))
    return found


def described(
    shared: Shared, readers: Array, words: Array, rows: int, transposed: bool, version: int
) -> tuple[Array, Array]:
    """float64 [products, rows, 16], the operand of each product that a descriptor names, and which words of 4 bytes of
    shared memory it lies in.

    Not transposed: 8 rows of one swizzle atom follow each other, the next 8 a stride further. Transposed: 16 rows of an
    atom's width along `rows`, the next atom's width the leading offset further, the next 8 of K a stride further.

    Args:
        readers: [products, threads] that read it.
        words: the descriptor of each product.
        version: of descriptors, 0 for Hopper, 1 for Blackwell.
    """
    word = words.astype(np.int64)
    start, leading, stride = ((word >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    modes = np.unique(word >> 62 & 3)
    # A base offset, leading offsets counted otherwise and a finer swizzle of 128 bytes are not read here.
    if len(modes) > 1 or (word >> 49 & 15 | word >> 61 & 1).any() or ((word >> 46 & 7) != version).any():
        raise Fault("a descriptor of a matrix that is not read here")
    bits = _SWIZZLES[int(modes[0])]
    width = 16 << bits  # bytes of an atom's row
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    one = np.ones((rows, 16), np.int64)
    if transposed:
        each = width // 2
        at = (r // each * one, k // 8 * one, k % 8 * width + r % each * 2)
    elif bits:
        at = (0 * one, r // 8 * one, r % 8 * width + k * 2)
    else:
        at = (k // 8 * one, r // 8 * one, r % 8 * 16 + k % 8 * 2)
    flat = start[:, None, None] + at[0] * leading[:, None, None] + at[1] * stride[:, None, None] + at[2]
    flat ^= (flat >> 7 & (1 << bits) - 1) << 4
    found = np.zeros(0, np.uint16)
    for column in readers.T:
        by = np.broadcast_to(column[:, None, None], flat.shape).reshape(-1)
        (found,) = shared.load(by, flat.reshape(-1), 2, 1)
    place = (flat + (shared.program[readers[:, 0]] * shared.size)[:, None, None]) // 4
    shared.fenced(place)
    return bf16_values(found).astype(np.float64).reshape(flat.shape), place


def _by_group(shared: Shared, lanes: Array, descriptor: Array, rows: int, transposed: bool) -> Array:
    """The operand of each warp group's product; all four warps read it."""
    each = descriptor.reshape(-1, 128)
    if (each != each[:, :1]).any():
        raise Fault("threads of a warp group name different matrices")
    readers = lanes.reshape(-1, 128)[:, ::32]
    return described(shared, readers, each[:, 0], rows, transposed, 0)[0]


def multiply_group(
    shared: Shared, lanes: Array, a: list[Array], b: Array, c: list[Array], transposed: tuple[bool, bool]
) -> list[Array]:
    """wgmma m64nNk16 of bf16 by 4 warps: A from registers (four) or by a descriptor (one), B by a descriptor."""
    if len(a) == 1:
        left = _by_group(shared, lanes, a[0], 64, transposed[0])
    else:
        row, col = _LANE // 4, (_LANE % 4 * 2)[:, None] + np.arange(2)
        held = _pairs(a).reshape(-1, 4, 32, 4, 2)
        left = np.empty((len(held), 64, 16))
        for warp in range(4):
            for number in range(4):
                place = 16 * warp + row + 8 * (number % 2)
                left[:, place[:, None], col + 8 * (number // 2)] = held[:, warp, :, number]
    n = len(c) * 2
    right = _by_group(shared, lanes, b, n, transposed[1])
    sums = np.einsum("gik,gnk->gin", left, right, optimize=False)
    found = []
    quarter = np.arange(4)[:, None]
    for number, addend in enumerate(c):
        rows = 16 * quarter + _LANE // 4 + 8 * (number % 4 // 2)
        cols = 8 * (number // 4) + _LANE % 4 * 2 + number % 2 + 0 * quarter
        at = sums[:, rows, cols].reshape(-1)
        found.append((at + addend.view(np.float32).astype(np.float64)).astype(np.float32).view(np.uint32))
    return found


def shuffle(mode: str, values: Array, other: Array, clamp: int) -> Array:
    """shfl.sync of whole warps with a mask of all threads."""
    warp = values.reshape(-1, 32)
    by = np.broadcast_to(other, values.shape).reshape(-1, 32).astype(np.int64)
    if mode == "bfly":
        source = _LANE ^ by
    elif mode == "up":
        source = _LANE - by
        source = np.where(source < clamp, _LANE, source)
    elif mode == "down":
        source = np.where(_LANE + by > clamp, _LANE, _LANE + by)
    else:
        source = by & 31
    return np.take_along_axis(warp, np.clip(source, 0, 31), 1).reshape(-1)


#: What redux.sync does; of floats that are no NaN, unless it is asked for.
REDUCED: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "and": np.bitwise_and,
}  # fmt: skip
_OF_NUMBERS = {"min": np.fmin, "max": np.fmax}


def reduce_warp(how: str, values: Array, nan: bool) -> Array:
    """redux.sync of whole warps; `nan`: whether a NaN among floats is the result."""
    warp = values.reshape(-1, 32)
    function = REDUCED[how] if nan or values.dtype.kind != "f" else _OF_NUMBERS[how]
    return np.repeat(function.reduce(warp, 1, dtype=values.dtype), 32)
