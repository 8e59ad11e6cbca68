"""config.json without shards is enough for whoever reads no weight: the methods are those of the whole checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from random_models import CLASSES
from released import MODELS, write
from safetensors.torch import load_file

import tmlc
from tmlc.errors import CheckpointError
from tmlc.frontend import load_program, open_checkpoint
from tmlc.frontend.checkpoint import ConfigOnly, open_unread
from tmlc.ir.text import print_program
from tmlc.report.gpu_plan import launches_of_calls


def config_of(folder, to, **changes):
    """A folder with the config.json of another one, with changes."""
    to.mkdir()
    config = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def methods(program):
    """The text of the methods, without what the checkpoint's tensors are called and how its weights come about."""
    text = print_program(program, sources=False)
    return [line for line in text.splitlines() if " = source(" not in line and not line.startswith("weight ")]


@pytest.mark.parametrize("family", CLASSES)
def test_it_gives_the_methods_of_the_whole_checkpoint(saved, tmp_path, family):
    for seed in (0, 1):  # without and with a tied head
        folder = saved(family, seed)
        alone = config_of(folder, tmp_path / str(seed))
        whole, planned = load_program(folder), load_program(open_unread(alone))
        whole.meta["name"] = planned.meta["name"]
        assert methods(planned) == methods(whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_is_tied_where_the_config_says_so(saved, tmp_path, seed):
    folder = saved("qwen3", seed)
    tied = "lm_head.weight" not in load_file(folder / "model.safetensors")
    program = load_program(open_unread(config_of(folder, tmp_path / "alone")))
    (head,) = program.methods["unembed"].placeholders("weight")
    assert tied == bool(seed) == (head.meta["role"][1] == "model.embed_tokens.weight")


def test_what_has_shards_is_opened_as_ever(saved):
    opened = open_unread(saved("qwen3", 0))
    assert opened.has_values and torch.isfinite(opened.get("model.norm.weight")).all()


def test_it_has_no_values_and_says_so(saved, tmp_path):
    alone = config_of(saved("qwen3", 0), tmp_path / "alone")
    source = open_unread(alone)
    load_program(source)
    assert isinstance(source, ConfigOnly) and source.tensors["model.norm.weight"].dtype == "BF16"
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has no values"):
        source.get("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index") as caught:
        tmlc.compile(alone, tmp_path / "out.tmlc")
    assert "compile --dry-run" in caught.value.fix
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index"):
        open_checkpoint(alone)


@pytest.mark.parametrize(("target", "precision"), [("cpu", "int8"), ("triton:sm90", "fp8"), ("onnx", "int4")])
def test_a_dry_run_needs_no_shards_in_any_precision(saved, tmp_path, target, precision):
    alone = config_of(saved("qwen3_moe", 0), tmp_path / "alone")
    report = tmlc.compile(alone, tmp_path / "out.tmlc", target=target, precision=precision, dry_run=True)
    assert report.coverage and all(row.kernel is not None for row in report.coverage)
    assert any("config.json alone" in note for note in report.notes)
    assert not (tmp_path / "out.tmlc").exists()


def test_a_checkpoint_that_lost_its_shards_but_not_its_index_is_incomplete(saved, tmp_path):
    folder = shutil.copytree(saved("qwen3", 0), tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="missing shards"):
        open_unread(folder)


def test_how_it_is_quantised_changes_nothing(saved, tmp_path):
    folder = saved("qwen3", 0)
    plain = load_program(open_unread(config_of(folder, tmp_path / "plain")))
    coded = load_program(
        open_unread(config_of(folder, tmp_path / "coded", quantization_config={"quant_method": "something"}))
    )
    coded.meta["name"] = "plain"
    assert print_program(coded) == print_program(plain)


def test_too_many_layers_are_refused_before_they_are_built(saved, tmp_path):
    """Not even the list of their types is."""
    alone = config_of(saved("qwen3", 0), tmp_path / "alone", num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000, and at most 4096 are built"):
        load_program(open_unread(alone))


def test_a_released_model_is_lowered_for_a_gpu_from_its_config(tmp_path):
    """Launches of a position of Llama-3.2-1B: five a layer, and one more for many splits of a long cache."""
    from tmlc.pipeline.pipeline import load_pipeline

    folder = write("llama-3.2-1b", tmp_path)
    found = launches_of_calls(str(folder), "triton:sm90", "bf16", load_pipeline("triton"))
    layers = MODELS["llama-3.2-1b"]["num_hidden_layers"]
    assert found["decode"] == {
        "linear_kernel": 4 * layers, "attention_kernel": layers, "attention_combine_kernel": layers,
        "rope_table_kernel": 1, "rms_norm_kernel": 1, "advance_kernel": 1,
    }  # fmt: skip
