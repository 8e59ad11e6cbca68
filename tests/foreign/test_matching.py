"""What is matched beyond numbers, and errors that name what is not understood."""

import sys
import tomllib

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3 import modeling_qwen3

from tmlc.errors import FrontendError, UsageError
from tmlc.frontend import load_program
from tmlc.frontend.foreign.versions import OLDEST, REFUSED_FROM
from tmlc.ir.text import print_program


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


def mask_of_5_19(causal):
    """Zeros as a tensor of its own, which has no value on the meta device."""

    def mask(**kwargs):
        given = causal(**kwargs)
        return torch.where(given == 0, torch.tensor(0.0, device=given.device), torch.finfo(torch.float32).min)

    return mask


def experts_of_5_17(least=0, most=-1):
    """Numbers of experts are kept inside the stack."""

    def forward(self, x, chosen, weights):
        rows = x.repeat_interleave(chosen.shape[-1], dim=0)
        ids = chosen.reshape(-1).clamp(least, self.num_experts + most)
        gate, up = torch.bmm(self.gate_up_proj[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        made = torch.bmm(self.down_proj[ids], (self.act_fn(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (made * weights.reshape(-1).unsqueeze(-1)).view(*chosen.shape, -1).sum(dim=1)

    return forward


def test_forms_of_older_versions_give_the_same_program(saved, monkeypatch):
    folder = saved("mixtral", 0)
    before = print_program(load_program(folder), sources=False)
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(modeling_mixtral, name, mask_of_5_19(getattr(modeling_mixtral, name)))
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", experts_of_5_17())
    assert print_program(load_program(folder), sources=False) == before


@pytest.mark.parametrize("bounds", [(1, -1), (0, -2)])
def test_a_clamp_that_changes_the_choice_of_experts_is_refused(saved, monkeypatch, bounds):
    folder = saved("mixtral", 0)
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", experts_of_5_17(*bounds))
    with pytest.raises(FrontendError, match="not the flattened result of one router"):
        load_program(folder)


def test_a_router_over_more_experts_than_the_layer_has_is_refused(saved, monkeypatch):
    folder, forward = saved("mixtral", 0), modeling_mixtral.MixtralTopKRouter.forward

    def wider(self, x):
        self.weight = nn.Parameter(torch.cat([self.weight, self.weight])) if len(self.weight) == 5 else self.weight
        return forward(self, x)

    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", wider)
    with pytest.raises(FrontendError):
        load_program(folder)


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("5.16.1", "refused"), ("4.57.6", "refused"), ("6.0.0", "refused"), ("dev", "refused"), ("5.17.0", ""),
     ("5.24.4.dev0", ""), ("5.25.0", "newer than 5.24"), ("5.100.1", "newer than 5.24")],
)  # fmt: skip
def test_versions_outside_the_range_are_refused_and_newer_ones_told(saved, monkeypatch, version, outcome):
    folder = saved("llama", 3)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    if outcome == "refused":
        with pytest.raises(UsageError, match=f"transformers {version} is outside the range .* 5.17 up to"):
            load_program(folder)
    else:
        (notes,) = (load_program(folder).meta.get("notes", []),)
        assert len(notes) == bool(outcome) and all(outcome in note for note in notes)


def test_the_range_is_that_of_the_package(request):
    declared = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())
    (wanted,) = (need for need in declared["project"]["optional-dependencies"]["hf"] if "transformers" in need)
    assert wanted == f"transformers>={OLDEST[0]}.{OLDEST[1]},<{REFUSED_FROM[0]}"


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
