"""One tiny checkpoint, compiled once into a cache; a test that changes anything works on a copy of both."""

import json
import shutil
import subprocess
import sys

import pytest

from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset

TEXT = dict(
    hidden_size=32, num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"],
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, swa_num_attention_heads=2, swa_num_key_value_heads=1,
    swa_head_dim=16, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def run_tmlc(*args, cache, code=0):
    """`tmlc ARGS --json` in this process with a cache folder of its own; the JSON it prints."""
    from click.testing import CliRunner

    from tmlc.cli.main import cli

    result = CliRunner().invoke(cli, [*map(str, args), "--json"], env={"TMLC_CACHE": str(cache)})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(checkpoint, cache, package) of one compilation: not to be changed."""
    root = tmp_path_factory.mktemp("cached")
    config = read_preset("nano")["config"]
    config["name"] = "tiny"
    config["text_config"].update(TEXT)
    config["speech_config"].update(flow_width=32, flow_layers=1, flow_steps=2, vocoder_width=32, vocoder_layers=1)
    create_checkpoint(InteractionConfig.from_dict(config), 0, root / "tiny")
    view = run_tmlc("compile", root / "tiny", "-o", root / "tiny.tmlc", cache=root / "cache")
    assert view["cache"]["outcome"] == "miss"
    return root / "tiny", root / "cache", root / "tiny.tmlc"


@pytest.fixture
def copies(compiled, tmp_path):
    """The same three, copied, so that a test may damage them. Paths and times of the checkpoint are other ones."""
    checkpoint, cache, package = compiled
    shutil.copytree(checkpoint, tmp_path / "in" / "tiny")
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "in" / "tiny", tmp_path / "cache", package


@pytest.fixture
def python():
    """Runs a script in a fresh interpreter."""

    def run(code, *args):
        command = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
