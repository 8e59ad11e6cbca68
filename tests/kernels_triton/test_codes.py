"""Every code of a weight, and every zero point, becomes its number exactly."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, Weight, run

from tmlc.kernels.triton import layouts

CODES = np.arange(256, dtype=np.uint8)


def stored(dtype: str) -> Weight:
    """A weight of all codes of a form; of four bits a row for each zero point."""
    if dtype == "f8g128":  # but the two that are no numbers, which no weight has
        known = np.where(CODES & 127 == 127, 0, CODES).astype(np.uint8)
        codes, scales, zeros = known.reshape(2, 1, 128), np.float32(1), None
    elif dtype == "i8g32":
        codes, scales, zeros = CODES.reshape(8, 1, 32), np.float16(1), None
    else:
        group = layouts.FORMS[dtype].group
        codes = np.broadcast_to(np.arange(group, dtype=np.uint8) % 16, (256, 1, group))
        scales, zeros = np.float16(1), CODES.reshape(256, 1)
    parts = layouts.pack(dtype, codes, np.full(codes.shape[:2], scales), zeros)
    shape = (codes.shape[0], codes.shape[-1])
    return Weight(dtype, shape, parts, layouts.unpack(dtype, parts, shape[1]))


@pytest.mark.parametrize("dtype", ["f8g128", "i8g32", "i4g32", "i4g64"])
def test_every_code_is_its_number(machine, dtype):
    """Rows of a unit matrix read a column each: what stands there is the number itself."""
    weight = stored(dtype)
    m, k = weight.shape
    every = Session({"x": np.eye(k, dtype=np.float32)}, count=k)
    ((found,),) = run(machine, "linear", [every], {}, [Shape("f32", m)], {"weight": weight})
    assert np.array_equal(found.T, weight.values)
    assert len(np.unique(weight.values)) >= (253 if m < 256 else 256)  # of e4m3 two zeros, and two that are no numbers


@pytest.mark.parametrize("dtype", ["f8g128", "i8g32", "i4g64"])
def test_the_only_row_of_a_call_reads_them_too(machine, dtype):
    weight = stored(dtype)
    m, k = weight.shape
    at = 5
    alone = Session({"x": np.eye(k, dtype=np.float32)[at : at + 1]}, count=1)
    ((found,),) = run(machine, "linear", [alone], {}, [Shape("f32", m)], {"weight": weight})
    assert np.array_equal(found[0], weight.values[:, at])
