"""One small checkpoint and its package for all tests of the command line."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tmlc.cli.main import cli
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset


def run_cli(*args, code=0):
    """Run `tmlc ARGS` in this process; the exit code must be `code`. The result carries `.json` when it parses."""
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    try:
        value = json.loads(result.stdout)
    except ValueError:
        value = None
    return SimpleNamespace(stdout=result.stdout, stderr=result.stderr, json=value)


@pytest.fixture(scope="session")
def tmlc_cli():
    return run_cli


def tiny_config():
    """nano made smaller, so that a test that compiles takes a second or two: two layers, all methods."""
    config = read_preset("nano")["config"]
    config["name"] = "tiny"
    text = dict(
        hidden_size=32, num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"],
        mlp_layer_types=["dense", "sparse"],
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, swa_num_attention_heads=2, swa_num_key_value_heads=1,
        swa_head_dim=16, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config["text_config"].update(text)
    config["speech_config"].update(flow_width=32, flow_layers=1, flow_steps=2, vocoder_width=32, vocoder_layers=1)
    return InteractionConfig.from_dict(config)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    create_checkpoint(tiny_config(), 0, folder)
    return folder


@pytest.fixture(scope="session")
def package(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "tiny.tmlc"
    run_cli("compile", checkpoint, "-o", path, "--json")
    return path
