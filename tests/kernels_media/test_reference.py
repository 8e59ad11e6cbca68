"""The media and random kernels against the canonical ops of the IR (PyTorch), and on strided operands."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (the references of the canonical ops)")
media = pytest.importorskip("tmlc.ir.ops.media")
dense = pytest.importorskip("tmlc.ir.ops.dense")
random = pytest.importorskip("tmlc.ir.ops.random")

RNG = np.random.default_rng(21)
PCM = (RNG.standard_normal((9, 40)) * 10.0 ** RNG.uniform(-3, 1, (9, 1))).astype(np.float32)
FILTERS = RNG.random((6, 51)).astype(np.float32)
WINDOW = np.hanning(100).astype(np.float32)[None]
TABLE = RNG.standard_normal((40, 24)).astype(np.float32)
LEVELS = RNG.integers(0, 8, (9, 5)).astype(np.int32)
VIDEO = RNG.integers(0, 256, (9 * 2 * 8, 36)).astype(np.uint8)
FRAMES = RNG.standard_normal((9, 50)).astype(np.float32)
FADE = RNG.random((1, 50)).astype(np.float32)
KEYS = RNG.integers(-(2**40), 2**40, (9, 3))
LOGITS = RNG.standard_normal((9, 77)).astype(np.float32)
HEAT = np.array([[0], [1], [0.5], [2], [0], [1], [1], [30], [0.01]], np.float32)
FOLDS, MEAN, STD = [1, 2, 2, 2], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def tensor(x: np.ndarray):
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)


def cases() -> dict:
    """name → (output, inputs, weights and states, i, f, reference)."""
    return {
        "dmel": (
            ("i32", 1, 6),
            [PCM],
            [WINDOW, FILTERS, 60],
            [512],
            [-5.0, 2.0],
            lambda: media.dmel(tensor(PCM), tensor(WINDOW), tensor(FILTERS), -5.0, 2.0, 512),
        ),
        "bag_embedding": (
            ("f32", 1, 24),
            [LEVELS],
            [TABLE],
            [8],
            [],
            lambda: dense.bag_embedding(tensor(TABLE), tensor(LEVELS), 8),
        ),
        "patchify": (
            ("f32", 48, 12),
            [VIDEO],
            [],
            [2, 8, 4, 2, *FOLDS],
            [*MEAN, *STD],
            lambda: media.patchify(tensor(VIDEO), 2, 8, 4, FOLDS, MEAN, STD),
        ),
        "overlap_add": (
            ("f32", 1, 20),
            [FRAMES],
            [FADE, 30],
            [],
            [],
            lambda: media.overlap_add(tensor(FRAMES), tensor(FADE), 20),
        ),
        "philox_normal": (
            ("f32", 1, 45),
            [KEYS],
            [],
            [],
            [],
            lambda: random.philox_normal(tensor(KEYS), 45),
        ),
        "sample": (
            ("i32", 1, 1),
            [LOGITS, KEYS, HEAT],
            [],
            [],
            [],
            lambda: random.sample(tensor(LOGITS), tensor(KEYS), tensor(HEAT)),
        ),
    }


@pytest.mark.parametrize("gap", [0, 1, 5])
@pytest.mark.parametrize("name", cases())
def test_equals_the_canonical_op_whatever_the_stride(one_op, operand, name: str, gap: int) -> None:
    kinds = {np.float32: "f32", np.int32: "i32", np.int64: "i64", np.uint8: "u8"}
    (dtype, a, cols), inputs, rest, i, f, reference = cases()[name]
    operands = [operand.out(dtype, a, cols, cols + gap)]
    for x in inputs:
        operands.append(operand.arg(kinds[x.dtype.type], len(x) // 9, x.shape[1], x.shape[1] + gap))
    operands += [operand.state(x) if isinstance(x, int) else operand.weight(x) for x in rest]
    got = one_op(name, *operands, i=i, f=f)(9, *inputs)
    expected = reference().numpy()
    if dtype == "i32":
        assert np.array_equal(got, expected)
    else:
        assert np.abs(got - expected).max() <= 2e-6
