"""A checkpoint becomes a Program: right numbers, unique weights, exact match counts, and clear refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tmlc.errors import CheckpointError, UsageError
from tmlc.frontend import load_program, open_checkpoint
from tmlc.ir.dims import Dim
from tmlc.ir.program import type_of
from tmlc.ir.run import ProgramRunner
from tmlc.ir.text import parse_program, print_program
from tmlc.pipeline.check import Checker
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import load_pipeline


@pytest.fixture(scope="module")
def nano_program(nano):
    return load_program(nano)


@pytest.fixture(scope="module")
def inkling_program(inkling):
    return load_program(inkling)


def test_the_program_answers_as_the_model_does(inkling, inkling_program, inkling_model):
    session = ProgramRunner(inkling_program, open_checkpoint(inkling)).session()
    ids = torch.randint(37, (23, 1), generator=torch.Generator().manual_seed(1))
    (x,) = session.call("embed_text", ids)
    (hidden,) = session.call("decode", x)
    (logits,) = session.call("unembed", hidden)
    with torch.no_grad():
        torch.testing.assert_close(logits, inkling_model(ids), rtol=1e-5, atol=1e-5)
    key, temperature = torch.zeros(23, 3, dtype=torch.int64), torch.zeros(23, 1)
    assert torch.equal(session.call("next_token", hidden, key, temperature)[0][:, 0], logits.argmax(1))


def test_methods_inputs_and_meta_of_a_token_model(inkling_program):
    assert list(inkling_program.methods) == ["embed_text", "decode", "unembed", "next_token"]
    assert inkling_program.meta["kind"] == "tokens" and inkling_program.meta["tick"]["eos"] == [2]
    assert inkling_program.meta["outputs"]["decode"] == ["hidden"]
    assert inkling_program.meta["tokenizer"] is None


def test_methods_inputs_and_meta_of_an_interaction_model(nano_program):
    assert set(nano_program.methods) == {
        "embed_text", "embed_audio", "embed_speech", "embed_video", "decode", "unembed", "next_token", "speak", "vocode"
    }  # fmt: skip
    tick, context = nano_program.meta["tick"], nano_program.meta["context"]
    assert nano_program.meta["kind"] == "interaction" and nano_program.meta["tokenizer"] == "tokenizer.json"
    assert tick["sample_rate"] == 16000 and tick["hop"] == 800 and tick["samples_per_position"] == 800
    assert set(context) == {"limit", "policy", "sinks", "max_append"}
    (video,) = nano_program.methods["embed_video"].inputs
    assert type_of(video).rows == Dim(tick["video_frames"] * tick["frame_height"])
    assert nano_program.methods["embed_video"].max_n == context["max_append"] // tick["video_positions"]
    assert nano_program.methods["decode"].max_n == context["max_append"]


def test_a_tensor_shared_by_methods_is_one_weight(nano_program):
    readers = {}
    for method in nano_program.methods.values():
        for node in method.placeholders("weight"):
            readers.setdefault(node.meta["role"][1], set()).add(method.name)
    table = "audio_tower.embed_audio_tokens.embed_audio_tokens.weight"
    assert readers[table] == {"embed_audio", "embed_speech"}
    assert readers["lm_head.weight"] == {"unembed", "next_token"}
    assert all(entry.op == "source" and entry.srcs == (name,) for name, entry in nano_program.weights.items())


def test_the_text_form_survives_a_round_trip(nano_program):
    text = print_program(nano_program)
    assert print_program(parse_program(text)) == text


def test_match_counts_of_nano_are_exact_and_every_pass_keeps_the_answers(nano, nano_program):
    checker = Checker(nano_program, open_checkpoint(nano))
    after = run_pipeline(nano_program, load_pipeline("cpu"), checker=checker)
    config = json.loads((nano / "config.json").read_text())
    text, speech = config["text_config"], config["speech_config"]
    layers, sparse = text["num_hidden_layers"], text["mlp_layer_types"].count("sparse")
    matches = {r.name: r.matches for r in after.record}
    assert matches["route.fuse_router"] == matches["route.stack_experts"] == sparse
    # query, key, value and ranks a layer; gate and up of the dense layers and the vocoder; modulations of each step
    assert matches["fuse.merge_linears"] == layers + (layers - sparse) + 1 + speech["flow_steps"]
    # attention and four convolutions a layer; two audio windows, the vocoder's convolutions and its overlap
    assert matches["state.insert"] == 5 * layers + 2 + speech["vocoder_layers"] + 1
    assert matches["route.select_kernel"] == sparse and matches["fuse.head"] == 1
    # keys, values, behind attention and behind the experts; the vocoder convolves what other calls read too
    assert matches["fuse.conv"] == 4 * layers
    # attention and experts of each layer, a product of each layer of the vocoder; the flow head's are read twice
    assert matches["fuse.attention_epilogue"] == 2 * layers + speech["vocoder_layers"]
    missed = {r.name: [miss.partition("/")[0] for miss in r.near_misses] for r in after.record if r.near_misses}
    steps = speech["flow_steps"]
    assert missed == {"fuse.conv": ["vocode"], "fuse.attention_epilogue": ["speak"] * steps}
    assert all(r.error < 1e-4 for r in after.record)
    assert sum(s.kind == "position" for s in after.states.values()) == 1
    assert {s.method for s in after.states.values()} == {"decode", "embed_audio", "embed_speech", "vocode"}


def test_bf16_stays_close_and_streams_exactly(inkling, inkling_program):
    pipeline = load_pipeline("cpu").configure("quantize.cast", precision="bf16")
    after = run_pipeline(inkling_program, pipeline, checker=Checker(inkling_program, open_checkpoint(inkling)))
    errors = {r.name: r.error for r in after.record}
    assert 0 < errors["quantize.cast"] < 0.1 and errors["state.insert"] < 1e-4


def test_the_norm_of_tokens_is_read_where_transformers_5_17_keeps_it(
    inkling, inkling_config, tmp_path, write_checkpoint
):
    new, old = "model.embed_tokens.embed_norm.weight", "model.embed_norm.weight"
    tensors = load_file(inkling / "model.safetensors")
    tensors[old] = tensors.pop(new)
    folder = write_checkpoint(tmp_path / "old", inkling_config, tensors)
    assert torch.equal(load_program(folder).weights.evaluate(new, open_checkpoint(folder)), tensors[old])
    del tensors[old]
    with pytest.raises(CheckpointError, match=f"missing tensors: {new}"):
        load_program(write_checkpoint(tmp_path / "none", inkling_config, tensors))


def test_a_bf16_checkpoint_compiles_to_the_same_structure(inkling, inkling_config, tmp_path, write_checkpoint):
    tensors = load_file(inkling / "model.safetensors")
    narrow = {n: t.bfloat16() if "norm" not in n and "sconv" not in n else t for n, t in tensors.items()}
    folder = write_checkpoint(tmp_path / "bf16", inkling_config, narrow)
    program = load_program(folder)
    after = run_pipeline(program, load_pipeline("cpu"), checker=Checker(program, open_checkpoint(folder)))
    assert {after.weights[name].dtype for name in after.used_weights()} == {"f32"}
    pipeline = load_pipeline("cpu").configure("quantize.cast", precision="bf16")
    narrow_after = run_pipeline(program, pipeline)
    assert any(narrow_after.weights[name].op == "source" for name in narrow_after.used_weights())


def test_runtime_defaults_can_be_overridden(inkling):
    program = load_program(inkling, {"context": 256, "policy": "end", "sinks": None, "max_append": 32})
    assert program.meta["context"] == {"limit": 256, "policy": "end", "sinks": 16, "max_append": 32}
    assert program.methods["decode"].max_n == 32
    for wrong in ({"contxt": 1}, {"context": 0}, {"sinks": -1}, {"max_append": "8"}, {"policy": "forget"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            load_program(inkling, wrong)


def refused(inkling, tmp_path, write_checkpoint, change):
    config = json.loads((inkling / "config.json").read_text())
    tensors = load_file(inkling / "model.safetensors")
    change(config, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_program(write_checkpoint(tmp_path / "bad", config, tensors))
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda c, t: t.update(surplus=torch.ones(1)), "does not have: surplus"),
        (
            lambda c, t: t.update({"model.norm.weight": torch.ones(17)}),
            "model.norm.weight is [17], config.json says [16]",
        ),
        (lambda c, t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}), "wrong dtypes"),
        (lambda c, t: c.update(model_type="gpt2"), "model_type is 'gpt2'"),
        (lambda c, t: c.pop("model_type"), "model_type is None"),
        (lambda c, t: c.update(model_type=["llama"]), "model_type is ['llama']"),
        (lambda c, t: c.update(hidden_size="wide"), "hidden_size"),
        (lambda c, t: c.update(shared_expert_sink=False), "shared_expert_sink"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_with_the_tensor_or_field(
    change, words, inkling, tmp_path, write_checkpoint
):
    assert words in refused(inkling, tmp_path, write_checkpoint, change)


def test_multi_token_prediction_layers_are_skipped(inkling, tmp_path, write_checkpoint):
    tensors = load_file(inkling / "model.safetensors")
    tensors["model.mtp.0.weight"] = torch.ones(1)
    config = json.loads((inkling / "config.json").read_text())
    assert "model.mtp.0.weight" not in load_program(write_checkpoint(tmp_path / "m", config, tensors)).weights
