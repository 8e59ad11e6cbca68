"""A package from a stranger cannot run code: whatever it holds, loading and using it ends in an answer or in one clear
error, without a report of AddressSanitizer or UndefinedBehaviorSanitizer, without a hang, within bounded memory."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest

import tmlc
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint

PROGRAM = Path(__file__).with_name("package_fuzz.py")
WORKERS = 2
LIMITS = "max_allocation_size_mb=2048:hard_rss_limit_mb=4096"
TINY = {
    "model_type": "tmlc_interaction",
    "name": "tiny",
    "text_config": dict(
        vocab_size=288, unpadded_vocab_size=272, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=8,
        sliding_window_size=9, d_rel=4, rel_extent=21, log_scaling_n_floor=30,
        layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"],
        intermediate_size=24, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        route_scale=2.0, logits_mup_width_multiplier=2.0, eos_token_id=258,
    ),
    "audio_config": {},
    "vision_config": dict(patch_size=8, temporal_patch_size=2, num_hidden_layers=1, height=8, width=16),
    "speech_config": dict(
        flow_width=16, flow_layers=1, flow_steps=1, vocoder_width=16, vocoder_layers=1, vocoder_kernel=5,
        vocoder_window=600,
    ),
    "tick_config": dict(video_every=1, text_in=2, text_out=3, silence_token_id=259, end_of_tick_token_id=260),
    "runtime_config": dict(context=64, context_policy="ring_with_sinks", sinks=16, max_append=24),
}  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    create_checkpoint(InteractionConfig.from_dict(TINY), seed=3, out_dir=folder / "checkpoint")
    tmlc.compile(folder / "checkpoint", folder / "tiny.tmlc", precision="fp32")
    return folder / "tiny.tmlc"


@pytest.fixture(scope="module")
def sanitized_python(sanitized):
    """`sanitized_python(*args)`: a finished Python process that may load the sanitized library."""
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitized.preload,
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{LIMITS}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
        "PYTHONPATH": str(PROGRAM.parent),
    }

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment)

    return run


@pytest.fixture(scope="module")
def library(sanitized) -> Path:
    return sanitized.library()


@pytest.fixture(scope="module")
def fuzz(package, library, sanitized_python, tmp_path_factory):
    """`fuzz(first, count)`: (kind, outcome) of each of these cases, after running them in a few processes."""
    folder = tmp_path_factory.mktemp("cases")

    def run(first: int, count: int) -> list[tuple[str, str]]:
        done = sanitized_python(PROGRAM, package, library, first, count, folder)
        lines = [line.split() for line in done.stdout.splitlines()]
        failed = [line for line in lines if line[2:] == ["FAILED"]]
        trouble = f"{failed}\n{done.stdout[-300:]}\n{done.stderr[-6000:]}"
        assert done.returncode == 0 and not failed and len(lines) == count, trouble
        return [(kind, outcome) for _, kind, outcome in lines]

    def run_all(first: int, count: int) -> list[tuple[str, str]]:
        share = count // WORKERS
        with ThreadPoolExecutor(WORKERS) as pool:
            return [*chain.from_iterable(pool.map(run, range(first, first + count, share), [share] * WORKERS))]

    return run_all


def check(outcomes: list[tuple[str, str]]) -> None:
    """The cases reached what they were made for."""
    counts = {kind: Counter(o for k, o in outcomes if k == kind) for kind in {k for k, _ in outcomes}}
    assert set(counts["damage"]) == {"PackageError"}, counts  # whatever the byte, it is noticed before anything runs
    for kind in ("plan", "manifest", "tokenizer", "snapshot"):
        total = counts[kind].total()
        assert total // 10 < counts[kind]["ran"] < total, (kind, counts[kind])  # some run, some are refused


BEYOND = """
import sys, pathlib, numpy, package_fuzz, tmlc.kernels.cpu as cpu
package_fuzz.use_library(pathlib.Path(sys.argv[1]))
words = numpy.array([cpu.MAGIC, cpu.VERSION, 0, 0, 0, 1], numpy.int64)
cpu.load_library()._c.tmlc_plan_create(words.ctypes.data, 60, words.ctypes.data, 0, 1, None, 0)
"""


def test_a_step_outside_of_memory_would_be_seen(library, sanitized_python):
    done = sanitized_python("-c", BEYOND, library)
    assert done.returncode and "heap-buffer-overflow" in done.stderr and "read_method" in done.stderr


def test_mutated_packages_and_snapshots_do_no_harm(fuzz):
    check(fuzz(0, 360))


@pytest.mark.slow
def test_many_mutated_packages_and_snapshots_do_no_harm(fuzz):
    check(fuzz(1000, 12000))
