"""Quantised checkpoints are read to the bits of the library that wrote them: transformers (fp8, mxfp4) and the
`compressed-tensors` package. Tensors that those write are random; every code and every exponent is read once."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tmlc.errors import CheckpointError
from tmlc.frontend.checkpoint import open_checkpoint
from tmlc.ir.program import Program
from tmlc.ir.text import parse_program, print_program
from tmlc.ir.verify import verify
from tmlc.ir.weights import WeightMap

W = "model.layers.0.proj.weight"
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


@pytest.fixture
def read(tmp_path, write_checkpoint):
    """(quantization_config, tensors, weight, dtype) → its value as a program would read it."""

    def read(config, tensors, name=W, dtype="f32"):
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        write_checkpoint(tmp_path, {"model_type": "x", "quantization_config": config}, tensors)
        checkpoint = open_checkpoint(tmp_path)
        weights = WeightMap()
        checkpoint.weights[name].declare(weights, name, dtype)
        program = Program({}, weights)
        verify(program)
        assert parse_program(print_program(program)).weights == weights
        value = weights.evaluate(name, checkpoint)
        assert tuple(value.shape) == checkpoint.weights[name].shape
        return value

    return read


def same(got, want):
    """Equal to the bit, so that -0 is not 0."""
    assert got.dtype == want.dtype and got.shape == want.shape
    integer = {4: torch.int32, 2: torch.int16}[got.itemsize]
    assert torch.equal(got.view(integer), want.contiguous().view(integer))


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# fp8, as transformers and DeepSeek write it


def fp8(block, **more):
    return {"quant_method": "fp8", "weight_block_size": block, **more}


def transformers_fp8(name, weight, block, scale_fmt="float"):
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))
    return Fp8Quantize(config)._quantize_one(name, weight)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("shape, block", [((256, 384), [128, 128]), ((24, 96), [1, 32]), ((3, 16, 64), [8, 32])])
def test_fp8_blocks_equal_transformers(read, shape, block, scale_fmt):
    name = W if len(shape) == 2 else "model.experts.gate_up_proj"
    tensors = transformers_fp8(name, values(*shape), block, scale_fmt)
    scales = tensors[f"{name}_scale_inv"]
    assert scales.dtype == (E8M0 if scale_fmt == "ue8m0" else torch.float32)
    want = Fp8Dequantize(None)._dequantize_one(tensors[name], scales, torch.float32)
    same(read(fp8(block), tensors, name), want)
    if scale_fmt == "ue8m0":  # Inkling-2 stores the same exponents as plain bytes
        same(read(fp8(block), {**tensors, f"{name}_scale_inv": scales.view(torch.uint8)}, name), want)


@pytest.mark.parametrize("shape", [(130, 200), (1, 1), (127, 129), (2, 300, 65)])
def test_blocks_that_the_shape_does_not_fill(read, shape):
    block = [128, 128]
    codes = values(*shape).mul(50).to(E4M3)
    scales = values(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), seed=1)
    want = _dequantize_fp8_weight(codes, scales, block, torch.float32)
    same(read(fp8(block), {W: codes, f"{W}_scale_inv": scales}), want)


def test_more_rows_than_are_worked_on_at_once(read, monkeypatch):
    monkeypatch.setattr("tmlc.ir.dequantize._CHUNK", 700)
    codes, scales = values(67, 90).to(E4M3), values(6, 3, seed=1)
    want = _dequantize_fp8_weight(codes, scales, [12, 32], torch.float32)
    same(read(fp8([12, 32]), {W: codes, f"{W}_scale_inv": scales}), want)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_every_fp8_code_with_every_exponent(read, kind):
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    codes = torch.where(torch.isfinite(codes.float()), codes.float(), torch.zeros(())).to(kind)
    top = 247 - (0 if kind == E5M2 else -1) - math.ceil(math.log2(codes.float().max()))
    weight, scales = codes.expand(top, 256), torch.arange(top, dtype=torch.uint8)[:, None].expand(top, 8)
    want = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    got = read(fp8([1, 32]), {W: weight, f"{W}_scale_inv": scales})
    same(got, want)
    assert (got[0] != 0).any() and (got.abs() < 2**-126).any()  # subnormal numbers stay


def test_one_scale_a_tensor_and_a_scale_for_each_half_of_gate_up(read):
    codes = values(6, 10).to(E4M3)
    for scale in (torch.tensor(0.3), torch.tensor([0.3])):
        same(read(fp8(None), {W: codes, f"{W}_scale_inv": scale}), codes.float() * 0.3)
    name, codes, scales = "experts.gate_up_proj", values(3, 8, 5).to(E4M3), values(3, 2, 1, seed=1)
    want = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    same(read(fp8(None), {name: codes, f"{name}_scale_inv": scales}, name), want)


@pytest.mark.parametrize("scale", ["proj.scale", "proj.qscale_weight"])
def test_scales_by_other_names_and_fp4_experts(read, scale):
    packed, scales = bytes_of(8, 32).view(torch.int8), torch.randint(100, 140, (8, 2), dtype=torch.uint8)
    want = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32)
    unused = {"proj.input_scale": torch.ones(1)}
    config = fp8([128, 128], expert_dtype="fp4")
    same(read(config, {"proj.weight": packed, scale: scales, **unused}, "proj.weight"), want)


def test_the_hub_form_of_inkling_2_needs_no_quantization_config(tmp_path, write_checkpoint):
    name = "model.llm.layers.1.mlp.experts.w2_weight"
    codes, scales = values(2, 4, 64).to(E4M3), torch.randint(100, 140, (2, 4, 2), dtype=torch.uint8)
    write_checkpoint(tmp_path, {"model_type": "inkling2"}, {name: codes, f"{name}_scale": scales, "a": torch.ones(1)})
    checkpoint, weights = open_checkpoint(tmp_path), WeightMap()
    assert list(checkpoint.weights) == ["a", name] or list(checkpoint.weights) == [name, "a"]
    checkpoint.weights[name].declare(weights, name, "f32")
    same(weights.evaluate(name, checkpoint), Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))


# mxfp4, as gpt-oss has it


def test_gpt_oss_blocks_equal_transformers_with_their_transpose(read):
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": bytes_of(3, 10, 2, 16), f"{name}_scales": bytes_of(3, 10, 2, seed=1) % 252}
    want = convert_moe_packed_tensors(*tensors.values(), dtype=torch.float32)
    assert want.shape == (3, 64, 10)
    same(read({"quant_method": "mxfp4"}, tensors, name), want)
    want = convert_moe_packed_tensors(*tensors.values(), dtype=torch.bfloat16)
    same(read({"quant_method": "mxfp4"}, tensors, name, "bf16"), want)


def test_every_pair_of_fp4_codes_with_every_exponent(read):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 252, 16, 16)
    scales = torch.arange(252, dtype=torch.uint8).reshape(1, 252, 1).expand(1, 252, 16)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    same(read({"quant_method": "mxfp4"}, {"w_blocks": blocks, "w_scales": scales}, "w"), want)


# compressed-tensors


def scheme(form, **weights):
    """The group of a config, and the package's own scheme."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **weights}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return config, QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))


