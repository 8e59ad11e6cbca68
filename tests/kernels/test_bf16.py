"""Products with bf16 weights: activations rounded to bf16 once, exact products, and the same row the same bits."""

import numpy as np
import pytest

from tmlc.kernels.cpu import available_isas, load_library


def product(bench, x, w):
    (got,) = bench.op("linear", [np.asarray(x, np.float32)], [bench.pack(w, "bf16")], out=[("f32", len(w))])
    return got


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 31, 32, 33, 34, 63, 64, 65, 127, 130, 257])
def test_every_length_equals_float64_to_float32_sums(bench, rng, k):
    w = rng.standard_normal((50, k)).astype(np.float32)
    x = rng.standard_normal((11, k)).astype(np.float32)
    seen, stored = (bench.as_stored(v, "bf16").astype(np.float64) for v in (x, w))
    got = product(bench, x, w)
    assert (np.abs(got - seen @ stored.T) <= 2e-6 * (np.abs(seen) @ np.abs(stored).T)).all()
    exact = x.astype(np.float64) @ stored.T
    assert (np.abs(got - exact) <= 2.0**-8 * (np.abs(x).astype(np.float64) @ np.abs(stored).T)).all()


@pytest.mark.parametrize("k", [6, 33, 2000])
def test_any_number_of_rows_has_the_bits_of_each_row_alone(bench, rng, k):
    w, x = rng.standard_normal((40, k)).astype(np.float32), rng.standard_normal((33, k)).astype(np.float32)
    alone = np.concatenate([product(bench, x[r : r + 1], w) for r in range(33)])
    for n in range(1, 34):
        assert np.array_equal(alone[:n], product(bench, x[:n], w)), n


def test_activations_are_rounded_to_the_nearest_bf16_and_ties_to_even(bench, rng):
    """A weight of ones on the diagonal shows what the product sees."""
    bits = rng.integers(0, 2**32, (5, 64), dtype=np.uint64).astype(np.uint32)
    bits[1] = bits[1] & 0xFFFF0000 | 0x8000  # half way between two numbers
    bits[2] = bits[2] & 0xFFFF0000 | 0x7FFF
    bits[3] = bits[3] & 0xFFFF0000 | 0x8001
    exponent = bits >> 23 & 255
    x = np.where((exponent > 0) & (exponent < 255), bits, 0x3F800000).astype(np.uint32).view(np.float32)
    x[4, :4] = 3.4028235e38, -3.4028235e38, 0, -0.0  # the largest numbers round to infinity
    for row in x:
        got = np.diagonal(product(bench, np.diag(row), np.eye(64, dtype=np.float32)))
        assert np.array_equal(got, bench.as_stored(row, "bf16"))


def test_what_is_not_a_number_stays_in_its_row(bench, rng):
    w, x = rng.standard_normal((20, 70)).astype(np.float32), rng.standard_normal((9, 70)).astype(np.float32)
    x[1, 3], x[3, 69], x[5, 0], x[7, 40] = np.nan, np.inf, -np.inf, -np.nan
    got = product(bench, x, w)
    assert not np.isfinite(got[[1, 3, 5, 7]]).any() and np.isfinite(got[[0, 2, 4, 6, 8]]).all()
    assert np.isnan(got[[1, 7]]).all()


def test_denormal_activations_count_as_themselves_or_as_zero(bench):
    x = np.full((1, 4), 1e-40, np.float32)
    assert 0 <= product(bench, x, np.ones((1, 4), np.float32))[0, 0] <= 4.1e-40


def test_instruction_sets_differ_by_rounding_of_float_sums_only(best, rng):
    w, x = rng.standard_normal((64, 301)).astype(np.float32), rng.standard_normal((5, 301)).astype(np.float32)
    results = [product(type(best)(load_library(isa)), x, w) for isa in available_isas()]
    size = np.abs(x) @ np.abs(w).T
    for other in results[1:]:
        assert (np.abs(results[0] - other) <= 1e-6 * size).all()
