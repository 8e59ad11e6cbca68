"""Packed weights are the blocks that docs/plan-format.md describes, element by element."""

import numpy as np
import pytest
import torch

from tmlc.emit.packing import PackedWeight, check_finite, packed_weight
from tmlc.errors import CheckpointError


def pack(packed: PackedWeight, tensor: torch.Tensor) -> np.ndarray:
    flat = np.concatenate([piece.reshape(-1) for piece in packed.pieces(tensor)])
    assert flat.dtype == {"f32": np.float32, "bf16": np.uint16}[packed.dtype]
    flat = flat if packed.dtype == "f32" else (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(packed.rows, packed.cols)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 8), (17, 3), (48, 5), (4100, 2)])
def test_f32_blocks_are_k_major(m: int, k: int) -> None:
    w = torch.randn(m, k)
    got = pack(packed_weight("w", "k16", "f32", (m, k)), w).reshape(-1, k, 16)
    assert got.shape[0] == -(-m // 16)
    for row in range(got.shape[0] * 16):
        want = w[row].numpy() if row < m else np.zeros(k, np.float32)
        assert np.array_equal(got[row // 16, :, row % 16], want)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 8), (17, 3), (33, 6)])
def test_bf16_blocks_hold_pairs_along_k(m: int, k: int) -> None:
    w = torch.randn(m, k).to(torch.bfloat16)
    pairs = (k + 1) // 2
    got = pack(packed_weight("w", "k16", "bf16", (m, k)), w).reshape(-1, pairs, 16, 2)
    for row in range(got.shape[0] * 16):
        for column in range(2 * pairs):
            want = float(w[row, column]) if row < m and column < k else 0.0
            assert got[row // 16, column // 2, row % 16, column % 2] == want


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_experts_follow_each_other_gate_and_up_blocks_in_turn(dtype: str) -> None:
    w = torch.randn(3, 2 * 20, 7)
    if dtype == "bf16":
        w = w.to(torch.bfloat16)
    packed = packed_weight("w", "k16.gate_up", dtype, (3, 40, 7))
    got = pack(packed, w)
    assert packed.rows == 3 * 2 * 2
    for expert in range(3):
        for half in range(2):
            part = w[expert, 20 * half : 20 * half + 20]
            want = pack(packed_weight("w", "k16", dtype, (20, 7)), part)
            assert np.array_equal(got[4 * expert + half : 4 * expert + 4 : 2], want)
    down = packed_weight("w", "k16.experts", dtype, (3, 40, 7))
    whole = pack(down, w)
    assert np.array_equal(whole[3:6], pack(packed_weight("w", "k16", dtype, (40, 7)), w[1]))


def test_taps_are_transposed_and_vectors_become_rows() -> None:
    w = torch.randn(5, 1, 3)
    taps = packed_weight("w", "taps", "f32", (5, 1, 3))
    assert np.array_equal(pack(taps, w), w[:, 0].T.numpy())
    for shape in ((), (1,), (4,), (1, 4), (6, 4)):
        value = torch.randn(shape)
        plain = packed_weight("w", "plain", "f32", shape)
        rows = value.reshape(-1, shape[-1] if shape else 1).numpy()
        assert np.array_equal(pack(plain, value), rows)


def test_a_bf16_weight_stays_exact_in_f32() -> None:
    w = torch.randn(4, 4).to(torch.bfloat16)
    assert np.array_equal(pack(packed_weight("w", "plain", "f32", (4, 4)), w), w.float().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    w = torch.zeros(9, 9, dtype=dtype)
    check_finite(w, "layers.3.up")
    w[4, 5] = value
    with pytest.raises(CheckpointError, match=r"layers\.3\.up holds 1 "):
        check_finite(w, "layers.3.up")
