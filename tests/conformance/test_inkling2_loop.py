"""The compiled CPU engine against `Inkling2LoopForCausalLM` of transformers, on checkpoints that `save_pretrained`
writes."""

import json

import numpy as np
import pytest
import torch
import transformers
from inkling2_models import POSITIONS, expect, hold, looped, random_model
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
    model.save_pretrained(tmp_path / "checkpoint", **({"max_shard_size": "60KB"} if seed % 2 else {}))
    assert "model.llm.middle_cycle_cross_pass_queries" in open_checkpoint(tmp_path / "checkpoint")
    report = tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="fp32")
    matches = {record.name: record.matches for record in report.passes}
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
    model = random_model(looped(seed), seed)
    model.save_pretrained(tmp_path / "checkpoint")
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="bf16")
    ids = np.random.default_rng(seed).integers(0, 50, POSITIONS).tolist()
    expected = expect(model, ids)
    with tmlc.load(tmp_path / "model.tmlc", threads=1) as engine, engine.session() as session:
        found = session.append(tokens=ids)
    narrow = transformers.Inkling2LoopForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    theirs = expect(narrow.eval(), ids)
    assert np.sqrt(np.square(found - expected).mean()) <= 1.5 * np.sqrt(np.square(theirs - expected).mean())
