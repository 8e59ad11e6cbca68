"""The machine's ceilings, as the kernel library meets them: how fast memory is read, and numbers are multiplied."""

from __future__ import annotations

import time

import numpy as np

from tmlc.errors import KernelError
from tmlc.kernels.cpu.pool import Pool


class MemoryReader:
    """Measures how fast a pool's threads read memory that no cache holds.

    Args:
        pool: whose threads read.
        megabytes: how much is reserved and read each time; several times the last cache.
    """

    def __init__(self, pool: Pool, megabytes: int = 512) -> None:
        self._pool = pool
        room = np.zeros((megabytes << 20) + 64, np.uint8)
        self._data = room[-room.ctypes.data % 64 :][: megabytes << 20]
        self._data[:] = 1  # every page is there, and none is the kernel's one page of zeros

    def bandwidth(self) -> float:
        """Bytes per second of one pass over the memory."""
        c, data = self._pool.library._c, self._data
        started = time.perf_counter()
        total = c.tmlc_read_memory(self._pool._handle, data.ctypes.data, data.nbytes)
        seconds = time.perf_counter() - started
        if total != data.nbytes // 8 * 0x0101010101010101 % 2**64:
            raise KernelError("the memory that was read is not what was written", fix="the machine's memory is faulty")
        return data.nbytes / seconds


PRODUCTS = ("f32", "bf16", "int8")
"""How weights are multiplied; 4-bit ones as int8."""


def multiply_rate(pool: Pool, product: str) -> float:
    """Multiply-adds per second of a pool's threads when nothing has to be fetched: the instruction roofline.

    Args:
        product: of `PRODUCTS`, with the instruction that the pool's library has for it.
    """
    units, rounds = 8 * pool.threads, 1 << 16
    started = time.perf_counter()
    done = pool.library._c.tmlc_multiply_adds(pool._handle, PRODUCTS.index(product), units, rounds)
    return float(done) / (time.perf_counter() - started)
