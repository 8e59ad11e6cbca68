"""What quantised weights stand for, and that their codes are the best of those tried, group by group."""

import pytest
import torch

from tmlc.errors import CheckpointError, IRError
from tmlc.ir.quantize import SCHEMES, dequantised, quantise
from tmlc.ir.text import parse_program, print_program
from tmlc.ir.types import TensorType
from tmlc.ir.weights import WeightMap


def weight(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed: a few values of a group are many times the others."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, k, generator=generator) / torch.rand(rows, k, generator=generator).sqrt()


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 100])
def test_int8_is_off_by_at_most_half_a_step(k: int) -> None:
    w = weight(20, k)
    codes = quantise(w, SCHEMES["i8g32"])
    assert codes.codes.min() >= 1
    step = codes.scales.float().repeat_interleave(32, 1)[:, :k]
    assert ((codes.values(k) - w).abs() <= 0.5 * step * 1.13).all(), "float16 scales cost the largest value a little"


@pytest.mark.parametrize(("scheme", "group"), [("i4g32", 32), ("i4g64", 64)])
def test_int4_searches_scales_that_beat_rounding_the_whole_range(scheme: str, group: int) -> None:
    w = weight(64, 256)
    parts = w.reshape(64, -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (torch.round((parts - low) / step) * step + low).reshape(w.shape)
    found = quantise(w, SCHEMES[scheme]).values(256)
    each = (found - w).reshape(parts.shape).square().sum(-1) / (plain - w).reshape(parts.shape).square().sum(-1)
    assert relative(found, w) < 0.9 * relative(plain, w)
    assert each.mean() < 0.95 and (each > 1.1).float().mean() < 0.02


@pytest.mark.parametrize("k", [1, 127, 128, 300])
def test_fp8_codes_are_the_nearest_in_exact_arithmetic(k: int) -> None:
    """Against every code's value as a fraction; ties, and quotients that float32 rounds to ties, are among them."""
    from fractions import Fraction

    bits = range(127)
    exact = [Fraction(b & 7, 8) * Fraction(1, 64) if b < 8 else (1 + Fraction(b & 7, 8)) * Fraction(2) ** ((b >> 3) - 7)
             for b in bits]  # fmt: skip
    assert [float(v) for v in exact] == torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    w = weight(3, k)
    w[0] *= 1e-30
    w[1, ::3] *= -1
    largest = w[2].abs().amax()
    scale = (largest.double() / 448).float()
    for at in range(0, k - 1, 2):  # about a tie of the group's scale: on it, or a step of float32 beside it
        tie = (scale.double() * float((exact[at % 126] + exact[at % 126 + 1]) / 2)).float()
        w[2, at] = torch.nextafter(tie, tie * (0.0, 2.0, 1.0)[at % 3])
    w[2, -1] = largest
    found = quantise(w, SCHEMES["f8g128"])
    assert found.scales.dtype == torch.float32 and int(found.codes.max()) < 255
    for row in range(3):
        for at in range(k):
            s = Fraction(float(found.scales[row, at // 128]))
            size = min(abs(Fraction(float(w[row, at]))) / s, Fraction(448))
            best = min(bits, key=lambda b: (abs(exact[b] - size), b % 2))
            assert int(found.codes[row, at // 128, at % 128]) == best + 128 * (w[row, at] < 0), (row, at)


def test_fp8_of_numbers_that_are_all_zero_or_too_small_is_zero() -> None:
    w = torch.zeros(2, 130)
    w[1, 128] = 1e-44
    found = quantise(w, SCHEMES["f8g128"])
    assert not found.codes.any() and not found.values(130).any()


def test_fp8_codes_are_those_of_the_kernels_own_packer() -> None:
    layouts = pytest.importorskip("tmlc.kernels.triton.layouts", reason="needs Triton", exc_type=ImportError)
    w = weight(40, 500)
    codes, scales = layouts.quantise_fp8(w.numpy())
    found = quantise(w, SCHEMES["f8g128"])
    assert (found.codes.numpy() == codes).all() and (found.scales.numpy() == scales).all()
    values = layouts.unpack("f8g128", layouts.pack("f8g128", codes, scales), 500)
    assert abs(values - found.values(500).numpy()).max() <= 2.0**-24 * abs(values).max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_the_same_however_a_tensor_is_cut(scheme: str) -> None:
    w = weight(70, 90)
    whole = torch.empty_like(w)
    dequantised(w, SCHEMES[scheme], whole)
    for rows in (slice(0, 1), slice(5, 40), slice(69, 70)):
        assert torch.equal(quantise(w[rows], SCHEMES[scheme]).values(90), whole[rows])
    stacked = torch.empty(2, 35, 90)
    dequantised(w.reshape(2, 35, 90), SCHEMES[scheme], stacked)
    assert torch.equal(stacked.reshape(70, 90), whole)
    transposed = torch.empty(90, 70).T
    dequantised(w, SCHEMES[scheme], transposed)
    assert torch.equal(transposed, whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_of_zeros_constants_and_tiny_numbers(scheme: str) -> None:
    w = torch.zeros(4, 64)
    w[1], w[2], w[3] = 0.37, -1.5, 1e-6
    w[3, ::2] = -1e-6
    found = quantise(w, SCHEMES[scheme]).values(64)
    assert not found[0].any()
    assert torch.allclose(found[1:3], w[1:3], rtol=0.01)
    assert (found[3] - w[3]).abs().max() <= 6e-7


@pytest.mark.parametrize("scheme", ["i8g32", "i4g32", "i4g64"])
def test_numbers_beyond_the_scales_are_refused(scheme: str) -> None:
    with pytest.raises(CheckpointError, match="float16 scale"):
        quantise(torch.full((1, 40), 1e9), SCHEMES[scheme])


def test_the_map_quantises_the_float_weight_and_nothing_follows() -> None:
    weights = WeightMap()
    weights.source("a", "bf16", (6, 40))
    weights.source("b", "bf16", (6, 40))
    weights.concat("ab", ["a", "b"])
    weights.quantize("ab.q", "ab", "i4g32")
    assert weights["ab.q"].type == TensorType("i4g32", (12, 40))
    source = {"a": weight(6, 40).bfloat16(), "b": weight(6, 40, 1).bfloat16()}
    value = weights.evaluate("ab.q", source)
    assert value.dtype == torch.float32
    assert torch.equal(value, quantise(torch.cat([source["a"], source["b"]]), SCHEMES["i4g32"]).values(40))
    with pytest.raises(IRError, match="quantised weight"):
        weights.slice("s", "ab.q", 0, 0, 3)
    with pytest.raises(IRError, match="unknown scheme"):
        weights.quantize("c", "ab", "i3g7")
    with pytest.raises(IRError, match="quantize"):
        weights.cast("d", "ab", "i8g32")


def test_quantised_weights_keep_their_text_form() -> None:
    text = """tmlc-ir 1
weight "w" = source("w") : f32[8, 8]
weight "w.q" = quantize("w", scheme="i8g32") : i8g32[8, 8]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w.q"
  %y = linear(%x, %w, none)
  return %y
}
"""
    printed = print_program(parse_program(text))
    assert 'quantize("w", scheme="i8g32") : i8g32[8, 8]' in printed
    assert print_program(parse_program(printed)) == printed
