"""Foreign checkpoints stored quantised, as gpt-oss (MXFP4 experts) and DeepSeek-V3 (FP8 blocks) come, compile to
the engine that their dequantised twins compile to.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import tmlc

if not hasattr(finegrained_fp8, "_dequantize_fp8_weight"):
    pytest.skip("needs the dequantiser of transformers 5.22", allow_module_level=True)


def mxfp4(tensors):
    """Every stack of experts as blocks and exponents, input axis first."""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
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


@pytest.mark.parametrize(
    ("family", "write", "changes"),
    [("gpt_oss", mxfp4, {"hidden_size": 64, "intermediate_size": 32}), ("deepseek_v3", fp8, {})],
)
def test_the_engine_is_that_of_the_dequantised_checkpoint(family, write, changes, saved, tmp_path):
    saved(family, 0, **changes).rename(tmp_path / "plain")
    torch.manual_seed(1)
    config, stored, plain = write(load_file(tmp_path / "plain" / "model.safetensors"))
    assert set(stored) != set(plain)
    shutil.copytree(tmp_path / "plain", tmp_path / "stored")
    for folder, tensors in (("stored", stored), ("plain", plain)):
        whole = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(whole, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "stored" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    answers = []
    for folder in ("stored", "plain"):
        tmlc.compile(tmp_path / folder, tmp_path / f"{folder}.tmlc", precision="fp32")
        with tmlc.load(tmp_path / f"{folder}.tmlc", threads=1) as engine, engine.session() as session:
            answers.append(session.append(tokens=list(range(30))))
    assert np.isfinite(answers[0]).all() and answers[0].std() > 0.01
    assert answers[0].tobytes() == answers[1].tobytes()