def compressed(form, weight, dtype, **weights):
    """(config, tensors as stored, the weight that the package decompresses)."""
    config, made = scheme(form, **weights)
    args, (rows, cols) = made.weights, weight.shape
    size = {"group": args.group_size, "tensor_group": args.group_size}.get(args.strategy)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -cols % width, 0, -rows % height))
        low, high = padded.reshape(-(-rows // height), height, -(-cols // width), width).aminmax(dim=3)
        low, high = low.amin(1), high.amax(1)
    elif args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        low, high = weight.reshape(rows, -1, size or cols).aminmax(dim=2)
    state, more = {"weight": weight.to(dtype)}, {}
    if form == "nvfp4-pack-quantized":
        more["global_scale"] = state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1).float()
    scale, zero = calculate_qparams(low, high, args, **more)
    # The package leaves the zero scale of an empty group to its observers.
    state |= {"weight_scale": scale.to(torch.float32 if "fp4" in form or form.startswith("mx") else dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, made)
    want = compressor.decompress(stored, made)["weight"]
    stem = W.removesuffix("weight")
    return config, {stem + key: value.detach() for key, value in stored.items()}, want


def check(read, form, weight, dtype, **weights):
    config, tensors, want = compressed(form, weight, dtype, **weights)
    # float16 is not a dtype of the IR; float32 holds it exactly
    same(read(config, tensors, dtype="bf16" if want.dtype == torch.bfloat16 else "f32"),
         want.float() if want.dtype == torch.float16 else want)  # fmt: skip
    same(read(config, tensors), want.float())


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 3])
def test_packed_integers_by_group_and_channel(read, bits, symmetric, dtype):
    args = {"num_bits": bits, "symmetric": symmetric}
    check(read, "pack-quantized", values(13, 96), dtype, strategy="group", group_size=32, **args)
    check(read, "pack-quantized", values(9, 37), dtype, strategy="channel", **args)  # 37: the last word is not full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, kind", [("int-quantized", "int"), ("float-quantized", "float"),
                                        ("naive-quantized", "int"), ("naive-quantized", "float")])  # fmt: skip
