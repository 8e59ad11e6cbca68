"""Bank conflicts: turns that shared memory takes for what warps ask of it, and how many it would take at the least.

Shared memory has 32 banks of words of 4 bytes and answers with one word of each bank a turn. A warp's access is served
in parts of 128 bytes: all threads at up to 4 bytes each, half of them at 8, a quarter at 16 (of ldmatrix and stmatrix
the rows of one matrix). Threads that ask for the same word share it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_BANKS, _WARP = 32, 32


class Conflicts:
    """Counts accesses of threads; those that tensor cores make by themselves (wgmma, tcgen05) are not among them.

    Attributes:
        turns: in all, of all programs.
        least: with every word of a part in a bank of its own, as far as there are so many.
    """

    def __init__(self) -> None:
        self.turns = self.least = 0

    def count(self, lanes: npt.NDArray[Any], addresses: npt.NDArray[Any], nbytes: int) -> None:
        """One access of `nbytes` of each of these threads; addresses are those in the memory of their program."""
        if not len(lanes):
            return
        each = max(1, min(_WARP, 128 // max(nbytes, 4)))  # threads of a part
        part = (lanes // _WARP * _WARP + lanes % _WARP // each).astype(np.int64)
        words = addresses.astype(np.int64)[:, None] // 4 + np.arange(max(1, nbytes // 4))
        asked = np.unique(part[:, None] << 32 | words)
        banks, several = np.unique(asked >> 32 << 5 | asked % _BANKS, return_counts=True)
        first = np.flatnonzero(np.r_[True, np.diff(banks >> 5) != 0])
        self.turns += int(np.maximum.reduceat(several, first).sum())
        self.least += int((-(-np.add.reduceat(several, first) // _BANKS)).sum())
