"""Mistakes that a compiler could make: each compiles, runs and changes what the model does, and the suite tells it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import tmlc
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig
from tmlc.model_zoo.interaction.shipped import shipped

spec = importlib.util.spec_from_file_location("miscompiles", Path(__file__).with_name("miscompiles.py"))
seeded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seeded)

QUICK = ("experts_swapped", "audio_stale", "tail_lost")
"""One of each kind: of weights, of a graph, behind the passes. All of them together take a while."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights: two sliding layers with a global one between them."""
    raw = InteractionConfig.from_preset("nano").to_dict()
    raw["text_config"] |= dict(
        hidden_size=32, num_hidden_layers=3, layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        mlp_layer_types=["dense", "sparse", "sparse"], num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    raw["speech_config"] |= dict(flow_width=32, flow_layers=1, vocoder_width=32, vocoder_layers=1)
    folder = tmp_path_factory.mktemp("miscompiles") / "random"
    return create_checkpoint(InteractionConfig.from_dict(raw), 0, folder)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    with seeded.traced_once():
        yield


def played(package):
    """(hidden states, samples) of 24 ticks in which the user speaks, types and shows something, and the model talks."""
    rng, hidden = np.random.default_rng(0), []
    with tmlc.load(package, threads=1) as engine:
        begin = engine.model.begin
        engine.model.begin = lambda slots, sink=None: begin(slots, lambda rows: hidden.append(rows.copy()))
        session, spoken = engine.session(seed=1), []
        for tick in range(24):
            audio = rng.normal(0, 0.1, 3200).astype(np.float32)
            video = rng.integers(0, 256, (2, 64, 64, 3), np.uint8) if tick % 5 == 0 else None
            spoken.append(session.tick(tmlc.TickInput(audio=audio, video=video, text="ab", say=[65, 66])).audio)
    return np.concatenate(hidden), np.concatenate(spoken)


@pytest.fixture(scope="module")
def good(checkpoint, tmp_path_factory):
    package = tmp_path_factory.mktemp("good") / "good.tmlc"
    tmlc.compile(checkpoint, package, precision="fp32")
    return played(package)


def unless_quick(made):
    return pytest.param(made, id=made.name, marks=[] if made.name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("made", [unless_quick(made) for made in seeded.MISCOMPILES])
def test_a_mistake_compiles_and_runs_and_changes_what_the_model_does(made, checkpoint, good, tmp_path):
    seeded.compile_wrong(made, checkpoint, tmp_path / "wrong.tmlc")
    hidden, spoken = played(tmp_path / "wrong.tmlc")
    assert np.isfinite(hidden).all() and np.isfinite(spoken).all() and hidden.shape == good[0].shape
    assert max(np.abs(hidden - good[0]).max(), np.abs(spoken - good[1]).max()) > 1e-3


@pytest.mark.slow
def test_the_suite_tells_every_mistake_by_a_score_that_drops_clearly():
    folder = shipped("interaction-nano")
    plain = [made for made in seeded.MISCOMPILES if not made.subtle]
    assert len(plain) >= 10
    missed = {made.name: cells for made, cells, told in seeded.tell(folder, plain, 24) if not told}
    assert not missed
