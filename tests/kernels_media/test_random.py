"""philox_normal and sample against a Philox4x32-10 written here, in numpy, from the published definition."""

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError

MASK = np.uint64(0xFFFFFFFF)
GUMBEL_DOMAIN = 0x80000000


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds over counters [n,4] (32-bit words in uint64), as in Salmon et al., SC 2011."""
    c, (k0, k1) = counter.astype(np.uint64).T, key
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = np.stack(
            [
                (right >> 32) ^ c[1] ^ np.uint64(k0),
                right & MASK,
                (left >> 32) ^ c[3] ^ np.uint64(k1),
                left & MASK,
            ]
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c.T


def uniforms(seed: int, tick: int, position: int, count: int) -> np.ndarray:
    """`count` numbers of (0, 1), four a block."""
    blocks = np.zeros((-(-count // 4), 4), np.uint64)
    blocks[:, 0] = np.arange(len(blocks))
    blocks[:, 1:] = [position & 0xFFFFFFFF, tick & 0xFFFFFFFF, tick >> 32 & 0xFFFFFFFF]
    words = philox(blocks, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return (words.astype(np.float64) + 0.5).reshape(-1)[:count] * 2.0**-32


def normals(key: np.ndarray, count: int) -> np.ndarray:
    u = uniforms(*map(int, key), count + -count % 4).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]


def gumbels(key: np.ndarray, count: int) -> np.ndarray:
    seed, tick, position = map(int, key)
    return -np.log(-np.log(uniforms(seed, tick, position | GUMBEL_DOMAIN, count)))


KEYS = np.array(
    [[0, 0, 0], [1, 2, 3], [-1, -1, 2**31 - 1], [2**62 + 5, 2**40 + 7, 12], [7, 0, 1], [7, 1, 0]], np.int64
)


def test_the_numpy_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones, pi = np.full((1, 4), 0xFFFFFFFF), np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    assert philox(np.zeros((1, 4)), (0, 0))[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, (0xFFFFFFFF, 0xFFFFFFFF))[0].tolist() == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    assert philox(pi, (0xA4093822, 0x299F31D0))[0].tolist() == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


class TestNormal:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 31, 32, 33, 80, 321])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_equals_the_definition(self, one_op, operand, size: int, threads: int) -> None:
        op = one_op("philox_normal", operand.out("f32", 1, size), operand.arg("i64", 1, 3), threads=threads)
        got = op(len(KEYS), KEYS)
        expected = np.stack([normals(key, size) for key in KEYS]).astype(np.float32)
        assert np.abs(got - expected).max() <= 1e-6
        assert np.array_equal(np.concatenate([op(1, key[None]) for key in KEYS]), got)

    def test_moments_are_those_of_a_standard_normal(self, one_op, operand) -> None:
        op = one_op("philox_normal", operand.out("f32", 1, 4096), operand.arg("i64", 1, 3))
        keys = np.stack([np.full(64, 3), np.arange(64) // 8, np.arange(64) % 8], 1).astype(np.int64)
        x = op(64, keys).astype(np.float64)
        count = x.size
        for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            assert abs((x**power).mean() - moment) < 5 * np.sqrt(spread / count)
        assert abs((x[:, :-1] * x[:, 1:]).mean()) < 5 / np.sqrt(count)  # neighbours in a row
        assert abs((x[:-1] * x[1:]).mean()) < 5 / np.sqrt(count)  # neighbouring positions
        assert np.unique(x.astype(np.float32)).size > 0.97 * count

    @pytest.mark.parametrize(
        ("out", "key", "i", "f"),
        [
            (("i32", 1, 4), ("i64", 1, 3), [], []),
            (("f32", 1, 4), ("i32", 1, 3), [], []),
            (("f32", 1, 4), ("i64", 1, 2), [], []),
            (("f32", 2, 4), ("i64", 1, 3), [], []),
            (("f32", 1, 4), ("i64", 1, 3), [4], []),
            (("f32", 1, 4), ("i64", 1, 3), [], [1.0]),
        ],
    )
    def test_a_malformed_call_is_refused(self, one_op, operand, out, key, i, f) -> None:
        with pytest.raises(PlanError):
            one_op("philox_normal", operand.out(*out), operand.arg(*key), i=i, f=f)


def sample_of(one_op, operand, vocabulary: int, **options):
    return one_op(
        "sample",
        operand.out("i32", 1, 1),
        operand.arg("f32", 1, vocabulary),
        operand.arg("i64", 1, 3),
        operand.arg("f32", 1, 1),
        **options,
    )


def temperatures(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


class TestSample:
    @pytest.mark.parametrize("size", [1, 2, 5, 31, 64, 300, 4096, 4097, 10001])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_equals_the_definition_at_any_temperature(self, one_op, operand, size: int, threads: int) -> None:
        rng = np.random.default_rng(size)
        logits = (rng.standard_normal((6, size)) * 3).astype(np.float32)
        heat = temperatures(0, 0.2, 1, 1.7, 100, 1e-30)
        got = sample_of(one_op, operand, size, threads=threads)(6, logits, KEYS, heat)[:, 0]
        for row in range(6):
            t = float(heat[row, 0])
            scores = logits[row] / t + gumbels(KEYS[row], size) if t else logits[row]
            assert got[row] == np.argmax(scores)

    def test_zero_takes_the_highest_logit_and_the_first_of_equals(self, one_op, operand) -> None:
        op = sample_of(one_op, operand, 9000, threads=2)
        logits = np.zeros((4, 9000), np.float32)
        logits[1, [4500, 8999]] = 2
        logits[2, 8999] = np.inf
        logits[3] = -np.inf
        assert op(4, logits, KEYS[:4], temperatures(0, 0, 0, 0))[:, 0].tolist() == [0, 4500, 8999, 0]

    def test_frequencies_are_the_softmax_of_the_logits_over_the_temperature(self, one_op, operand) -> None:
        logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -4.0, 1.5], np.float32)
        draws, heat = 20000, 1.3
        op = sample_of(one_op, operand, len(logits), max_n=draws)
        keys = np.stack([np.full(draws, 9), np.arange(draws) // 4, np.arange(draws) % 4], 1).astype(np.int64)
        ids = op(draws, np.tile(logits, (draws, 1)), keys, np.full((draws, 1), heat, np.float32))
        p = np.exp(logits / heat) / np.exp(logits / heat).sum()
        expected, counts = draws * p, np.bincount(ids[:, 0], minlength=len(logits))
        assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees, p = 0.001

    def test_rows_and_threads_never_change_a_choice(self, one_op, operand) -> None:
        logits = np.random.default_rng(2).standard_normal((6, 9999)).astype(np.float32)
        whole = sample_of(one_op, operand, 9999)(6, logits, KEYS, temperatures(*[1] * 6))
        alone = sample_of(one_op, operand, 9999, threads=2)
        singles = [alone(1, logits[r : r + 1], KEYS[r : r + 1], temperatures(1)) for r in range(6)]
        assert np.array_equal(np.concatenate(singles), whole)

    def test_logits_that_are_no_numbers_are_not_chosen(self, one_op, operand) -> None:
        logits = np.full((2, 50), np.nan, np.float32)
        logits[:, 33] = -5
        ids = sample_of(one_op, operand, 50)(2, logits, KEYS[:2], temperatures(0, 1))
        assert ids[:, 0].tolist() == [33, 33]
        nothing = np.full((2, 50), np.nan, np.float32)
        assert sample_of(one_op, operand, 50)(2, nothing, KEYS[:2], temperatures(0, 1))[:, 0].tolist() == [
            0,
            0,
        ]

    @pytest.mark.parametrize("heat", [-1.0, np.nan, -np.inf])
    def test_a_temperature_that_is_none_stops_the_call(self, one_op, operand, heat: float) -> None:
        with pytest.raises(KernelError):
            sample_of(one_op, operand, 5)(2, np.zeros((2, 5), np.float32), KEYS[:2], temperatures(1, heat))

    @pytest.mark.parametrize(
        "operands",
        [
            (("i64", 1, 1), ("f32", 1, 9), ("i64", 1, 3), ("f32", 1, 1)),
            (("i32", 1, 2), ("f32", 1, 9), ("i64", 1, 3), ("f32", 1, 1)),
            (("i32", 1, 1), ("bf16", 1, 9), ("i64", 1, 3), ("f32", 1, 1)),
            (("i32", 1, 1), ("f32", 1, 9), ("i64", 1, 4), ("f32", 1, 1)),
            (("i32", 1, 1), ("f32", 1, 9), ("i64", 1, 3), ("f32", 1, 2)),
            (("i32", 2, 1), ("f32", 1, 9), ("i64", 1, 3), ("f32", 1, 1)),
            (("i32", 1, 1), ("f32", 2, 9), ("i64", 1, 3), ("f32", 1, 1)),
            (("i32", 1, 1), ("f32", 1, 9), ("i64", 2, 3), ("f32", 1, 1)),
            (("i32", 1, 1), ("f32", 1, 9), ("i64", 1, 3), ("f32", 2, 1)),
        ],
    )
    def test_a_malformed_call_is_refused(self, one_op, operand, operands) -> None:
        first, *rest = operands
        with pytest.raises(PlanError):
            one_op("sample", operand.out(*first), *[operand.arg(*t) for t in rest])
