"""A tiny Inkling whose weights are stored quantised compiles to the engine that its dequantised twin compiles to."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from stored_codes import mxfp4
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

import tmlc
from tmlc.errors import CheckpointError
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.modeling import token_model
from tmlc.package import open_package

SIZES = {"hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 48}
#: projection → (format, weights of the scheme)
SCHEMES = {
    "q_proj": ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)),
    "k_proj": ("pack-quantized", dict(num_bits=4, strategy="group", group_size=16, symmetric=False)),
    "v_proj": ("int-quantized", dict(num_bits=8, strategy="channel")),
    "r_proj": ("mxfp8-quantized", dict(type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")),
    "o_proj": ("float-quantized", dict(type="float", strategy="block", block_structure=[24, 24])),
    "gate_proj": ("mxfp4-pack-quantized",
                  dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")),
    "up_proj": ("pack-quantized", dict(num_bits=8, strategy="channel", symmetric=False)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(inkling_config):
    """(config, state dict) of a model wide enough for every group."""
    config = {**inkling_config, **SIZES}
    model, generator = token_model(TextConfig.from_inkling(config)), torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        wide = 1.0 if "norm" in name or "global_scale" in name else 0.0
        tensors[name] = wide + 0.3 * torch.randn(tensor.shape, generator=generator)
    return config, tensors


def fp8(tensors):
    """Every matrix but the router, and the experts, in blocks that their shapes do not fill."""
    stored, plain, block = {}, {}, [12, 20]
    for name, tensor in tensors.items():
        stored[name] = plain[name] = tensor
        if tensor.dim() >= 2 and "mlp.gate." not in name and "conv" not in name and "rel_logits" not in name:
            grid = [-(-tensor.shape[axis] // block[axis]) for axis in (-2, -1)]
            scales = torch.rand(*tensor.shape[:-2], *grid) / 100 + 0.001
            codes = (tensor / 0.006).to(torch.float8_e4m3fn)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = _dequantize_fp8_weight(codes, scales, block, torch.float32)
    return {"quant_method": "fp8", "weight_block_size": block}, stored, plain


def mxfp8(tensors):
    """The routed experts, in the form of Inkling-2."""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "mlp.experts." in name:
            codes = (tensor * 40).to(torch.float8_e4m3fn)
            scales = torch.randint(120, 124, (*tensor.shape[:-1], 1), dtype=torch.uint8)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    return {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, stored, plain


def compressed(tensors):
    """Every projection in a form of its own."""
    stored, plain, groups = dict(tensors), dict(tensors), {}
    for part, (form, args) in SCHEMES.items():
        args = {"num_bits": 8, "type": "int", "symmetric": True, **args}
        groups[part] = {"targets": [f"re:.*\\.{part}$"], "format": form, "weights": args}
        made = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        compressor = BaseCompressor.get_value_from_registry(form)
        for name in [name for name in tensors if name.endswith(f"{part}.weight")]:
            rows, cols = tensors[name].shape
            count = cols // args.get("group_size", cols)
            shape = (rows, count) if "block_structure" not in args else (-(-rows // 24), -(-cols // 24))
            top = {("float", 4): 6, ("float", 8): 448, ("int", 4): 8, ("int", 8): 128}[args["type"], args["num_bits"]]
            scale = (torch.rand(shape) + 0.5) / top
            state = {"weight": stored.pop(name).bfloat16(), "weight_scale": scale.bfloat16()}
            if form == "nvfp4-pack-quantized":
                state["weight_global_scale"] = torch.tensor([300.0])
                state["weight_scale"] = scale * 300
            if not args["symmetric"]:
                state["weight_zero_point"] = torch.randint(-7, 7, shape, dtype=torch.int8)
            done = compressor.compress(state, made)
            plain[name] = compressor.decompress(done, made)["weight"].float()
            stored |= {name.removesuffix("weight") + key: value for key, value in done.items()}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}, stored, plain


@pytest.mark.parametrize(
    "write", [fp8, mxfp4, compressed, pytest.param(mxfp8, marks=pytest.mark.slow)], ids=lambda write: write.__name__
)
def test_the_engine_is_that_of_the_dequantised_checkpoint(model, write, tmp_path, write_checkpoint):
    torch.manual_seed(0)
    config, tensors = model
    quantization, stored, plain = write(tensors)
    assert set(stored) != set(plain)
    stored = {name: value.detach().contiguous().clone() for name, value in stored.items()}
    plain = {name: value.detach().contiguous().clone() for name, value in plain.items()}
    write_checkpoint(tmp_path / "tiny", {**config, "quantization_config": quantization}, stored)
    write_checkpoint(tmp_path / "plain" / "tiny", config, plain)
    answers, weights = [], []
    for checkpoint in (tmp_path / "tiny", tmp_path / "plain" / "tiny"):
        tmlc.compile(checkpoint, checkpoint / "out.tmlc", precision="fp32")
        with tmlc.load(checkpoint / "out.tmlc", threads=1) as engine, engine.session() as session:
            answers.append(session.append(tokens=list(range(30))))
        with open_package(checkpoint / "out.tmlc") as package:
            weights.append({name: package.tensor(name).tobytes() for name in package.tensors})
    assert np.isfinite(answers[0]).all() and answers[0].std() > 0.01
    assert np.array_equal(answers[0].view(np.int32), answers[1].view(np.int32))
    assert weights[0] == weights[1]


def test_a_nan_among_the_codes_is_named_and_nothing_stays(model, tmp_path, write_checkpoint):
    config, tensors = model
    quantization, stored, _ = mxfp8(tensors)
    folder = write_checkpoint(tmp_path / "tiny", {**config, "quantization_config": quantization}, stored)
    name = "model.layers.2.mlp.experts.down_proj"
    for part, word in ((name, "NaN or infinite"), (f"{name}_scale_inv", "e8m0 code 255")):
        damaged = load_file(folder / "model.safetensors")
        damaged[part].view(torch.uint8)[3, 5, 0] = 255
        save_file(damaged, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=word) as caught:
            tmlc.compile(folder, tmp_path / "out.tmlc")
        assert caught.value.where == part
        assert not (tmp_path / "out.tmlc").exists()
        save_file(stored, folder / "model.safetensors")
