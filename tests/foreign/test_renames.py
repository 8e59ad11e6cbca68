"""A new version of transformers may rename a module or write an operation in another way. Matching is by form: a name
changes nothing; a form that is not known ends in an error that says where, and no package is left that does less."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen3 import modeling_qwen3

import tmlc
from tmlc.errors import CheckpointError, FrontendError
from tmlc.frontend import load_program
from tmlc.frontend.foreign import match_counts
from tmlc.ir.text import print_program

#: family, class, the name it gives a part, another name for it, a tensor of the checkpoint that it then asks for.
RENAMED = [
    ("qwen3", "Qwen3DecoderLayer", "self_attn", "attention", "model.layers.0.attention.q_proj.weight"),
    ("qwen3", "Qwen3DecoderLayer", "input_layernorm", "norm_1", "model.layers.0.norm_1.weight"),
    ("qwen3", "Qwen3RMSNorm", "weight", "gain", "model.layers.0.self_attn.q_norm.gain"),
    ("qwen3_moe", "Qwen3MoeExperts", "gate_up_proj", "wi", "model.layers.0.mlp.experts.wi"),
    ("qwen3_moe", "Qwen3MoeDecoderLayer", "mlp", "ffn", "model.layers.0.ffn.experts.gate_up_proj"),
    ("gpt_oss", "GptOssAttention", "sinks", "drains", "model.layers.0.self_attn.drains"),
    ("deepseek_v3", "DeepseekV3MoE", "shared_experts", "always", "model.layers.1.mlp.always.gate_proj.weight"),
]


def modeling(family):
    return sys.modules[f"transformers.models.{family}.modeling_{family}"]


def rename(patch, family, owner, old, new):
    """Modules of the class hold a part under another name; their code still finds it under the old one."""
    cls = getattr(modeling(family), owner)
    build = cls.__init__

    def renamed(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for held in (self._modules, self._parameters):
            if old in held:
                for name in list(held):
                    held[new if name == old else name] = held.pop(name)

    patch.setattr(cls, "__init__", renamed)
    patch.setattr(cls, old, property(lambda self: getattr(self, new)), raising=False)


def matches(folder, out):
    """Calls of each op that the frontend matched, and how often each pass did."""
    report = tmlc.compile(folder, out, precision="fp32", stop_after="fuse.attention_epilogue")
    return report.passes[0].notes, [(record.name, record.matches) for record in report.passes]


@pytest.mark.parametrize(("family", "owner", "old", "new", "tensor"), RENAMED)
def test_a_renamed_part_gives_the_same_matches_or_an_error_that_names_its_tensor(
    saved, monkeypatch, tmp_path, family, owner, old, new, tensor
):
    seed = 1 if family == "deepseek_v3" else 0  # where its first layer is dense
    folder = saved(family, seed)
    before = matches(folder, tmp_path / "x.tmlc")
    rename(monkeypatch, family, owner, old, new)
    with pytest.raises(CheckpointError) as error:  # the checkpoint has the old name
        tmlc.compile(folder, tmp_path / "x.tmlc")
    assert error.value.what.startswith("missing tensors") and tensor in error.value.what
    assert not (tmp_path / "x.tmlc").exists()
    again = saved(family, seed)  # and here the new one
    assert tensor in load_file(again / "model.safetensors")
    assert matches(again, tmp_path / "x.tmlc") == before


def test_a_tensor_too_many_is_found_whatever_the_norms_are_called(saved, monkeypatch):
    rename(monkeypatch, "qwen3", "Qwen3DecoderLayer", "input_layernorm", "norm_1")
    folder = saved("qwen3", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.1\.self_attn\.q_proj\.bias"):
        load_program(folder)


def test_the_name_of_a_class_says_nothing(saved, monkeypatch):
    folder = saved("qwen3", 0)
    before = print_program(load_program(folder), sources=False)
    for name in ("Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"):
        other = type(name.replace("Qwen3", "New"), (getattr(modeling_qwen3, name),), {})
        monkeypatch.setattr(modeling_qwen3, name, other)
    assert print_program(load_program(folder), sources=False) == before


def reversed_product(self, x):
    return self.down_proj(self.up_proj(x) * nn.functional.silu(self.gate_proj(x)))


def halves_by_chunk(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@pytest.mark.parametrize(
    ("name", "function"), [("Qwen3MLP.forward", reversed_product), ("rotate_half", halves_by_chunk)]
)
def test_known_forms_are_one_to_the_matchers(saved, monkeypatch, name, function):
    folder = saved("qwen3", 0)
    before = match_counts(load_program(folder))
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(modeling_qwen3, owner) if owner else modeling_qwen3, attribute, function)
    assert match_counts(load_program(folder)) == before


def fused_norm(self, x):
    return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def dividing_norm(self, x):
    return self.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def squaring_norm(self, x):
    return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon))


def spelled_silu(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


def scaled_silu(self, x):
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * 0.5 * self.up_proj(x))


def plain_products(self, x):
    return self.down_proj(nn.functional.silu(x @ self.gate_proj.weight.T) * (x @ self.up_proj.weight.T))


def rolled_halves(x):
    half = x.shape[-1] // 2
    sign = torch.cat([-torch.ones(half, device=x.device), torch.ones(half, device=x.device)])
    return torch.roll(x, half, -1) * sign


def fused_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    made = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return made.transpose(1, 2).contiguous(), None


def spelled_softmax(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    groups = module.num_key_value_groups
    keys, values = (modeling_qwen3.repeat_kv(x, groups) for x in (key, value))
    scores = torch.exp(torch.matmul(query, keys.transpose(2, 3)) * scaling + attention_mask)
    return torch.matmul(scores / scores.sum(-1, keepdim=True), values).transpose(1, 2).contiguous(), None


def sorting_router(self, x):
    logits = nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    scores, order = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True)
    return logits, scores[:, : self.top_k], order[:, : self.top_k]


@pytest.mark.parametrize(
    ("family", "name", "function", "where", "op"),
    [
        ("qwen3", "Qwen3RMSNorm.forward", fused_norm, "input_layernorm", "aten.rms_norm"),
        ("qwen3", "Qwen3RMSNorm.forward", dividing_norm, "input_layernorm", "aten.sqrt"),
        ("qwen3", "Qwen3RMSNorm.forward", squaring_norm, "input_layernorm", "aten.mul"),
        ("qwen3", "Qwen3MLP.forward", spelled_silu, "layers.0.mlp", "aten.sigmoid"),
        ("qwen3", "Qwen3MLP.forward", scaled_silu, "layers.0.mlp", "aten.mul"),
        ("qwen3", "Qwen3MLP.forward", plain_products, "layers.0.mlp", "aten.numpy_T"),
        ("qwen3", "rotate_half", rolled_halves, "layers.0.self_attn", "aten.roll"),
        ("qwen3", "eager_attention_forward", fused_attention, "self_attn", "scaled_dot_product_attention"),
        ("qwen3", "eager_attention_forward", spelled_softmax, "self_attn", "aten.exp"),
        ("qwen3_moe", "Qwen3MoeTopKRouter.forward", sorting_router, "layers.0.mlp", "aten.sum"),
    ],
)
def test_another_form_of_an_operation_is_an_error_with_module_op_and_line_and_no_package(
    saved, monkeypatch, tmp_path, family, name, function, where, op
):
    folder = saved(family, 0)
    owner, _, attribute = name.rpartition(".")
    module = modeling(family)
    monkeypatch.setattr(getattr(module, owner) if owner else module, attribute, function)
    with pytest.raises(FrontendError) as error:
        tmlc.compile(folder, tmp_path / "x.tmlc")
    miss = error.value.near_misses[0]
    assert where in miss.module and op in miss.op and ".py:" in miss.source
    assert str(miss) in str(error.value)
    assert not (tmp_path / "x.tmlc").exists()
