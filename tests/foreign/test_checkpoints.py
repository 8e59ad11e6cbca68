"""Forms of foreign checkpoints: shards, dtypes, tied heads, experts one by one or stacked; what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tmlc.errors import CheckpointError, UsageError
from tmlc.frontend import load_program, open_checkpoint
from tmlc.ir.run import ProgramRunner


def logits(folder, ids):
    checkpoint = open_checkpoint(folder)
    session = ProgramRunner(load_program(checkpoint), checkpoint).session()
    (x,) = session.call("embed_text", ids[:, None])
    return session.call("unembed", *session.call("decode", x))[0]


def test_experts_one_by_one_and_stacked_give_the_same(foreign_case, tmp_path):
    case = foreign_case("mixtral", 0, 20)
    assert any(".experts.1." in name for name in load_file(case.folder / "model.safetensors")), "one by one on disk"
    case.model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert not any(".experts.1." in name for name in load_file(tmp_path / "stacked" / "model.safetensors"))
    assert torch.equal(logits(case.folder, case.ids), logits(tmp_path / "stacked", case.ids))


def test_shards_and_bfloat16_are_read(foreign_case, tmp_path):
    case = foreign_case("gpt_oss", 0, 20)
    case.model.bfloat16().save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    wide = type(case.model).from_pretrained(tmp_path / "half", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want = wide(case.ids[None], use_cache=False).logits[0]  # bfloat16 weights, float32 arithmetic
    assert (logits(tmp_path / "half", case.ids) - want).abs().max() <= 1e-4


def test_a_tied_head_is_the_embedding_table(foreign_case):
    case = foreign_case("qwen3", 1, 10)
    assert "lm_head.weight" not in load_file(case.folder / "model.safetensors")
    program = load_program(case.folder)
    (head,) = program.methods["unembed"].placeholders("weight")
    (table,) = program.methods["embed_text"].placeholders("weight")
    assert head.meta["role"] == table.meta["role"] == ("weight", "model.embed_tokens.weight")


def test_layers_for_token_prediction_and_old_buffers_are_ignored(saved):
    folder = saved("deepseek_v3", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "model.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = load_program(folder)
    assert "model.layers.2.eh_proj.weight" not in before.weights


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_more_experts_than_tensors_are_missed_and_not_counted_out(saved):
    folder = saved("mixtral", 0)
    edit(folder, num_local_experts=10**9)
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.0\..*experts"):
        load_program(folder)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5,
                              "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "the checkpoint is of LlamaForSequenceClassification"),
        ({"architectures": [["LlamaForCausalLM"]]}, r"the checkpoint is of \['LlamaForCausalLM'\]"),
        ({"architectures": 1.5}, r"the checkpoint is of 1\.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the checkpoint has"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 3}, "missing tensors: model.layers.2"),
        ({"attention_bias": False}, "tensors that the model in config.json does not have: .*_proj.bias"),
        ({"vocab_size": 66}, "wrong shapes: .*config.json says"),
        ({"hidden_size": "wide"}, "transformers refuses the config"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused_before_any_work(saved, changes, complaint):
    folder = saved("llama", 0)
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        load_program(folder)


def test_without_transformers_the_error_says_what_to_install(saved, monkeypatch):
    folder = saved("llama", 0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError) as error:
        load_program(folder)
    assert "transformers is needed" in error.value.what and 'pip install "tmlc[hf]"' in error.value.fix


def test_runtime_defaults_can_be_overridden(saved):
    program = load_program(saved("llama", 0), {"context": 77, "policy": "end"})
    assert program.meta["context"] == {"limit": 77, "policy": "end", "sinks": 16, "max_append": 64}
