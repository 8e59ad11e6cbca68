"""What is matched beyond numbers, and errors that name what is not understood."""

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3 import modeling_qwen3

from tmlc.errors import FrontendError
from tmlc.frontend import load_program


def test_the_program_is_one_of_tokens_like_our_own(saved):
    program = load_program(saved("llama", 0))
    assert program.meta["kind"] == "tokens" and program.meta["tick"]["eos"] == [2]
    assert {name: [n.meta["role"][1] for n in m.inputs] for name, m in program.methods.items()} == {
        "embed_text": ["ids"],
        "decode": ["x"],
        "unembed": ["hidden"],
        "next_token": ["hidden", "key", "temperature"],
    }


def test_partial_rotation_is_one_op_over_a_part_of_the_head(saved):
    program = load_program(saved("glm4_moe", 0))
    (node, *_) = program.methods["decode"].calls("rope")
    heads, offset, width = node.args[2], node.args[3], 2 * node.args[1].meta["type"].cols
    assert (offset, width) == (0, node.args[0].meta["type"].cols // heads // 2)
    program = load_program(saved("deepseek_v3", 0))
    (query, *_) = program.methods["decode"].calls("rope")
    rotated = 2 * query.args[1].meta["type"].cols
    assert query.args[3] == query.args[0].meta["type"].cols // query.args[2] - rotated, "its last columns"




def erf_norm(self, x):
    return self.weight * torch.erf(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def norm_over_positions(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.variance_epsilon))


def leaky_mlp(self, x):
    return self.down_proj(nn.functional.leaky_relu(self.gate_proj(x)) * self.up_proj(x))


def sqrt_router(self, x):
    logits = nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    weights, chosen = torch.topk(torch.softmax(logits, -1), self.top_k, dim=-1)
    return logits, torch.sqrt(weights), chosen


def wide_gate(self, gate_up):
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-6.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize(
    "family, module, name, function, where, reason",
    [
        ("qwen3", modeling_qwen3, "Qwen3RMSNorm.forward", erf_norm, "input_layernorm", "aten.erf"),
        ("qwen3", modeling_qwen3, "Qwen3RMSNorm.forward", norm_over_positions, "input_layernorm", "over the last axis"),
        ("qwen3", modeling_qwen3, "Qwen3MLP.forward", leaky_mlp, "layers.0.mlp", "aten.leaky_relu"),
        ("mixtral", modeling_mixtral, "MixtralTopKRouter.forward", sqrt_router, "layers.0.mlp", "router's weights"),
        ("gpt_oss", modeling_gpt_oss, "GptOssExperts._apply_gate", wide_gate, "mlp.experts", "up to -6.0..7.0"),
    ],
)
def test_a_model_that_is_nearly_understood_is_refused_with_reason_and_place(
    saved, monkeypatch, family, module, name, function, where, reason
):
    owner, method = name.split(".")
    folder = saved(family, 0)
    monkeypatch.setattr(getattr(module, owner), method, function)
    with pytest.raises(FrontendError) as error:
        load_program(folder)
    miss = error.value.near_misses[0]
    assert where in miss.module and reason in str(miss) and ".py:" in miss.source
    assert str(miss) in str(error.value)


def test_a_mask_that_is_not_causal_is_not_taken_for_one(saved, monkeypatch):
    causal = modeling_qwen3.create_causal_mask

    def backwards(**kwargs):
        return causal(**kwargs).flip(-1)

    folder = saved("qwen3", 1)
    monkeypatch.setattr(modeling_qwen3, "create_causal_mask", backwards)
    with pytest.raises(FrontendError, match="the mask is not causal"):
        load_program(folder)


def test_other_angles_are_not_taken_for_rotary_ones(saved, monkeypatch):
    forward = modeling_qwen3.Qwen3RotaryEmbedding.forward

    def shifted(self, x, position_ids):
        return forward(self, x, position_ids + 1)

    folder = saved("qwen3", 1)
    monkeypatch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", shifted)
    with pytest.raises(FrontendError, match="neither the cosine nor the sine of position times frequency"):
        load_program(folder)
