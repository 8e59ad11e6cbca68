"""The weight op `dequantize`: what it infers and refuses, how it fills views, what memory it needs. (That its numbers
are those of the libraries: tests/frontend/test_quantized.py.)"""

from pathlib import Path

import pytest
import torch

from tmlc.emit.packing import check_finite
from tmlc.errors import CheckpointError, IRError
from tmlc.ir.dequantize import unpacked
from tmlc.ir.weights import WeightMap


@pytest.fixture
def tensors():
    random = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(0, 120, (3, 10, 12), dtype=torch.uint8, generator=random).view(torch.float8_e4m3fn),
        "scales": torch.rand(3, 3, 2, generator=random),
        "words": torch.randint(-(1 << 31), 1 << 31, (5, 4), generator=random).int(),
        "rows": torch.rand(5, generator=random),
        "total": torch.tensor([2.5]),
        "nibbles": torch.randint(0, 256, (5, 8), dtype=torch.uint8, generator=random),
    }


@pytest.fixture
def weights(tensors):
    made = WeightMap()
    for name, t in tensors.items():
        kinds = {torch.float32: "f32", torch.float8_e4m3fn: "f8e4m3", torch.int32: "i32", torch.uint8: "u8"}
        made.source(name, kinds[t.dtype], t.shape)
    return made


FP8 = {"scheme": "fp8", "shape": [3, 10, 12], "block": [4, 8]}
INT = {"scheme": "packed_int", "shape": [5, 32], "block": [1, 0], "bits": 4}
FP4 = {"scheme": "fp4", "shape": [5, 16], "block": [1, 0]}


def test_it_fills_what_is_made_of_it(weights, tensors):
    weights.dequantize("w", ["codes", "scales"], FP8)
    weights.transpose("t", "w", [0, 2, 1])
    weights.slice("cut", "w", 0, 1, 3)
    weights.concat("both", ["w", "w"], axis=1)
    weights.cast("low", "both", "bf16")
    spread = tensors["scales"].repeat_interleave(4, 1)[:, :10].repeat_interleave(8, 2)[:, :, :12]
    want = tensors["codes"].float() * spread
    for name, value in {
        "w": want,
        "t": want.transpose(1, 2),
        "cut": want[1:],
        "both": torch.cat([want, want], 1),
        "low": torch.cat([want, want], 1).bfloat16(),
    }.items():
        got = weights.evaluate(name, tensors)
        assert got.dtype == value.dtype and torch.equal(got, value), name
    assert weights.tensors(["low"]) == ["codes", "scales"]


def test_a_result_that_is_rounded_is_rounded_before_it_is_widened(weights, tensors):
    weights.dequantize("w", ["nibbles", "rows", "total"], {**FP4, "global_scale": "divide", "dtype": "bf16"})
    weights.cast("wide", "w", "f32")
    low = weights.evaluate("w", tensors)
    assert low.dtype == torch.bfloat16 and torch.equal(weights.evaluate("wide", tensors), low.float())


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_are_found_between_words(bits):
    codes = torch.randint(0, 1 << bits, (3, 45), generator=torch.Generator().manual_seed(bits))
    rows = [sum(int(code) << (i * bits) for i, code in enumerate(row)) for row in codes]
    count = -(-45 * bits // 32)
    words = [[(row >> (32 * i)) & 0xFFFFFFFF for i in range(count)] for row in rows]
    stored = torch.tensor(words).to(torch.int32)
    assert torch.equal(unpacked(stored, bits, 45), codes - (1 << (bits - 1)))


@pytest.mark.parametrize(
    "srcs, args, message",
    [
        (["codes", "scales"], {**FP8, "scheme": "fp6"}, "unknown scheme 'fp6'"),
        (["codes", "scales"], {**FP8, "shape": [360]}, "a matrix"),
        (["codes", "scales"], {**FP8, "shape": [3, 0, 12]}, "a matrix"),
        (["codes", "scales"], {**FP8, "block": [4]}, "a block is"),
        (["codes", "scales"], {**FP8, "block": [-4, 8]}, "a block is"),
        (["codes", "scales"], {**FP8, "block": [5, 8]}, "blocks of 5x8"),
        (["codes", "scales"], {**FP8, "shape": [3, 12, 10]}, "the codes are"),
        (["codes", "scales"], {**FP8, "compute": "f64"}, "'f64' is not one of"),
        (["codes", "scales"], {**FP8, "dtype": "u8"}, "'u8' is not one of"),
        (["codes", "scales"], {**FP8, "scheme": "int"}, "the codes are f8e4m3"),
        (["codes", "scales"], {**FP8, "twice": True}, "wrong arguments"),
        (["codes", "scales"], {"scheme": "fp8"}, "wrong arguments"),
        (["codes", "scales", "total"], FP8, "takes 2 sources"),
        (["codes"], FP8, "takes 2 sources"),
        (["codes", "words"], FP8, "the scales are i32"),
        (["words", "rows"], {**INT, "bits": 9}, "9 bits"),
        (["words", "rows"], {**INT, "bits": 3}, "the codes are"),
        (["words", "rows", "nibbles"], {**INT, "zero_point": "plain"}, "the zero points are u8"),
        (["words", "rows", "words"], {**INT, "zero_point": "packed"}, "the zero points are i32"),
        (["nibbles", "rows", "rows"], {**FP4, "global_scale": "multiply"}, "not one number"),
        (["nibbles", "rows", "total"], {**FP4, "global_scale": "add"}, "'add' is not one of"),
        (["nibbles", "rows", "total"], {**FP4, "global_scale": "ratio"}, "takes 4 sources"),
        (["nibbles", "rows", "total", "rows"], {**FP4, "global_scale": "ratio"}, "not one number or one a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(weights, srcs, args, message):
    with pytest.raises(IRError, match=message) as caught:
        weights.dequantize("new", srcs, args)
    assert caught.value.where == "new" and "new" not in weights and caught.value.fix


def test_memory_is_the_result_and_a_bounded_rest():
    """Peak resident memory, from the kernel: 96 MiB come of 12 MiB of codes, through a transpose."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def peak():
        return int(next(x for x in status.read_text().splitlines() if x.startswith("VmHWM")).split()[1]) * 1024

    codes = torch.full((12, 1024, 1024), 3, dtype=torch.uint8)
    scales = torch.full((12, 1024, 64), 127, dtype=torch.uint8)
    weights = WeightMap()
    weights.source("codes", "u8", codes.shape)
    weights.source("scales", "u8", scales.shape)
    weights.dequantize("w", ["codes", "scales"], {"scheme": "fp4", "shape": [12, 1024, 2048], "block": [1, 32]})
    weights.transpose("t", "w", [0, 2, 1])
    try:
        reset.write_text("5")
        before = peak()
    except (OSError, StopIteration):
        pytest.skip("needs a kernel that counts peak memory (/proc/self/clear_refs)")
    value = weights.evaluate("t", {"codes": codes, "scales": scales})
    assert value.nbytes == 96 << 20 and float(value[3, 4, 5]) == 1.5
    assert peak() - before < value.nbytes + (48 << 20)


def test_fp8_that_is_not_finite_is_counted():
    check_finite(torch.ones(4).to(torch.float8_e4m3fn), "w")
    with pytest.raises(CheckpointError, match="w holds 1 values"):
        check_finite(torch.tensor([1, 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn), "w")
