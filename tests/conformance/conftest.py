"""A small interaction checkpoint, compiled once for all tests here, and a recorded conversation to play into it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import tmlc
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # inkling2_models.py, which tests/gpu takes too

TINY = {
    "model_type": "tmlc_interaction",
    "name": "tiny",
    "text_config": dict(
        vocab_size=288, unpadded_vocab_size=272, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, swa_num_attention_heads=4, swa_num_key_value_heads=1, swa_head_dim=16,
        sliding_window_size=9, d_rel=4, rel_extent=21, log_scaling_n_floor=30,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"], mlp_layer_types=["dense", "sparse", "sparse"],
        intermediate_size=40, moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2,
        route_scale=2.0, logits_mup_width_multiplier=2.0, eos_token_id=258,
    ),
    "audio_config": {},
    "vision_config": dict(patch_size=8, temporal_patch_size=2, num_hidden_layers=2, height=16, width=24),
    "speech_config": dict(
        flow_width=40, flow_layers=2, flow_steps=4, vocoder_width=24, vocoder_layers=2, vocoder_kernel=5,
        vocoder_window=600,
    ),
    "tick_config": dict(video_every=2, text_in=2, text_out=3, silence_token_id=259, end_of_tick_token_id=260),
    "runtime_config": dict(context=96, context_policy="ring_with_sinks", sinks=16, max_append=24),
}  # fmt: skip


def make_checkpoint(folder: Path, context: int) -> Path:
    """A random tiny model that says text, stays silent and ends its ticks early, each often enough to be tested."""
    config = {**TINY, "runtime_config": {**TINY["runtime_config"], "context": context}}
    create_checkpoint(InteractionConfig.from_dict(config), seed=3, out_dir=folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    # The two special tokens borrow the rows of tokens that this seed likes to say, first in a tick and later in it.
    head[TINY["tick_config"]["silence_token_id"]] = 1.3 * head[158]
    head[TINY["tick_config"]["end_of_tick_token_id"]] = 1.1 * (head[65] + head[231])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def unbounded(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, package) whose context holds every conversation played here."""
    base = tmp_path_factory.mktemp("unbounded")
    checkpoint = make_checkpoint(base / "checkpoint", context=2048)
    tmlc.compile(checkpoint, base / "tiny.tmlc", precision="fp32")
    return checkpoint, base / "tiny.tmlc"


@pytest.fixture(scope="session")
def bounded(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, package) whose global layers keep 96 positions: rings wrap within a few ticks."""
    base = tmp_path_factory.mktemp("bounded")
    checkpoint = make_checkpoint(base / "checkpoint", context=96)
    tmlc.compile(checkpoint, base / "tiny.tmlc", precision="fp32")
    return checkpoint, base / "tiny.tmlc"


def _conversation(ticks: int, seed: int = 0) -> list[tmlc.TickInput]:
    """Noise bursts with pauses, a video clip now and then, and a sentence typed at once."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.choice([1e-3, 0.05, 0.3], ticks * 4), 800).astype(np.float32)
    audio = (rng.standard_normal(ticks * 3200).astype(np.float32) * level).reshape(ticks, 3200)
    inputs = []
    for index in range(ticks):
        video = rng.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8) if index % 3 == 0 else None
        text = "what do you see?" if index == 4 else None
        inputs.append(tmlc.TickInput(audio=audio[index], video=video, text=text))
    return inputs


@pytest.fixture(scope="session")
def conversation():
    """`conversation(ticks, seed=0)`: the inputs of that many ticks."""
    return _conversation