def test_int8_and_fp8_by_tensor_channel_group_and_block(read, form, kind, dtype):
    check(read, form, values(11, 21), dtype, type=kind, strategy="tensor")
    check(read, form, values(11, 21), dtype, type=kind, strategy="channel")
    check(read, form, values(6, 32), dtype, type=kind, strategy="group", group_size=8)
    check(read, form, values(20, 35), dtype, type=kind, strategy="block", block_structure=[8, 16])


def test_asymmetric_int8(read):
    check(read, "int-quantized", values(11, 21) + 1, torch.bfloat16, symmetric=False, strategy="channel")


def test_nvfp4_mxfp4_and_mxfp8(read):
    four = {"num_bits": 4, "type": "float"}
    check(read, "nvfp4-pack-quantized", values(7, 48), torch.bfloat16, strategy="tensor_group", group_size=16, **four)
    mx = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    check(read, "mxfp4-pack-quantized", values(7, 96), torch.bfloat16, **mx, **four)
    check(read, "mxfp8-quantized", values(7, 96), torch.bfloat16, type="float", **mx)


@pytest.mark.parametrize("total", [1.0, 3.7e-5, 2688.0, 1.1e6])
def test_every_pair_of_fp4_codes_with_every_scale_of_nvfp4(read, total):
    config, made = scheme("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scales = torch.arange(256, dtype=torch.uint8)
    scales = scales[(scales & 0x7F) != 0x7F].view(E4M3)[:, None].expand(254, 32)
    packed = torch.arange(256, dtype=torch.uint8).expand(254, 256)
    state = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([total])}
    want = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, made)["weight"]
    same(read(config, {W.removesuffix("weight") + key: value for key, value in state.items()}, dtype="bf16"), want)


@pytest.mark.parametrize("form", ["mxfp4-pack-quantized", "mxfp8-quantized"])
def test_every_exponent_of_the_mx_forms(read, form):
    config, made = scheme(form, num_bits=4 if "fp4" in form else 8, type="float", strategy="group", group_size=32,
                          scale_dtype="torch.uint8")  # fmt: skip
    codes = torch.arange(256, dtype=torch.uint8).expand(240, 256)
    groups = 16
    if form == "mxfp8-quantized":
        groups, codes = 8, torch.where((codes & 0x7F) == 0x7F, 0, codes).view(E4M3)
    scales = torch.arange(240, dtype=torch.uint8)[:, None].expand(240, groups)
    state = {"weight" if groups == 8 else "weight_packed": codes, "weight_scale": scales}
    want = BaseCompressor.get_value_from_registry(form).decompress(state, made)["weight"]
    same(read(config, {W.removesuffix("weight") + key: value for key, value in state.items()}, dtype="bf16"), want)


def test_several_groups_tensors_that_only_run_time_needs_and_plain_neighbours(tmp_path, write_checkpoint):
    config, tensors, want = compressed("pack-quantized", values(4, 64), torch.float32, num_bits=4, strategy="channel")
    other, more, wide = compressed("float-quantized", values(4, 6), torch.float32, type="float", strategy="tensor")
    more = {key.replace("proj", "down"): value for key, value in more.items()}
    config["config_groups"]["group_0"]["format"] = config["format"]
    second = {**other["config_groups"]["group_0"], "targets": ["re:.*down$"], "format": "float-quantized"}
    config["config_groups"]["group_1"], config["format"] = second, "mixed-precision"
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    plain = {"model.layers.0.down.input_scale": torch.ones(1), "model.layers.0.attn.k_scale": torch.ones(1),
             "model.norm.weight": torch.ones(3)}  # fmt: skip
    write_checkpoint(tmp_path, {"text_config": {"quantization_config": config}}, {**tensors, **more, **plain})
    checkpoint, weights = open_checkpoint(tmp_path), WeightMap()
    assert sorted(checkpoint.weights) == ["model.layers.0.down.weight", W, "model.norm.weight"]
    for name, value in ((W, want), ("model.layers.0.down.weight", wide)):
        checkpoint.weights[name].declare(weights, name, "f32")
        same(weights.evaluate(name, checkpoint), value)


