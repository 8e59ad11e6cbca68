"""The compiled CPU engine against `Inkling2LoopForCausalLM` of transformers, on checkpoints that `save_pretrained`
writes."""

import json

import numpy as np
import pytest
import torch
import transformers
from inkling2_models import compiled, draw, hold, hold_bf16, looped, random_model
from safetensors.torch import load_file, save_file

import tmlc
from tmlc.errors import CheckpointError
from tmlc.frontend import load_program, open_checkpoint

if not hasattr(transformers, "Inkling2LoopForCausalLM"):
    pytest.skip("needs Inkling2LoopForCausalLM, which transformers has from 5.24 on", allow_module_level=True)

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]


def visited(settings: dict) -> list[str]:
    """Kinds of the layers that a position goes through, in order."""
    start, end = settings["loop_layer_index_start"], settings["loop_layer_index_end"]
    kinds = settings["layer_types"]
    return kinds[:start] + settings["loop_num_passes"] * kinds[start:end] + kinds[end:]


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_transformers_whole_and_in_random_chunks(seed, tmp_path):
    settings = looped(seed)
    model = random_model(settings, seed)
    matches = compiled(model, tmp_path, seed, "model.llm.middle_cycle_cross_pass_queries")
    kinds = visited(settings)
    assert matches["state.insert"] == 5 * len(kinds) and matches["route.select_kernel"] == len(kinds)
    # q, r, gate and sinks in every pass, k and v with their computed taps, and the two sides of each message's gate
    gates = 4 * (len(kinds) - settings["num_hidden_layers"])
    assert matches["fuse.merge_linears"] == kinds.count("hybrid_sliding") + 3 * kinds.count("hybrid") + gates
    hold(tmp_path / "model.tmlc", model, seed, rounded=2.0)  # layers behind each other: rounding adds up


def test_each_pass_has_states_of_its_own_and_the_weights_are_there_once(tmp_path):
    settings = looped(0)
    assert settings["loop_num_passes"] == 3
    random_model(settings, 0).save_pretrained(tmp_path / "checkpoint")
    report = tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="fp32", stop_after="state.insert")
    keys = [name for name in report.program.states if ".k_cache" in name]
    assert len(keys) == len(visited(settings)) == len(set(keys))
    looping = settings["loop_layer_index_end"] - settings["loop_layer_index_start"]
    assert sum(name.endswith((".2", ".3")) for name in keys) == 2 * looping
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert set(report.program.weights.tensors(report.program.used_weights())) == set(stored)
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="fp32")
    values = sum(tensor.numel() for tensor in stored.values())
    assert (tmp_path / "model.tmlc").stat().st_size < 4 * 1.3 * values + 2_000_000


@pytest.mark.parametrize("seed", [0, 1])
def test_module_names_give_the_same_weights(seed, tmp_path):
    model = random_model(looped(seed), seed)
    model.save_pretrained(tmp_path / "release")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_bytes((tmp_path / "release" / "config.json").read_bytes())
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "plain" / "model.safetensors")
    one, first = tmlc.program(tmp_path / "release"), open_checkpoint(tmp_path / "release")
    other, second = tmlc.program(tmp_path / "plain"), open_checkpoint(tmp_path / "plain")
    names = one.used_weights()
    assert set(names) == set(other.used_weights()) and sum(name.endswith("message_input.query") for name in names) > 0
    for name in names:
        assert torch.equal(one.weights.evaluate(name, first), other.weights.evaluate(name, second)), name


