"""Reading memory for its own sake: every byte is read, on any number of threads, by every variant of the library."""

import numpy as np
import pytest

from tmlc.errors import KernelError
from tmlc.kernels.cpu import MemoryReader, Pool, available_isas, load_library


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_whole_memory_is_read(isa, threads):
    reader = MemoryReader(Pool(load_library(isa), threads), megabytes=3)
    assert reader.bandwidth() > 0


@pytest.mark.parametrize("at", [0, 1 << 20, (3 << 20) - 1])
def test_a_byte_that_is_not_what_was_written_is_noticed(at):
    reader = MemoryReader(Pool(load_library(), 2), megabytes=3)
    reader._data[at] ^= np.uint8(1)
    with pytest.raises(KernelError, match="not what was written"):
        reader.bandwidth()
