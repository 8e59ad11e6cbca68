"""Interaction models that we never saw, whole ticks on a device in host memory: sizes between those that kernels are
tuned for, other ticks, windows, contexts and heads than the presets have.

What a session says is what it says on the CPU engine, and its bits are the same alone and in company.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint
from tmlc.package.reader import open_package
from tmlc.runtimes.core.chained import ChainedDriver
from tmlc.runtimes.cuda.ticks import FEATURE

TICKS, PAST = 2, 26  # PAST tokens come first: short contexts wrap
RATE, SAMPLES = 800, 160  # of a tick's sound: the interpreter takes seconds for a spectrum
TOLERANCE = 3e-4  # of samples, in float32: the order of sums
WIDTHS = [8, 12, 16, 24, 20, 6]
HEADS = [(4, 2), (3, 1), (2, 2), (6, 3), (5, 5), (1, 1), (8, 1)]


def settings(seed: int, base: dict[str, Any]) -> dict[str, Any]:
    """The config of a seed, which changes the small model of `base`."""
    draw, made = random.Random(f"interaction {seed}"), copy.deepcopy(base)
    layers = draw.randint(1, 3)
    heads, kv = draw.choice(HEADS)
    swa_heads, swa_kv = draw.choice(HEADS)
    experts = draw.choice([1, 3, 5, 8, 17, 33])
    made["text_config"] |= dict(
        hidden_size=draw.choice([24, 32, 33, 40, 52, 72]), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=draw.choice(WIDTHS),
        swa_num_attention_heads=swa_heads, swa_num_key_value_heads=swa_kv, swa_head_dim=draw.choice(WIDTHS),
        sliding_window_size=draw.choice([1, 2, 5, 9, 16, 40]), d_rel=draw.choice([1, 3, 4, 8]),
        rel_extent=draw.choice([1, 7, 21, 64]), log_scaling_n_floor=draw.choice([None, 5, 30]),
        conv_kernel_size=draw.choice([2, 3, 4, 5]),
        layer_types=[draw.choice(["hybrid", "hybrid_sliding"]) for _ in range(layers)],
        mlp_layer_types=[draw.choice(["dense", "sparse", "sparse"]) for _ in range(layers)],
        intermediate_size=draw.choice([24, 33, 40]), moe_intermediate_size=draw.choice([7, 16, 20]),
        n_routed_experts=experts, num_experts_per_tok=draw.randint(1, min(experts, 6)),
        n_shared_experts=draw.choice([1, 2]), route_scale=draw.choice([1.0, 2.0, 8.0]),
        logits_mup_width_multiplier=draw.choice([1.0, 2.0]),
    )  # fmt: skip
    audio_in, hop = draw.choice([(4, SAMPLES // 4), (2, SAMPLES // 2), (1, SAMPLES), (5, SAMPLES // 5)])
    frames = draw.choice([n for n in (1, 2, 4) if hop % n == 0])
    made["audio_config"] |= dict(
        sample_rate=RATE, hop_length=hop, window_length=2 * hop, n_mel_bins=draw.choice([10, 16, 17]),
        mel_vocab_size=draw.choice([2, 5, 16]),
    )  # fmt: skip
    patch, down, across = draw.choice([(8, 1, 2), (4, 2, 1), (6, 2, 3), (9, 1, 1)])
    made["vision_config"] |= dict(
        patch_size=patch, temporal_patch_size=draw.choice([2, 3]), height=down * patch, width=across * patch
    )
    made["speech_config"] |= dict(
        n_mel_bins=draw.choice([10, 16, 17]), frames_per_position=frames, hop_length=hop // frames,
        flow_width=draw.choice([24, 32, 33]), flow_layers=draw.choice([1, 2]), flow_steps=draw.choice([1, 2, 4]),
        vocoder_width=draw.choice([16, 24, 33]), vocoder_layers=draw.choice([1, 2]),
        vocoder_kernel=draw.choice([2, 3, 5, 7]), vocoder_window=draw.choice([2, 3]) * hop // frames,
    )  # fmt: skip
    made["tick_config"] |= dict(
        audio_in=audio_in, audio_out=audio_in,  # a position of speech is as long as one of sound
        text_in=draw.choice([0, 1, 2, 3]), text_out=draw.choice([1, 2, 3]), video_every=draw.choice([1, 2]),
    )  # fmt: skip
    context, policy = draw.choice([(48, "ring_with_sinks"), (40, "ring_with_sinks"), (96, "end")])
    made["runtime_config"] |= dict(
        context=context, context_policy=policy, sinks=draw.choice([0, 3, 16]), max_append=draw.choice([3, 8, 16])
    )
    return made


def given(config: InteractionConfig, index: int) -> tmlc.TickInput:
    draw, seen = np.random.default_rng(index), config.vision_config
    clip = (seen.temporal_patch_size, seen.height, seen.width, 3)
    video = draw.integers(0, 256, clip, np.uint8) if index % config.tick_config.video_every == 0 else None
    sound = (0.1 * draw.standard_normal(config.tick_samples)).astype(np.float32)
    return tmlc.TickInput(sound, video, text="hi" if config.tick_config.text_in and index % 3 else None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_says_what_it_says_on_the_cpu(lab, machine, tmp_path, seed):
    config = InteractionConfig.from_dict(settings(seed, lab.config))
    create_checkpoint(config, seed=seed, out_dir=tmp_path / "checkpoint")
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "cpu.tmlc", precision="fp32")
    lab.compile(tmp_path / "checkpoint", tmp_path / "gpu.tmlc")
    inputs = [[given(config, 7 * seed + 2 * tick + one) for one in range(2)] for tick in range(TICKS)]
    mark = machine.mark()
    with tmlc.load(tmp_path / "cpu.tmlc", threads=1) as cpu, lab.load(tmp_path / "gpu.tmlc", machine, 3) as gpu:
        here = [cpu.session(seed=one) for one in range(2)]
        there = [gpu.session(seed=one) for one in range(2)]
        for session in (here[0], there[0]):
            session.append(tokens=list(range(1, PAST)), logits="none")
        loud = 0.0
        for both in inputs:
            (alone,) = gpu.tick_batch([twin := there[0].fork()], both[:1])
            want, have = cpu.tick_batch(here, both), gpu.tick_batch(there, both)
            assert alone.tokens == have[0].tokens and alone.audio.tobytes() == have[0].audio.tobytes()
            assert gpu.slots.memory.read(twin.index) == gpu.slots.memory.read(there[0].index)
            twin.close()
            for one, other in zip(want, have, strict=True):
                assert other.tokens == one.tokens and other.stats == one.stats
                assert np.abs(other.audio - one.audio).max() <= TOLERANCE
                loud = max(loud, float(np.abs(one.audio).max()))
        assert loud > 1e-3, "engines that say nothing prove nothing"
        # Some seeds have no room for graphs of ticks (tests/gpu/test_chains.py); a package says whether it has.
        with open_package(tmp_path / "gpu.tmlc") as opened:
            assert isinstance(gpu.driver, ChainedDriver) == (FEATURE in opened.manifest.required_features)
    machine.release(mark)
