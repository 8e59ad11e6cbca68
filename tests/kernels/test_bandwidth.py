"""Reading memory and multiplying for their own sake, by every variant of the library: what floors are made of."""

import numpy as np
import pytest

from tmlc.errors import KernelError
from tmlc.kernels.cpu import PRODUCTS, MemoryReader, Pool, available_isas, load_library, multiply_rate


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


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_kind_of_product_has_a_rate(isa, product):
    rates = [multiply_rate(Pool(load_library(isa), threads), product) for threads in (1, 2)]
    assert all(1e7 < rate < 1e14 for rate in rates)


def test_the_multiply_adds_of_a_run_are_counted():
    pool = Pool(load_library(), 2)
    count = pool.library._c.tmlc_multiply_adds
    for kind in range(len(PRODUCTS)):
        one = count(pool._handle, kind, 1, 10)
        assert one > 0 and count(pool._handle, kind, 6, 30) == 18 * one
    assert count(pool._handle, 3, 1, 1) == count(pool._handle, 0, 0, 1) == -1