def test_the_section_in_which_the_release_describes_its_loop_is_read(tmp_path):
    settings = looped(0)
    random_model(settings, 0).save_pretrained(tmp_path)
    path, usual = tmp_path / "config.json", tmlc.program(tmp_path)
    config = json.loads(path.read_text())
    names = {"core_start": "loop_layer_index_start", "core_end": "loop_layer_index_end",
             "num_passes": "loop_num_passes", "gate_rank": "loop_gate_rank"}  # fmt: skip
    config["loop_config"] = {key: config.pop(name) for key, name in names.items()} | {"anything": "else"}
    path.write_text(json.dumps(config))
    read = tmlc.program(tmp_path)
    assert str(read.methods["decode"].graph) == str(usual.methods["decode"].graph)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"loop_layer_index_start": 1}, "loop_layer_index_start is 1, inside a residual block of 2 layers"),
        ({"loop_layer_index_end": 5}, "loop_layer_index_end is 5, inside a residual block of 2 layers"),
        ({"loop_layer_index_end": 40}, "the loop goes over layers 2..39 of 6"),
        ({"loop_layer_index_end": 2}, "the loop goes over layers 2..1 of 6"),
        ({"loop_num_passes": 0}, "loop_num_passes"),
        ({"loop_num_passes": 10_000}, "loop_num_passes"),
        ({"loop_num_passes": 4_000}, "4000 passes make 8004 layers"),
        ({"loop_layer_index_start": 0}, "loop_layer_index_start"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_its_place(change, what, tmp_path):
    save_file({"model.llm.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    loop = dict(num_hidden_layers=6, layer_types=None, n_layers_per_attn_res_block=2, loop_layer_index_start=2,
                loop_layer_index_end=4)  # fmt: skip
    config = {"model_type": "inkling2_loop_text", **looped(0), **loop, **change}
    (tmp_path / "config.json").write_text(json.dumps(config, default=np.ndarray.tolist))
    with pytest.raises(CheckpointError) as caught:
        load_program(tmp_path)
    assert what in caught.value.what and caught.value.where and caught.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_errs_no_more_than_bf16_of_transformers(seed, tmp_path):
    hold_bf16(tmp_path, random_model(looped(seed), seed), seed)


VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
              posemb_grid_size=4, projection_hidden_dim=24)  # fmt: skip


@pytest.mark.parametrize("kind", ["Inkling2", "Inkling2Loop"])
@pytest.mark.parametrize("form", ["release", "modules"])
def test_of_a_model_that_sees_the_text_model_is_read_and_the_report_says_so(kind, form, tmp_path):
    settings = looped(0) if kind == "Inkling2Loop" else draw(0)
    text = random_model(settings, 0)
    vision = VISION | {"text_hidden_size": settings["hidden_size"]}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text.config.to_dict(), vision_config=vision, image_token_id=3
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(tmp_path / "checkpoint")
    if form == "modules":
        save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "checkpoint" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    read, alone = tmlc.program(tmp_path / "checkpoint"), tmp_path / "text"
    text.save_pretrained(alone)
    known, source = tmlc.program(alone), open_checkpoint(alone)
    assert str(read.methods["decode"].graph) == str(known.methods["decode"].graph)
    for name in known.used_weights():
        assert torch.equal(read.weights.evaluate(name, checkpoint), known.weights.evaluate(name, source)), name
    (note,) = read.meta["notes"]
    seen = sum(name.startswith(("model.visual.", "model.vision_tower.")) for name in checkpoint.tensors)
    assert seen > 10 and f"the {seen} tensors of the vision tower are not used" in note
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_config does not describe a text model"):
        load_program(tmp_path / "checkpoint")


def test_nvfp4_experts_of_the_release_have_the_values_that_transformers_gives_them(tmp_path):
    """Pairs of codes, a scale for 16 and a factor an expert; some layers in MXFP8. No config says so."""
    settings = looped(0) | {"hidden_size": 32, "moe_intermediate_size": 32}
    model = random_model(settings, 0)
    model.save_pretrained(tmp_path)
    tensors, draw_ = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    experts = [name for name in tensors if name.endswith(("experts.w13_weight", "experts.w2_weight"))]
    for number, name in enumerate(experts):
        *outer, cols = tensors[name].shape
        if number % 3 == 2:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.randint(120, 130, (*outer, cols // 32), generator=draw_, dtype=torch.uint8)
            continue
        tensors[name] = torch.randint(0, 256, (*outer, cols // 2), generator=draw_, dtype=torch.uint8)
        scales = torch.rand((*outer, cols // 16), generator=draw_) + 0.1
        tensors[f"{name}_scale"] = scales.to(torch.float8_e4m3fn)
        tensors[f"{name}_amax"] = torch.rand(outer[0], generator=draw_) + 0.5
        tensors[f"{name}_outer_scale_denominator"] = torch.full((1,) if number % 2 else (outer[0],), 2688.0)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["transformers_version"]  # the release was not saved by transformers
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.Inkling2LoopForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    program, checkpoint = tmlc.program(tmp_path), open_checkpoint(tmp_path)
    names = [name for name in program.used_weights() if ".mlp.experts." in name]
    assert len(names) == len(experts) > 6
    for name in names:
        assert torch.equal(program.weights.evaluate(name, checkpoint), theirs[name]), name
    tensors[f"{experts[0]}_outer_scale_denominator"].zero_()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="zero, NaN or infinity to divide by"):
        for name in names:
            program.weights.evaluate(name, open_checkpoint(tmp_path))
