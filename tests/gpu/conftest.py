"""Small packages for a GPU, and a device in host memory to run them: the very plan, the real runtime, no GPU.

Kernels are not compiled here: a variant's machine code is its name, by which the host device knows what to interpret.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'tmlc[triton]')")

import tmlc
import tmlc.emit.triton.target as target
from tmlc.emit.triton.host_device import HostDevice
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.kernels.triton.worker import open_interpreter
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint
from tmlc.package.reader import open_package
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.text import load_tokenizer
from tmlc.runtimes.cuda.backend import CudaBackend

TARGET = "triton:sm90"
#: Few buckets, so that lowering and capturing stay quick: what they hold is cut into them.
BUCKETS = {"batch": [1, 4], "positions": [1, 4]}
TINY = {
    "model_type": "tmlc_interaction",
    "name": "tiny",
    "text_config": dict(
        vocab_size=288, unpadded_vocab_size=272, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, swa_num_attention_heads=4, swa_num_key_value_heads=1, swa_head_dim=16,
        sliding_window_size=9, d_rel=4, rel_extent=21, log_scaling_n_floor=30,
        layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"],
        intermediate_size=40, moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1,
        route_scale=2.0, logits_mup_width_multiplier=2.0, eos_token_id=258,
    ),
    # A tenth of the usual rate: the interpreter takes a minute for one spectrum of 1600 samples.
    "audio_config": dict(sample_rate=1600, hop_length=80, window_length=160, n_mel_bins=16),
    "vision_config": dict(patch_size=8, temporal_patch_size=2, num_hidden_layers=2, height=8, width=16),
    "speech_config": dict(
        n_mel_bins=16, hop_length=20, flow_width=32, flow_layers=1, flow_steps=2, vocoder_width=24, vocoder_layers=1,
        vocoder_kernel=5, vocoder_window=60,
    ),
    "tick_config": dict(video_every=2, text_in=2, text_out=2, silence_token_id=259, end_of_tick_token_id=260),
    "runtime_config": dict(context=48, context_policy="ring_with_sinks", sinks=16, max_append=8),
}  # fmt: skip


def named(variants, on_done=lambda done, total: None, jobs=None):
    """In place of `build_variants`: machine code that is the variant's name."""
    return {v: Compiled(variant_key(v).encode(), v.kernel, v.num_warps, 0, 32, 0, 2) for v in variants}


@contextmanager
def nothing_compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "build_variants", named)
        yield


def compile_for_gpu(checkpoint: Path, out: Path, precision: str = "fp32", name: str = TARGET, **bounds) -> Path:
    steps = load_pipeline("triton").configure("memory.buckets", **BUCKETS)
    with nothing_compiled():
        tmlc.compile(checkpoint, out, target=name, precision=precision, pipeline=steps, **bounds)
    return out


def load_on_host(package, machine, sessions: int = 5, device: HostDevice | None = None) -> Engine:
    """The engine of a package on a host device; `load` with another driver."""
    opened = open_package(package)
    target = next(iter(opened.manifest.targets))
    sm = min(int(part[2:]) for part in target.partition(":")[2].split("+"))
    backend = CudaBackend(opened, target, device or HostDevice.of(opened, machine, sm))
    named = opened.manifest.tokenizer
    tokenizer = load_tokenizer(opened.read(named)) if named else None
    engine = Engine(backend, opened.manifest, opened.digest, tokenizer, sessions)
    engine._package = opened
    return engine


@pytest.fixture(scope="session")
def machine():
    with open_interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """The smallest interaction model: its checkpoint, and packages of it for the CPU and for a GPU, in float32."""
    base = tmp_path_factory.mktemp("tiny")
    create_checkpoint(InteractionConfig.from_dict(TINY), seed=3, out_dir=base / "checkpoint")
    tmlc.compile(base / "checkpoint", base / "cpu.tmlc", precision="fp32")
    compile_for_gpu(base / "checkpoint", base / "gpu.tmlc")
    return SimpleNamespace(checkpoint=base / "checkpoint", cpu=base / "cpu.tmlc", gpu=base / "gpu.tmlc")


@pytest.fixture(scope="session")
def parsed(tiny) -> SimpleNamespace:
    """The JSON of the tiny package's engine, and where its weights lie."""
    with open_package(tiny.gpu) as opened:
        plan, code = opened.json("engines/triton/plan.json"), opened.json("engines/triton/sm90/code.json")
        return SimpleNamespace(plan=json.dumps(plan), code=json.dumps(code), tensors=dict(opened.tensors))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seeded(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What tests here are made with: compile(checkpoint, out, precision, ...), load(package, machine, ...), buckets."""
    return SimpleNamespace(
        compile=compile_for_gpu, load=load_on_host, buckets=BUCKETS, target=TARGET, nothing_compiled=nothing_compiled,
        config=TINY,
    )  # fmt: skip
