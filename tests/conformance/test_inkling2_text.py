"""The compiled CPU engine against `Inkling2ForCausalLM` of transformers, on checkpoints that `save_pretrained`
writes."""

import json

import pytest
import torch
import transformers
from inkling2_models import compiled, draw, hold, hold_bf16, random_model
from safetensors.torch import load_file, save_file

import tmlc
from tmlc.errors import CheckpointError
from tmlc.frontend import load_program, open_checkpoint

if not hasattr(transformers, "Inkling2ForCausalLM"):
    pytest.skip("needs Inkling2ForCausalLM, which transformers has from 5.23 on", allow_module_level=True)

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 9))]


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers_whole_and_in_random_chunks(seed, tmp_path):
    settings = draw(seed)
    model = random_model(settings, seed)
    matches = compiled(model, tmp_path, seed, "model.llm.attn_res.output_query")
    sliding, full = (settings["layer_types"].count(kind) for kind in ("hybrid_sliding", "hybrid"))
    # q, r, gate and sinks, with k and v where they read the same input; else k and v each with their computed taps
    assert matches["fuse.merge_linears"] == sliding + 3 * full
    assert matches["state.insert"] == 5 * (sliding + full)
    # behind attention and experts, and keys and values where their taps are fixed
    assert matches["fuse.conv"] == 2 * full + 4 * sliding and matches["fuse.head"] == 1
    assert matches["route.select_kernel"] == sliding + full
    # every addition of a layer; at a boundary of residual blocks the one behind attention is not there
    boundaries = -(-(sliding + full) // settings["n_layers_per_attn_res_block"])
    assert matches["fuse.attention_epilogue"] == 2 * (sliding + full) - boundaries
    assert matches["fuse.residual_norm"] == matches["route.fuse_router"] == matches["route.stack_experts"] == 0
    hold(tmp_path / "model.tmlc", model, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_bf16_errs_no_more_than_bf16_of_transformers(seed, tmp_path):
    hold_bf16(tmp_path, random_model(draw(seed), seed), seed)


def test_module_names_give_the_same_weights_and_every_tensor_is_read_once(tmp_path):
    settings = {**draw(1), "vocab_size": 61, "unpadded_vocab_size": 54}  # heads with padding, and without
    model = random_model(settings, 1)
    model.save_pretrained(tmp_path / "release")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_bytes((tmp_path / "release" / "config.json").read_bytes())
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "plain" / "model.safetensors")
    one, first = tmlc.program(tmp_path / "release"), open_checkpoint(tmp_path / "release")
    other, second = tmlc.program(tmp_path / "plain"), open_checkpoint(tmp_path / "plain")
    assert set(one.weights.tensors(one.used_weights())) == set(load_file(tmp_path / "release" / "model.safetensors"))
    for name in one.used_weights():
        assert torch.equal(one.weights.evaluate(name, first), other.weights.evaluate(name, second)), name
    assert one.weights["lm_head.weight"].type.shape[0] == settings["unpadded_vocab_size"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_types": ["hybrid", "mamba"], "num_hidden_layers": 2}, "layer_types of layer 1 is 'mamba'"),
        ({"layer_types": ["hybrid"], "num_hidden_layers": 2}, "layer_types must name 2 layers"),
        ({"num_hidden_layers": 64, "layer_types": None, "n_layers_per_attn_res_block": 1}, "64 residual blocks"),
        ({"mlp_gate_softcap": 0.0}, "mlp_gate_softcap"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_its_place(change, what, tmp_path):
    transformers.Inkling2TextConfig(**draw(0)).save_pretrained(tmp_path)
    save_file({"model.llm.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.config.update(change)
    with pytest.raises(CheckpointError) as caught:
        load_program(checkpoint)
    assert what in caught.value.what and caught.value.where and caught.value.fix


def test_mxfp8_experts_of_the_release_are_read_and_taken_apart(tmp_path):
    """Codes and power-of-two scales of 1 x 32, under the release's names; the hub's config does not mention them."""
    settings = {**draw(1), "hidden_size": 32, "moe_intermediate_size": 32}
    random_model(settings, 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator, expected = torch.Generator().manual_seed(0), {}
    for name in [n for n in tensors if n.endswith(("experts.w13_weight", "experts.w2_weight"))]:
        codes = tensors[name].to(torch.float8_e4m3fn)
        exponents = torch.randint(120, 130, (*codes.shape[:-1], 1), generator=generator, dtype=torch.uint8)
        tensors[name], tensors[f"{name}_scale"] = codes, exponents
        expected[name] = codes.float() * torch.exp2(exponents.float() - 127)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["transformers_version"]  # the release was not saved by transformers
    (tmp_path / "config.json").write_text(json.dumps(config))
    program, checkpoint = tmlc.program(tmp_path), open_checkpoint(tmp_path)
    for layer in range(settings["num_hidden_layers"]):
        gate_up = program.weights.evaluate(f"model.layers.{layer}.mlp.experts.gate_up_proj", checkpoint)
        both = expected[f"model.llm.layers.{layer}.mlp.experts.w13_weight"]
        assert torch.equal(gate_up, torch.cat([both[:, ::2], both[:, 1::2]], 1))
        down = program.weights.evaluate(f"model.layers.{layer}.mlp.experts.down_proj", checkpoint)
        assert torch.equal(down, expected[f"model.llm.layers.{layer}.mlp.experts.w2_weight"])
