"""A plan from a stranger cannot step outside its memory: mutated plans run under ASan and UBSan without a report."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

FUZZ = Path(__file__).parents[2] / "kernels/cpu/fuzz/plan_fuzz.cpp"
COPIES = 20000  # mutated copies of each seed


def dense(b, rng):
    """Elementwise work, norms, a linear layer of each dtype, lookups."""
    x, ids, y = b.input(0, "f32", 20), b.input(1, "i32", 1), b.output(0, "f32", 20)
    one, row = b.weight(np.ones((1, 1), np.float32)), b.weight(rng.random((1, 20), np.float32))
    f32 = b.weight(rng.random((2, 20 * 16), np.float32))
    bf16 = b.weight(rng.integers(0, 2**15, (2, 20 * 16)).astype(np.uint16))
    table, small = b.weight(rng.random((5, 20), np.float32)), b.weight(rng.integers(0, 999, (4, 20)).astype(np.uint16))
    u, v, w = (b.arena("f32", (1, 0), 20) for _ in range(3))
    half = b.tensor("arena", "f32", (1, 0), 10, b.tensors[u][2], 20)
    other = b.tensor("arena", "f32", (1, 0), 10, b.tensors[u][2] + 40, 20)
    flat = b.tensor("arena", "f32", (2, 0), 10, b.tensors[w][2])
    tail = b.slot("f32", 3, 20)
    b.method(
        [x, ids],
        [y],
        [
            ("copy", [u, x]),
            ("embedding", [v, ids, table]),
            ("add", [u, u, v]),
            ("embedding", [v, ids, small]),
            ("mul", [u, u, v]),
            ("rms_norm", [v, u, row], [], [1e-6]),
            ("add_rms_norm", [u, w, v, x, row], [], [1e-6]),
            ("linear", [v, w, f32]),
            ("linear", [w, v, bf16, row]),
            ("silu", [flat, flat]),
            ("gelu", [v, v]),
            ("swiglu", [half, half, other]),
            ("modulate", [v, u, v, w]),
            ("add_scaled", [v, v, w], [], [0.5]),
            ("scale", [v, v], [], [0.5]),
            ("scale_by", [v, v, one]),
            ("add_row", [v, v, table], [3]),
            ("short_conv", [y, v, b.weight(rng.random((4, 20), np.float32)), tail], [1]),
        ],
    )


def attention(b, rng):
    """A linear cache and a ring with sinks, one of each dtype, with relative bias."""
    for window, sinks, capacity, dtype in ((0, 0, 32, "f32"), (9, 16, 48, "bf16")):
        x, y = b.input(0, "f32", 24), b.output(0, "f32", 24)
        kv, rel = b.arena("f32", (1, 0), 12), b.arena("f32", (1, 0), 8)
        position = b.slot("i64", 1, 1)
        caches = [b.slot(dtype, 2 * capacity // 16, 6 * 16), b.slot(dtype, 2 * capacity, 6)]
        table = b.weight(rng.random((2, 7), np.float32))
        left = b.tensor("input", "f32", (1, 0), 12, 0, 24)
        operands, ints = [y, x, kv, kv, position, *caches, rel, table], [4, 2, window, sinks, capacity, 1]
        code = [
            ("copy", [kv, left]),
            ("attention", operands, ints, [0.3, 2.0, 0.1, 0.0]),
            ("advance", [position], [0 if window else capacity]),
        ]
        b.method([x], [y], code)


def experts(b, rng):
    """Routing both ways and experts of both dtypes, with numbers from the router and from outside."""
    x, numbers, y = b.input(0, "f32", 18), b.input(1, "i32", 3), b.output(0, "f32", 18)
    logits = b.arena("f32", (1, 0), 6)
    weights, chosen = b.arena("f32", (1, 0), 3), b.arena("i32", (1, 0), 3)
    u = b.arena("f32", (1, 0), 18)
    router = b.weight(rng.random((1, 18 * 16), np.float32))
    bias, scale = b.weight(np.zeros((1, 5), np.float32)), b.weight(np.ones((1, 1), np.float32))
    up = b.weight(rng.random((12, 18 * 16), np.float32))
    down = b.weight(rng.random((12, 5 * 16), np.float32))
    up16 = b.weight(rng.integers(0, 2**14, (12, 18 * 16)).astype(np.uint16))
    down16 = b.weight(rng.integers(0, 2**14, (12, 6 * 16)).astype(np.uint16))
    b.method(
        [x, numbers],
        [y],
        [
            ("linear", [logits, x, router]),
            ("sink_router", [weights, chosen, logits, bias, scale], [2, 1], [2.0]),
            ("moe", [u, x, weights, numbers, up, down], [6, 5]),
            ("router", [weights, chosen, u, router, bias, scale], [2, 1], [2.0]),
            ("moe", [y, u, weights, chosen, up16, down16], [6, 5]),
        ],
    )


def foreign_heads(b, rng):
    """Rotary positions, joined heads, attention whose values have another width, with sink logits and a soft cap."""
    for window, flags, rows in ((0, 2, 1), (9, 3, 0)):
        x, y = b.input(0, "f32", 24), b.output(0, "f32", 20)
        turned, low, shared = b.arena("f32", (1, 0), 24), b.arena("f32", (1, 0), 12), b.arena("f32", (1, 0), 3)
        q, k, rel = b.arena("f32", (1, 0), 36), b.arena("f32", (1, 0), 18), b.arena("f32", (1, 0), 8)
        v = b.tensor("arena", "f32", (1, 0), 10, b.tensors[turned][2] + 8, 24)
        position, freq = b.slot("i64", 1, 1), b.weight(rng.random((1, 2), np.float32))
        caches = [b.slot("f32", 2 * 3, 9 * 16), b.slot("f32", 2 * 48, 5)]
        extra = [b.weight(rng.random((1, 4), np.float32))]
        if flags & 1:
            extra = [rel, b.weight(rng.random((2, 7), np.float32)), *extra]
        code = [
            ("rope", [turned, x, position, freq], [4, 1, rows], [1.25]),
            ("rope", [turned, turned, position, freq], [6, 0, 1 - rows], [1.0]),
            ("head_columns", [low, turned], [4, 2, 5]),
            ("head_columns", [shared, turned], [1, 20, 23]),
            ("head_columns", [rel, turned], [4, 3, 5]),
            ("concat_heads", [q, turned, low], [4, 0]),
            ("concat_heads", [k, low, shared], [2, 2]),
            ("attention", [y, q, k, v, position, *caches, *extra], [4, 2, window, 16, 48, flags], [0.3, 2.0, 0.1, 1.5]),
            ("advance", [position], [0 if window else 48]),
        ]
        b.method([x], [y], code)


def foreign_experts(b, rng):
    """topk_router in each of its ways, and experts with biases and a clamped activation."""
    x, y = b.input(0, "f32", 12), b.output(0, "f32", 12)
    weights, chosen = b.arena("f32", (1, 0), 3), b.arena("i32", (1, 0), 3)
    u, v = b.arena("f32", (1, 0), 12), b.arena("f32", (1, 0), 12)
    bias = b.weight(rng.random((1, 12), np.float32))
    up, down = b.weight(rng.random((24, 12 * 16), np.float32)), b.weight(rng.random((12, 5 * 16), np.float32))
    biases = [b.weight(rng.random((12, cols), np.float32)) for cols in (10, 12)]
    b.method(
        [x],
        [y],
        [
            ("topk_router", [weights, chosen, x, bias], [1, 3, 1, 4, 2], [2.5]),
            ("moe", [u, x, weights, chosen, up, down, *biases], [12, 5, 1], [1.702, 7.0]),
            ("topk_router", [weights, chosen, u], [0, 3, 0, 1, 1], [1.0]),
            ("moe", [v, u, weights, chosen, up, down], [12, 5, 0], [1.702, 7.0]),
            ("topk_router", [weights, chosen, v, bias], [2, 3, 1, 12, 5], [1.0]),
            ("moe", [y, v, weights, chosen, up, down], [12, 5]),
        ],
    )


def blocks(b, rng):
    """Residual blocks, clips, a convolution with computed taps, attention with computed sinks, capped experts."""
    x, y = b.input(0, "f32", 24), b.output(0, "f32", 20)
    mixed, half, taps = b.arena("f32", (1, 0), 24), b.arena("f32", (1, 0), 12), b.arena("f32", (1, 0), 6)
    out, sinks = b.arena("f32", (1, 0), 12), b.arena("f32", (1, 0), 2)
    weights, chosen = b.arena("f32", (1, 0), 2), b.arena("i32", (1, 0), 2)
    position = b.slot("i64", 1, 1)
    caches = [b.slot("f32", 2 * 3, 6 * 16), b.slot("f32", 2 * 48, 6)]
    up, down = b.weight(rng.random((4 * 2, 12 * 16), np.float32)), b.weight(rng.random((4, 5 * 16), np.float32))
    b.method(
        [x],
        [y],
        [
            ("mix_blocks", [mixed, x, b.weight(rng.random((2, 12), np.float32))], [], [1e-6]),
            ("l2_clip", [mixed, mixed, b.weight(rng.random((1, 24), np.float32))], [4], [1.5]),
            ("head_columns", [half, mixed], [2, 3, 9]),
            ("head_columns", [taps, mixed], [2, 1, 4]),
            ("head_columns", [sinks, mixed], [1, 5, 7]),
            ("dynamic_conv", [out, half, b.weight(rng.random((3, 12), np.float32)), taps, b.slot("f32", 2, 12)], [1]),
            ("attention", [half, out, out, out, position, *caches, sinks], [2, 2, 9, 16, 48, 2], [0.3, 0.0, 0.0, 0.0]),
            ("topk_router", [weights, chosen, b.tensor("arena", "f32", (1, 0), 4, b.tensors[half][2], 12)],
             [1, 2, 1, 1, 1], [1.0]),
            ("moe", [out, half, weights, chosen, up, down], [4, 5, 2], [0.0, 0.0, 0.7, 1.1]),
            ("sigmoid", [out, out]),
            ("softcap", [out, out], [], [2.0]),
            ("concat_columns", [y, out, b.tensor("arena", "f32", (1, 0), 8, b.tensors[half][2], 12)]),
            ("advance", [position], [0]),
        ],
    )  # fmt: skip


def media(b, rng):
    """Everything that hears, sees, draws and speaks."""
    pcm, levels = b.input(0, "f32", 8), b.arena("i32", (1, 0), 3)
    mel = b.output(0, "f32", 5)
    window, filters = b.weight(rng.random((1, 12), np.float32)), b.weight(rng.random((3, 7), np.float32))
    b.method(
        [pcm],
        [mel],
        [
            ("dmel", [levels, pcm, window, filters, b.slot("f32", 1, 4)], [16], [-7.0, 2.0]),
            ("bag_embedding", [mel, levels, b.weight(rng.random((48, 5), np.float32))], [16]),
        ],
    )
    video, leaves = b.input(0, "u8", 24, (16, 0)), b.output(0, "f32", 12, (32, 0))
    floats = [0.5, 0.4, 0.3, 0.2, 0.2, 0.2]
    b.method([video], [leaves], [("patchify", [leaves, video], [2, 8, 4, 2, 1, 2, 2, 2], floats)])
    key, heat, frames = b.input(0, "i64", 3), b.input(1, "f32", 1), b.arena("f32", (1, 0), 10)
    ids, out = b.output(0, "i32", 1), b.output(1, "f32", 4)
    b.method(
        [key, heat],
        [ids, out],
        [
            ("philox_normal", [frames, key]),
            ("sample", [ids, frames, key, heat]),
            ("overlap_add", [out, frames, b.weight(rng.random((1, 10), np.float32)), b.slot("f32", 1, 6)]),
        ],
    )


def codes(b, rng):
    """Quantised weights of every form, in a linear layer and in experts."""
    x, numbers, y = b.input(0, "f32", 40), b.input(1, "i32", 2), b.output(0, "f32", 40)
    u, v, weights = b.arena("f32", (1, 0), 40), b.arena("f32", (1, 0), 40), b.arena("f32", (1, 0), 2)
    two = b.tensor("input", "f32", (1, 0), 2, 0, 40)
    int8, int4 = 16 * 32 + 32, 16 * 16 + 32 + 16

    def some(rows, cols):
        return b.weight(rng.integers(0, 60, (rows, cols)).astype(np.uint8))

    b.method(
        [x, numbers],
        [y],
        [
            ("copy", [weights, two]),
            ("linear", [u, x, some(3, 2 * int8)]),
            ("linear", [v, u, some(3, 2 * int4), b.weight(rng.random((1, 40), np.float32))]),
            ("linear", [u, v, some(3, 2 * 256 + 48)]),
            ("moe", [v, u, weights, numbers, some(12, 2 * int8), some(9, int4)], [3, 20]),
            ("moe", [y, v, weights, numbers, some(12, 2 * 256 + 48), some(9, 2 * 256 + 48)], [3, 20]),
        ],
    )


SEEDS = {
    f.__name__: f for f in (dense, attention, experts, foreign_heads, foreign_experts, blocks, codes, media)
}


@pytest.fixture(scope="module")
def fuzzer(sanitized):
    """The driver and the library's own sources, compiled with both sanitizers."""
    return sanitized.program("plan_fuzz", [s for s in sanitized.sources if s.name != "api.cpp"] + [FUZZ])


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_plans_stay_inside_their_memory(fuzzer, best, rng, tmp_path, seed):
    b = best.Builder(max_n=6)
    SEEDS[seed](b, rng)
    b.build(best.library)  # the seed itself is a valid plan
    b.words(best.library).tofile(tmp_path / "words")
    (tmp_path / "weights").write_bytes(bytes(b.weights))
    run = subprocess.run(
        [fuzzer, tmp_path / "words", tmp_path / "weights", "0", str(COPIES)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512:detect_leaks=1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    accepted, refused, runs, batches = (int(word) for word in run.stdout.split()[1::2])
    assert min(accepted, refused, runs) > COPIES // 50 and batches > COPIES // 500, run.stdout
