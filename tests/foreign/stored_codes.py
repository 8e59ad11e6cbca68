"""Writes tensors of a checkpoint as gpt-oss (MXFP4 experts) and DeepSeek-V3 (FP8 blocks) store them. The tests of the
frontend and of the GPU room take it too."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

#: Older versions of transformers have not the dequantiser whose values are the measure.
THERE = hasattr(finegrained_fp8, "_dequantize_fp8_weight")


def mxfp4(tensors):
    """Every stack of routed experts as blocks and exponents, input axis first."""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
            experts, rows, cols = tensor.shape
            blocks = torch.randint(0, 256, (experts, cols, rows // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"quant_method": "mxfp4"}, stored, plain


def fp8(tensors):
    """Every projection in blocks that its shape does not fill, experts one by one as they are on disk."""
    stored, plain, block = dict(tensors), dict(tensors), [12, 20]
    for name, tensor in tensors.items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            scales = torch.rand(-(-tensor.shape[0] // 12), -(-tensor.shape[1] // 20)) / 100 + 0.001
            codes = (tensor / 0.006).to(torch.float8_e4m3fn)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = finegrained_fp8._dequantize_fp8_weight(codes, scales, block, torch.float32)
    return {"quant_method": "fp8", "weight_block_size": block}, stored, plain


def store(plain: Path, stored: Path, write) -> None:
    """Makes of the checkpoint `plain` one with codes, `stored`, and gives `plain` the values of these codes."""
    torch.manual_seed(1)
    config, codes, values = write(load_file(plain / "model.safetensors"))
    assert set(codes) != set(values)
    shutil.copytree(plain, stored)
    for folder, tensors in ((stored, codes), (plain, values)):
        whole = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    path = stored / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


#: (family, how its tensors are stored, changes to its config)
WAYS = [("gpt_oss", mxfp4, {"hidden_size": 64, "intermediate_size": 32}), ("deepseek_v3", fp8, {})]
