"""Packed codes, read back byte by byte as docs/plan-format.md says, are the values that the program computes with."""

import numpy as np
import pytest
import torch

from tmlc.emit.packing import packed_weight
from tmlc.ir.quantize import SCHEMES, dequantised

GROUPS = {"i8g32": (32, 544), "i4g32": (32, 304), "i4g64": (64, 560)}  # inputs and bytes of a group


def read(data: np.ndarray, rows: int, k: int, scheme: str) -> np.ndarray:
    """[blocks, bytes] → float32 [rows, k]."""
    group, size = GROUPS[scheme]
    codes = size - (32 if scheme == "i8g32" else 48)
    values = np.zeros((data.shape[0] * 16, data.shape[1] // size * group), np.float32)
    for block, line in enumerate(data):
        for number in range(len(line) // size):
            begin = number // 4 * 4
            count = min(4, len(line) // size - begin)  # groups of this run
            run = line[begin * size : (begin + count) * size]
            part = run[(number - begin) * codes :][:codes]
            scales = run[count * codes :][: count * 32].view(np.float16)[16 * (number - begin) :]
            zeros = run[count * (codes + 32) + 16 * (number - begin) :]
            for row in range(16):
                step = scales[row].astype(np.float32)
                for i in range(group):
                    half, quad, inside = i // 32, i % 32 // 4, i % 4
                    if scheme == "i8g32":
                        value = np.float32(int(part[quad * 64 + row * 4 + inside]) - 128)
                    else:
                        byte = int(part[half * 256 + quad % 4 * 64 + row * 4 + inside])
                        value = np.float32(byte >> 4 if quad >= 4 else byte & 15) - np.float32(zeros[row]) / 16
                    values[block * 16 + row, number * group + i] = value * step
    return values[:rows, :k]


@pytest.mark.parametrize("scheme", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 32), (17, 33), (40, 70), (5, 128), (20, 161), (33, 520)])
def test_matrices(scheme: str, m: int, k: int) -> None:
    w = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    packed = packed_weight("w", "k16", scheme, (m, k))
    assert packed.dtype == "u8" and packed.cols == -(-k // GROUPS[scheme][0]) * GROUPS[scheme][1]
    data = np.concatenate([piece.reshape(-1) for piece in packed.pieces(w)]).reshape(packed.rows, packed.cols)
    want = torch.empty_like(w)
    dequantised(w, SCHEMES[scheme], want)
    assert np.array_equal(read(data, m, k, scheme), want.numpy())


@pytest.mark.parametrize("scheme", GROUPS)
def test_experts_follow_each_other_gate_and_up_blocks_in_turn(scheme: str) -> None:
    w = torch.randn(2, 40, 33, generator=torch.Generator().manual_seed(2))
    packed = packed_weight("w", "k16.gate_up", scheme, (2, 40, 33))
    data = np.concatenate([piece.reshape(-1) for piece in packed.pieces(w)]).reshape(packed.rows, packed.cols)
    want = torch.empty_like(w)
    dequantised(w, SCHEMES[scheme], want)
    for number, part in enumerate(want.reshape(4, 20, 33)):  # two blocks of 16 for each 20 rows
        blocks = data[4 * (number // 2) + number % 2 :: 2][:2]
        assert np.array_equal(read(blocks, 20, 33, scheme), part.numpy())


def test_large_matrices_are_packed_in_pieces_of_bounded_size() -> None:
    w = torch.randn(600, 2000)
    sizes = [piece.nbytes for piece in packed_weight("w", "k16", "i4g32", (600, 2000)).pieces(w)]
    assert len(sizes) > 2 and max(sizes) < 1 << 20
