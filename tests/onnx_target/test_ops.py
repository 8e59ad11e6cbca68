"""Each canonical op through its ONNX nodes, against its PyTorch reference: odd sizes, every call shape, states that go
from call to call. Every graph has passed `onnx.checker` with full shape inference before."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tmlc.emit.onnx.table import LOWERINGS, REFUSED
from tmlc.errors import EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import OPS, spec_of

SIZES = [3, 1, 5, 8, 2, 7]
COVERED: set[str] = set()


@pytest.fixture
def checked(check):
    """`check`, which writes down the ops that it has seen."""

    def run(b, sizes=tuple(SIZES), *args, **kwargs):
        COVERED.update(spec_of(node.target).name for node in b.program.methods["m"].calls())
        check(b, sizes, *args, **kwargs)

    return run


def ids(limit):
    return lambda rng, shape: rng.integers(0, limit, shape, dtype=np.int64)


def keys(rng, shape):
    return rng.integers(0, 2**62, shape, dtype=np.int64)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_lookups(build, checked, dtype):
    b = build()
    rows = b.op("embedding", b.weight("table", 11, 7, dtype=dtype), b.input("ids", 1, "i64"))
    bag = b.op("bag_embedding", b.weight("bins", 5 * 4, 7, dtype=dtype), b.input("levels", 5, "i64"), 4)
    checked(b.output(rows, bag), ids=ids(11), levels=ids(4))


def test_elementwise(build, checked):
    b = build()
    x, y, z = (b.input(name, 13) for name in "xyz")
    unary = [b.op(name, x) for name in ("silu", "gelu", "sigmoid")]
    binary = [b.op(name, x, y) for name in ("add", "mul", "swiglu")]
    more = [
        b.op("add_scaled", x, y, -0.37),
        b.op("scale", x, 3.5),
        b.op("clamp", x, -0.5, 0.75),
        b.op("scale_by", x, b.weight("one", 1)),
        b.op("scale_by", y, b.weight("none")),
        b.op("add_row", x, b.weight("rows", 4, 13), 2),
        b.op("modulate", x, y, z),
        b.op("softcap", x, 1.5),
        b.op("concat_columns", x, y),
        b.op("columns", x, 3, 9),
    ]
    checked(b.output(*unary, *binary, *more))


def test_reshapes_of_rows_that_belong_to_no_position_too(build, checked):
    b = build()
    x = b.input("x", 12, rows=Dim(2))
    checked(b.output(b.op("reshape", x, 24), b.op("reshape", x, 4), b.op("reshape", b.op("silu", x), 8)))


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3,), (6,)])
def test_norms(build, checked, shape):
    b = build()
    x, y = b.input("x", 12), b.input("y", 12)
    made = [b.op("rms_norm", x, b.weight("w", *shape), 1e-5)]
    if shape[-1] == 12:
        made += b.two("add_rms_norm", x, y, b.weight("v", *shape), 1e-6)
    checked(b.output(*made))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32", "i4g64"])
@pytest.mark.parametrize("k", [64, 33, 5])
def test_products(build, checked, dtype, k):
    b = build()
    x, y = b.input("x", k), b.input("y", 9)
    w = b.weight("w", 9, k, dtype=dtype)
    bias, one = b.weight("b", 9), b.weight("one", 1, 1)
    made = [b.op("linear", x, w, None), b.op("linear", x, w, bias), b.op("linear_add", x, w, bias, one, y)]
    checked(b.output(*made, b.op("linear_add", x, w, None, None, y)))


@pytest.mark.parametrize("dtype", ["i8g32", "i4g32", "i4g64"])
@pytest.mark.parametrize("k", [64, 33, 160])
def test_products_in_onnx_runtimes_own_operators(build, checked, dtype, k):
    """Activations are rounded to int8 there, as the CPU engine rounds them."""
    b = build()
    x = b.input("x", k)
    w = b.weight("w", 19, k, dtype=dtype)
    checked(b.output(b.op("linear", x, w, None), b.op("linear", x, w, b.weight("b", 19))), tuple(SIZES), 2e-2,
            target="onnx:contrib")  # fmt: skip


def test_heads(build, checked):
    b = build()
    x, y, z = b.input("x", 12), b.input("y", 9), b.input("z", 5)
    made = [
        b.op("head_columns", x, 3, 1, 3),
        b.op("concat_heads", x, y, 3, 0),
        b.op("concat_heads", z, y, 3, 1),
        b.op("concat_heads", y, z, 3, 2),
        b.op("l2_clip", x, b.weight("s", 12), 3, 0.8),
        b.op("l2_clip", x, None, 2, 1.1),
        b.op("mix_blocks", x, b.weight("q", 2, 4), 1e-6),
        b.op("mix_blocks", x, b.weight("r", 3), 1e-6),
    ]
    checked(b.output(*made))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("offset", "rotated", "scaling"), [(0, 8, 1.0), (3, 4, 0.7), (2, 6, 1.25)])
def test_rotary_positions(build, checked, interleaved, offset, rotated, scaling):
    b = build()
    x = b.input("x", 24)
    position = b.state("position", "position", 1, 1, dtype="i64")
    frequencies = b.value("f", 1000.0 ** -torch.linspace(0, 0.9, rotated // 2))
    turned = b.op("rope_state", x, position, frequencies, 3, offset, interleaved, scaling)
    b.op("advance", position, x, 0)
    checked(b.output(turned), SIZES * 5)


def test_angles_far_out_keep_their_digits(build, driven, tmp_path):
    b = build()
    x = b.input("x", 4)
    position = b.state("position", "position", 1, 1, dtype="i64")
    turned = b.op("rope_state", x, position, b.value("f", torch.tensor([1.0, 0.37])), 1, 0, False, 1.0)
    b.op("advance", position, x, 0)
    b.output(turned)
    graphs = driven(b.program, b.source, tmp_path)
    states = graphs.fresh()
    states["position"][:] = 10_000_000
    (found,) = graphs.call("m", states, [np.array([[1, 1, 0, 0]], np.float32)])
    angle = (np.float32(10_000_000) * np.array([1.0, 0.37], np.float32)).astype(np.float64)
    assert np.abs(found - np.concatenate([np.cos(angle), np.sin(angle)])).max() < 1e-6
    assert states["position"] == 10_000_001


def attention(b, *, heads=4, kv_heads=2, d=6, dv=5, window=0, sinks=0, capacity=64, floor=0.0, rel=0, extent=9,
              sink="", cap=0.0, kv="f32", tag=""):  # fmt: skip
    q, k, v = b.input(f"q{tag}", heads * d), b.input(f"k{tag}", kv_heads * d), b.input(f"v{tag}", kv_heads * dv)
    position = b.state("position", "position", 1, 1, dtype="i64")
    width = (lambda w: kv_heads * (-(-w // 4) * 4 + 4)) if kv == "u8" else (lambda w: kv_heads * w)
    kind = "kv_ring" if window else "kv_linear"
    caches = [b.state(f"{n}{tag}", kind, capacity, width(w), dtype=kv) for n, w in (("kc", d), ("vc", dv))]
    bias = (b.input(f"rel{tag}", heads * rel), b.weight(f"table{tag}", rel, extent)) if rel else (None, None)
    logits = {"": None, "all": lambda: b.weight(f"sink{tag}", 1, heads), "row": lambda: b.input(f"sink{tag}", heads)}
    chosen = logits[sink]
    return q, b.op("attention_state", q, k, v, position, *caches, *bias, heads, kv_heads, d**-0.5, window, sinks,
                   floor, 0.3, chosen() if chosen else None, cap)  # fmt: skip


ATTENTION = {
    "linear": dict(),
    "one kv head for all": dict(kv_heads=1, dv=6),
    "a kv head each": dict(kv_heads=4),
    "ring": dict(window=7, capacity=16),
    "ring and sinks": dict(window=9, sinks=16, capacity=48),
    "a window of one": dict(window=1, capacity=16, d=3, dv=1),
    "relative bias": dict(rel=3, window=20, capacity=32),
    "relative bias beyond its extent": dict(rel=2, extent=4),
    "log scaling": dict(floor=5.0, rel=3, extent=70, window=40, sinks=16, capacity=64),
    "sink logits": dict(sink="all"),
    "sink logits of each row": dict(sink="row", window=11, capacity=32),
    "soft cap": dict(cap=1.5, rel=2),
}


@pytest.mark.parametrize("kv", ["f32", "bf16", "u8"])
@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_attention_over_a_cache(build, checked, name, kv):
    """f32 caches to rounding. Narrow caches: now and then a last bit turns a rounding over."""
    b = build()
    q, out = attention(b, kv=kv, **ATTENTION[name])
    b.op("advance", b.state("position", "position", 1, 1, dtype="i64"), q, 0)
    sizes = SIZES * (2 if ATTENTION[name].get("window", 0) == 0 else 5)  # a linear cache is full after 52 of 64
    checked(b.output(out), sizes, {"f32": 1e-5, "bf16": 8e-3, "u8": 2e-2}[kv])


def test_layers_with_unlike_caches_in_one_method(build, checked):
    b = build()
    q, first = attention(b, window=7, capacity=16, tag="a")
    _, second = attention(b, window=20, sinks=16, capacity=48, rel=2, tag="b")
    _, third = attention(b, capacity=64, tag="c", heads=2)
    b.op("advance", b.state("position", "position", 1, 1, dtype="i64"), q, 0)
    checked(b.output(first, second, third), SIZES + SIZES)


@pytest.mark.parametrize(("shape", "residual"), [((5, 1, 4), True), ((5, 2), False), ((5, 7), True)])
def test_convolutions_keep_their_tail(build, checked, shape, residual):
    b = build()
    x, taps = b.input("x", 5), shape[-1]
    b2 = b.op("short_conv_state", x, b.weight("w", *shape), b.state("t", "conv_tail", taps - 1, 5), residual)
    rows = b.input("rows", 5, rows=Dim(3))
    wide = b.op("short_conv_state", rows, b.weight("v", *shape), b.state("u", "conv_tail", taps - 1, 5), not residual)
    checked(b.output(b2, wide))


@pytest.mark.parametrize("residual", [True, False])
def test_convolutions_whose_taps_are_computed(build, checked, residual):
    b = build()
    x, taps = b.input("x", 12), b.input("taps", 3 * 4)
    out = b.op("dynamic_conv_state", x, b.weight("w", 4, 12), taps, b.state("t", "conv_tail", 3, 12), residual)
    checked(b.output(out))


@pytest.mark.parametrize(("start", "channels", "level"), [(0, 9, 1.0), (2, 5, 0.5), (4, 5, 2.0)])
def test_fused_products_and_convolutions(build, checked, start, channels, level):
    b = build()
    x, y = b.input("x", 6), b.input("y", 9)
    w, bias = b.weight("w", 9, 6), b.weight("b", 9)
    tails = [b.state(f"t{i}", "conv_tail", 2, channels) for i in range(2)]
    taps, one = b.weight("taps", channels, 1, 3), b.weight("one", 1)
    plain = b.op("linear_conv_state", x, w, None, None, taps, tails[0], start, True, level, None)
    full = b.op("linear_conv_state", x, w, bias, one, taps, tails[1], start, False, level, y)
    checked(b.output(plain, full))


def ties(rng, shape):
    """Logits of which many are equal, and some far out."""
    values = np.array([-40.0, -25.0, -1.0, 0.0, 0.5, 0.5, 30.0], np.float32)
    return rng.choice(values, shape)


@pytest.mark.parametrize("logits", [None, ties])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_routers_with_a_shared_sink(build, checked, shared, logits):
    b = build()
    x = b.input("logits", 7 + shared)
    weights, experts = b.two("sink_router", x, b.weight("bias", 1, 7), b.weight("scale", 1), 3, shared, 2.5)
    y = b.input("x", 6)
    more = b.two("router", y, b.weight("w", 7 + shared, 6), b.weight("b2", 7), b.weight("s2", 1), 2, shared, 1.0)
    # Without a bias equal logits are equal choices: the lower index wins.
    even = b.two("sink_router", x, b.value("zeros", torch.zeros(7)), b.weight("s3", 1), 3, shared, 1.0)
    checked(b.output(weights, experts, *more, *even), **({"logits": logits} if logits else {}))


@pytest.mark.parametrize("scores", [0, 1, 2])
@pytest.mark.parametrize(("groups", "top"), [(1, 1), (4, 2), (2, 1), (8, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_routers_of_decoders(build, checked, scores, groups, top, tied):
    b = build()
    x = b.input("logits", 8)
    biases = [b.weight("bias", 8) if scores == 1 else None, None]
    made = [b.two("topk_router", x, bias, scores, 3, scores != 2, groups, top, 1.5) for bias in biases]
    checked(b.output(*(node for pair in made for node in pair)), **({"logits": ties} if tied else {}))


def test_a_router_chooses_among_scores_that_saturate(build, driven, tmp_path):
    """Sigmoids of -20 and -30 differ; runtimes that cut the function off at -18 would call them equal."""
    b = build()
    x = b.input("logits", 4)
    weights, experts = b.two("topk_router", x, None, 1, 2, True, 1, 1, 1.0)
    graphs = driven(b.output(weights, experts).program, b.source, tmp_path)
    _, chosen = graphs.call("m", {}, [np.array([[-60, -30, -20, -25]], np.float32)])
    assert chosen.tolist() == [[2, 3]]


def experts(b, columns=3, dtype="f32", alpha=0.0, limit=0.0, caps=(0.0, 0.0), biases=False, grouped_from=0):
    x, w = b.input("x", 10), b.input("w", columns)
    chosen = b.input("experts", columns, "i64")
    up, down = b.weight("up", 5, 14, 10, dtype=dtype), b.weight("down", 5, 10, 7, dtype=dtype)
    more = (b.weight("ub", 5, 14), b.weight("db", 5, 10)) if biases else (None, None)
    return x, (x, w, chosen, up, down, *more, alpha, limit, *caps, grouped_from)


@pytest.mark.parametrize("grouped_from", [0, 1, 4, 100])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32", "i4g64"])
def test_experts_in_both_ways_and_every_dtype(build, checked, grouped_from, dtype):
    b = build()
    _, args = experts(b, dtype=dtype, grouped_from=grouped_from)
    checked(b.output(b.op("moe", *args)), experts=ids(5))


@pytest.mark.parametrize("grouped_from", [0, 100])
@pytest.mark.parametrize("form", [dict(biases=True), dict(alpha=1.7, limit=0.6, biases=True), dict(caps=(1.5, 0.7))])
def test_every_activation_of_experts(build, checked, grouped_from, form):
    b = build()
    _, args = experts(b, grouped_from=grouped_from, **form)
    checked(b.output(b.op("moe", *args)), experts=ids(5))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32", "i4g64"])
@pytest.mark.parametrize("router", ["sink", "softmax", "raw"])
def test_experts_in_onnx_runtimes_own_operators(build, checked, dtype, router):
    """Behind each kind of router; a negative scale too. Codes: activations are rounded to int8 there."""
    b = build()
    x = b.input("x", 64)
    up, down = b.weight("up", 7, 256, 64, dtype=dtype), b.weight("down", 7, 64, 128, dtype=dtype)
    if router == "sink":
        routes = b.two(
            "router", x, b.weight("w", 7, 64), b.weight("b", 5), b.value("s", torch.tensor([-1.3])), 2, 2, 2.0
        )
    else:
        logits = b.op("linear", x, b.weight("w", 7, 64), None)
        routes = b.two("topk_router", logits, None, 0 if router == "softmax" else 2, 3, False, 1, 1, 1.5)
    biases = (b.weight("ub", 7, 256), b.weight("db", 7, 64)) if router == "raw" else (None, None)
    form = (1.7, 0.6) if router == "raw" else (0.0, 0.0)
    args = (x, *routes, up, down, *biases, *form, 0.0, 0.0, 0)
    exact = dtype in ("f32", "bf16")
    checked(b.output(b.op("moe", *args)), tuple(SIZES), 1e-5 if exact else 3e-2, target="onnx:contrib")


def test_experts_that_the_operators_cannot_run_take_the_standard_way(build, driven, checked, tmp_path):
    """Weights of either sign, soft caps, codes that end inside a group."""
    b = build()
    _, args = experts(b, dtype="i8g32")
    b.output(b.op("moe", *args))
    checked(b, tuple(SIZES), target="onnx:contrib", experts=ids(5))
    used = driven(b.program, b.source, tmp_path / "again", "onnx:contrib").signature["methods"]["m"]["operators"]
    assert "Loop" in used and "QMoE" not in used


@pytest.mark.parametrize("choice", [lambda rng, shape: np.full(shape, 3, np.int64),
                                    lambda rng, shape: np.tile(np.array([4, 0, 4]), (shape[0], 1))])  # fmt: skip
@pytest.mark.parametrize("grouped_from", [0, 100])
def test_all_rows_on_one_expert_and_an_expert_chosen_twice(build, checked, choice, grouped_from):
    b = build()
    _, args = experts(b, grouped_from=grouped_from)
    checked(b.output(b.op("moe", *args)), experts=choice)


def test_experts_of_one_column_and_their_epilogues(build, checked):
    b = build()
    x, args = experts(b, columns=1)
    added = b.op("moe_add", x, *args)
    tails = [b.state(f"t{i}", "conv_tail", 2, 10) for i in range(2)]
    taps = b.weight("taps", 10, 1, 3)
    mixed = [b.op("moe_conv_state", taps, tails[0], True, 1.0, None, *args),
             b.op("moe_conv_state", taps, tails[1], False, 0.5, x, *args)]  # fmt: skip
    checked(b.output(added, *mixed), experts=ids(5))


@pytest.mark.parametrize(("hop", "width"), [(40, 80), (30, 100), (49, 50)])
def test_levels_of_sound(build, checked, hop, width):
    b = build()
    pcm = b.input("pcm", hop)
    window = b.value("window", torch.hann_window(width))
    filters = b.value("filters", torch.rand(7, width // 2 + 1, generator=b.random))
    tail = b.state("tail", "audio_window", 1, width - hop)
    levels = b.op("dmel_state", pcm, window, filters, tail, -3.0, 1.0, 9)
    checked(b.output(levels), pcm=lambda rng, s: (0.3 * rng.standard_normal(s)).astype(np.float32))


def test_silence_is_the_lowest_level(build, checked):
    b = build()
    tail = b.state("tail", "audio_window", 1, 8)
    window, filters = b.value("window", torch.ones(16)), b.value("filters", torch.ones(2, 9))
    levels = b.op("dmel_state", b.input("pcm", 8), window, filters, tail, -7.0, 2.0, 16)
    checked(b.output(levels), pcm=lambda rng, s: np.zeros(s, np.float32))


@pytest.mark.parametrize("folds", [[1, 2, 2, 3], [2, 6], [1, 1, 1, 3, 2, 2]])
def test_patches_of_video(build, checked, folds):
    b = build()
    video = b.input("video", 18 * 3, "u8", rows=Dim(2 * 12))
    out = b.op("patchify", video, 2, 12, 6, folds, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    checked(b.output(out), (1, 3, 2))


@pytest.mark.parametrize(("width", "hop"), [(8, 4), (10, 3), (7, 5), (9, 8)])
def test_overlapping_frames(build, checked, width, hop):
    b = build()
    frames = b.input("frames", width)
    state = b.state("o", "overlap", 1, width - hop)
    out = b.op("overlap_add_state", frames, b.weight("window", 1, width), state, hop)
    rows = b.input("rows", width, rows=Dim(2))
    more = b.op("overlap_add_state", rows, b.weight("v", width), b.state("p", "overlap", 1, width - hop), hop)
    checked(b.output(out, more))


@pytest.mark.parametrize("size", [1, 4, 7, 33])
def test_random_normals(build, checked, size):
    """To the last bits: the words are whole numbers, and what is made of them is made in float64."""
    b = build()
    checked(b.output(b.op("philox_normal", b.input("key", 3, "i64"), size)), tuple(SIZES), 1e-7, key=keys)


@pytest.mark.parametrize("heat", [0.0, 0.7, None])
@pytest.mark.parametrize("entries", [4, 29])
def test_sampling(build, checked, heat, entries):
    b = build()
    logits, key, t = b.input("logits", entries), b.input("key", 3, "i64"), b.input("temperature", 1)
    plain = b.op("sample", logits, key, t)
    x = b.input("x", 6)
    w, bias = b.weight("w", 31, 6), b.weight("b", 31)
    fused = b.op("head_sample", x, w, bias, key, t, 2.0, 30.0, entries)
    whole = b.op("head_sample", x, w, None, key, t, 1.0, 0.0, 31)
    warm = (lambda rng, s: np.full(s, heat, np.float32)) if heat is not None else (
        lambda rng, s: rng.choice(np.array([0.0, 1.3], np.float32), s))  # fmt: skip
    checked(b.output(plain, fused, whole), key=keys, temperature=warm)


def test_equal_logits_go_to_the_lowest_index(build, driven, tmp_path):
    b = build()
    chosen = b.op("sample", b.input("logits", 5), b.input("key", 3, "i64"), b.input("temperature", 1))
    graphs = driven(b.output(chosen).program, b.source, tmp_path)
    logits = np.array([[1, 3, 3, 0, 3]], np.float32)
    assert graphs.call("m", {}, [logits, np.zeros((1, 3), np.int64), np.zeros((1, 1), np.float32)])[0] == 1


def test_every_op_that_the_target_lowers_was_tried_and_every_other_is_refused():
    """The last test of the file: what the others noted, against the table of canonical ops."""
    assert set(LOWERINGS) | set(REFUSED) == set(OPS) and not set(LOWERINGS) & set(REFUSED)
    if COVERED:  # the whole file ran
        assert set(LOWERINGS) - COVERED == set()


def test_stateless_ops_are_refused_with_op_method_source_reason_and_what_to_do(build):
    from tmlc.emit.targets import find_target

    b = build()
    q = b.input("q", 8)
    out = b.op("attention", q, q, q, None, None, 2, 2, 0.5, 0, 0, 0.0, 0.0)
    out.meta["source"] = "model.layers.0.self_attn at model.py:7"
    b.output(out)
    with pytest.raises(EmitError) as caught:
        find_target("onnx").emit(b.program, b.source, lambda *_: None)
    error = caught.value
    assert "op attention" in error.what and "stateless" in error.what
    assert "method m" in error.where and "model.py:7" in error.where and "state.insert" in error.fix
    rows = find_target("onnx").coverage(b.program)
    assert [(r.method, r.op, r.kernel) for r in rows] == [("m", "attention", None)] and "state.insert" in rows[0].reason


def test_operands_that_no_graph_takes_are_refused(build):
    from tmlc.emit.targets import find_target

    b = build()
    b.output(b.op("rms_norm", b.input("x", 4), b.input("w", 4, rows=1), 1e-6))
    with pytest.raises(EmitError, match="its weight has to be a weight"):
        find_target("onnx").emit(b.program, b.source, lambda *_: None)


def test_the_page_lists_what_lowers_each_op():
    page = (Path(__file__).parents[2] / "docs/onnx.md").read_text()
    for op, lowering in LOWERINGS.items():
        assert f"| `{op}` | {lowering.operators} |" in page
    for op in REFUSED:
        assert f"`{op}`" in page
