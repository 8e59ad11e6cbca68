"""The command line on a foreign checkpoint: a random Inkling text model as transformers saves it."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import InklingForCausalLM, InklingTextConfig

from tmlc.cli.main import cli


def tmlc(*args, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == code, f"{args}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    config = InklingTextConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
        rel_extent=12, local_layer_ids=[0], intermediate_size=48, moe_intermediate_size=24, n_routed_experts=6,
        num_experts_per_tok=2, n_shared_experts=2, dense_mlp_idx=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("text")
    InklingForCausalLM(config).save_pretrained(folder / "checkpoint")
    tmlc("compile", folder / "checkpoint", "-o", folder / "text.tmlc", "--check", "--json")
    return folder / "text.tmlc"


def test_it_compiles_verifies_and_shows_itself_as_a_token_model(package):
    assert json.loads(tmlc("verify", package, "--json").stdout)["passed"]
    assert "(tokens)" in tmlc("inspect", package).stdout


def test_it_can_be_profiled(package):
    options = ("--seconds", "2", "--startup-runs", "1", "--sittings", "1")
    view = json.loads(tmlc("profile", package, *options, "--json").stdout)
    assert view["step_ms"]["p99"] > 0 and view["startup"]["load_and_first_tick_ms"] > 0


def test_audio_for_a_model_that_does_not_hear_is_refused(package, tmp_path):
    error = tmlc("run", package, "--audio", "speech.wav", "-o", tmp_path / "out", code=2).stderr
    assert "takes no audio" in error and not (tmp_path / "out").exists()


def test_text_for_a_model_without_a_tokenizer_is_refused(package, tmp_path):
    (tmp_path / "typed.yaml").write_text('- {at: 0, text: "hi"}\n')
    error = tmlc("run", package, "--text", tmp_path / "typed.yaml", "-o", tmp_path / "out", code=2).stderr
    assert "tokenizer" in error and not (tmp_path / "out").exists()