# modelopt, by its formulas: the package itself needs more than these tests should


def test_modelopt_multiplies_scales(read):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed, scales = bytes_of(5, 24), values(5, 3).abs().to(E4M3)
    codes = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).reshape(5, 48)
    for total in (torch.tensor(0.0123), torch.tensor([7.7e-4])):
        tensors = {W: packed, f"{W}_scale": scales, f"{W}_scale_2": total, W.replace("weight", "input_scale"): total}
        want = codes * (scales.float() * total).repeat_interleave(16, 1)
        same(read({"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors), want)
    codes = values(5, 64).to(E4M3)
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    same(read(config, {W: codes, f"{W}_scale": torch.tensor(0.1)}), codes.float() * 0.1)
    same(read({**config, "quant_algo": "MXFP8"}, {W: codes, f"{W}_scale": bytes_of(5, 2) % 240}),
         Fp8Dequantize(None)._dequantize_one(codes, bytes_of(5, 2) % 240, torch.float32))  # fmt: skip
    rows = values(5).abs()
    same(read({**config, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, {W: codes, f"{W}_scale": rows}),
         codes.float() * rows[:, None])  # fmt: skip


# plain tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, E4M3, E5M2])
def test_plain_tensors_of_every_dtype_are_read_exactly(tmp_path, write_checkpoint, dtype):
    if dtype.itemsize == 1:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    else:
        codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    codes = codes[torch.isfinite(codes.float())]
    write_checkpoint(tmp_path, {}, {"w": codes})
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.require({"w": (tuple(codes.shape), True)}, lambda name: False)
    checkpoint.scan_finite()
    for wanted in ("f32", "bf16"):
        weights = WeightMap()
        checkpoint.weights["w"].declare(weights, "w", wanted)
        same(weights.evaluate("w", checkpoint), codes.to(torch.float32 if wanted == "f32" else torch.bfloat16))


@pytest.mark.parametrize("kind, code", [(E4M3, 0x7F), (E5M2, 0x7C), (E5M2, 0xFD)])
def test_plain_fp8_that_is_not_finite_is_named(tmp_path, write_checkpoint, kind, code):
    write_checkpoint(tmp_path, {}, {"w": torch.tensor([1, code], dtype=torch.uint8).view(kind)})
    with pytest.raises(CheckpointError, match=r"w \(1 (NaN|infinite) of 2\)"):
        open_checkpoint(tmp_path).scan_finite()


# what is refused


def refuses(read, config, tensors, *words, name=W):
    with pytest.raises(CheckpointError) as caught:
        read(config, tensors, name)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_named(read, code):
    codes = torch.tensor([[1, code, 3, 4]], dtype=torch.uint8).view(E4M3)
    tensors = {W: codes, f"{W}_scale_inv": torch.ones(1, 1)}
    refuses(read, fp8([128, 128]), tensors, "1 of 4: codes that are NaN", W)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_named(read, scale):
    tensors = {W: torch.ones(2, 2).to(E4M3), f"{W}_scale_inv": torch.tensor([[scale]])}
    refuses(read, fp8([128, 128]), tensors, "1 of 1: scales that are NaN", f"{W}_scale_inv")


@pytest.mark.parametrize("kind", [torch.uint8, E8M0])
def test_the_nan_exponent_is_named(read, kind):
    scales = torch.tensor([[127, 255]], dtype=torch.uint8).view(kind)
    tensors = {W: torch.ones(1, 64).to(E4M3), f"{W}_scale_inv": scales}
    refuses(read, fp8([1, 32]), tensors, "1 of 2: scales that are NaN (e8m0 code 255)")


def test_values_that_overflow_are_named(read):
    tensors = {W: torch.full((1, 32), 448.0).to(E4M3), f"{W}_scale_inv": torch.tensor([[254]], dtype=torch.uint8)}
    refuses(read, fp8([1, 32]), tensors, "too large for f32", W)


@pytest.mark.parametrize("value, word", [(0.0, "zero to divide by"), (float("nan"), "global scale that is NaN")])
def test_a_global_scale_that_means_nothing_is_named(read, value, word):
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config, tensors, _ = compressed("nvfp4-pack-quantized", values(4, 32), torch.bfloat16, **args)
    refuses(read, config, {**tensors, f"{W}_global_scale": torch.tensor([value])}, word, "global_scale")


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3, 3), (1, 6), (6,), (3, 2, 1)])
def test_scales_of_another_shape_are_refused(read, shape):
    tensors = {W: torch.ones(20, 15).to(E4M3), f"{W}_scale_inv": torch.ones(shape)}
    words = (W, "the scales are", "blocks of 8x8 of [20, 15] have [3, 2]")
    if shape != (3, 2, 1):  # an axis of one more is the same numbers
        refuses(read, fp8([8, 8]), tensors, *words)
    else:
        assert read(fp8([8, 8]), tensors).shape == (20, 15)


def test_scales_of_another_dtype_or_none_are_refused(read):
    codes = torch.ones(8, 8).to(E4M3)
    refuses(read, fp8([8, 8]), {W: codes, f"{W}_scale_inv": torch.ones(1, 1, dtype=torch.int64)}, "the scales are i64")
    refuses(read, fp8([8, 8]), {W: codes}, W, "'model.layers.0.proj.weight_scale_inv' is missing")
    blocks = {"w_blocks": bytes_of(2, 4, 2, 16)}
    refuses(read, {"quant_method": "mxfp4"}, blocks, "'w_scales' is missing", name="w")
    refuses(read, {"quant_method": "mxfp4"}, {"w_blocks": bytes_of(4, 2, 16)}, "not [experts", name="w")
    blocks["w_scales"] = bytes_of(2, 4, 1)
    refuses(read, {"quant_method": "mxfp4"}, blocks, "have [2, 4, 2]", name="w")


def test_damaged_packed_weights_are_refused(read):
    args = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    config, tensors, _ = compressed("pack-quantized", values(9, 64), torch.float32, **args)
    for key, value, word in [
        ("weight_shape", torch.tensor([9, 80]), "the codes are i32[9, 8]"),
        ("weight_shape", torch.tensor([-9, 64]), "not [-9, 64]"),
        ("weight_shape", torch.tensor([576]), "not [576]"),
        ("weight_shape", torch.ones(2), "not a shape"),
        ("weight_scale", torch.ones(9, 3), "have [9, 2]"),
        ("weight_scale", torch.ones(9, 2).to(E4M3), "is F8_E4M3"),
        ("weight_zero_point", torch.ones(3, 2, dtype=torch.int32), "zero points"),
        ("weight_packed", tensors[f"{W}_packed"][:, :7], "the codes are"),
    ]:
        refuses(read, config, {**tensors, W.replace("weight", key): value}, word)
    for key in ("weight_shape", "weight_scale", "weight_zero_point"):
        rest = {name: value for name, value in tensors.items() if not name.endswith(key)}
        refuses(read, config, rest, "is missing", key)


@pytest.mark.parametrize(
    "config, word",
    [
        ({"quant_method": "gptq", "bits": 4}, "quantisation 'gptq'"),
        ({}, "quantisation None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ],
)
def test_unknown_quantisations_are_refused_before_any_work(read, config, word):
    refuses(read, config, {"w": torch.ones(1)}, word, "config.json", name="w")


def test_unknown_compressed_forms_are_refused(read):
    args = {"num_bits": 4, "strategy": "channel"}
    config, tensors, _ = compressed("pack-quantized", values(4, 64), torch.float32, **args)
    group = config["config_groups"]["group_0"]
    for change, word in [
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"format": "mixed-precision"}, "'mixed-precision'"),
        ({"config_groups": {"a": {**group, "targets": ["lm_head.x"]}}}, "no group"),
        ({"config_groups": {"a": group, "b": group}}, "2 groups quantise"),
        ({"config_groups": {"a": {**group, "targets": ["re:("]}}}, "not a pattern"),
        ({"config_groups": {"a": {**group, "weights": {**group["weights"], "type": "float"}}}}, "is not known"),
        ({"config_groups": {"a": {**group, "weights": {**group["weights"], "strategy": "token"}}}}, "'token'"),
    ]:
        refuses(read, {**config, **change}, tensors, word)
    refuses(read, config, {**tensors, f"{W}_g_idx": torch.ones(64, dtype=torch.int32)}, "g_idx")
    refuses(read, config, {**tensors, W: torch.ones(4, 64)}, "is there twice")


def test_a_quantization_config_that_is_no_object_is_refused(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path, {"quantization_config": []}, {"w": torch.ones(1)})
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == []
    with pytest.raises(CheckpointError, match="not an object"):
        open_checkpoint(tmp_path).weights  # noqa: B018
