"""Every op as a network, streamed through the runtime: what the evaluator makes of it is what the op means."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from tmlc.emit.tensorrt.library import Library
from tmlc.emit.tensorrt.lowering import LOWERINGS, REFUSED
from tmlc.ir.dims import Dim
from tmlc.ir.ops import OPS, spec_of
from tmlc.ir.program import type_of
from tmlc.ir.run import ProgramRunner

from ..emit.conftest import Builder, decoder
from ..emit.test_blocks import layer
from ..emit.test_decoders import latent, sinking
from .stand_in import open_program


def test_every_op_of_the_ir_is_lowered_or_refused_with_a_reason() -> None:
    assert set(LOWERINGS) | set(REFUSED) == set(OPS)
    assert not set(LOWERINGS) & set(REFUSED)


def example(node: fx.Node, n: int, rng: np.random.Generator) -> np.ndarray:
    """A value of an argument: ids inside their table, keys, pictures, else normal numbers."""
    shape, dtype = type_of(node).at(n), type_of(node).dtype
    if dtype == "u8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if dtype == "i64" and shape[1] == 3:
        return rng.integers(0, 2**40, shape)
    if dtype == "i64":
        return rng.integers(0, 4, shape)
    return rng.standard_normal(shape).astype(np.float32)


def check(b: Builder, library: Library, sizes: list[int], tolerance: float = 2e-5) -> None:
    """Streams calls of these sizes and compares each with the program in eager PyTorch."""
    program = b.program
    backend, _ = open_program(program, b.source, library)
    slot = backend.slots(2).handle(1)
    reference = ProgramRunner(program, b.source).session()
    rng = np.random.default_rng(5)
    for name, method in program.methods.items():
        for n in sizes:
            given = [example(node, n, rng) for node in method.inputs]
            expected = reference.call(name, *map(torch.from_numpy, given))
            narrow = [x.astype(np.int32) if x.dtype == np.int64 and x.shape[1] != 3 else x for x in given]
            found = backend.call(name, [(n, slot)], narrow)
            for e, f in zip(expected, found, strict=True):
                scale = max(float(e.abs().max()), 1.0) if e.is_floating_point() else 1.0
                np.testing.assert_allclose(f, e.numpy(), rtol=0, atol=tolerance * scale)


STREAM = [3, 8, 1, 8, 8, 5, 8, 7, 8, 6, 8]  # past the end of a ring of 48


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("f32", 2e-5), ("f16", 4e-3), ("bf16", 4e-2)], ids=["fp32", "fp16", "bf16"]
)
def test_a_layer_of_the_reference_model_in_miniature(library, dtype: str, tolerance: float) -> None:
    check(decoder(dtype), library, STREAM, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 2e-5), ("f16", 2e-2)], ids=["fp32", "fp16"])
def test_caches_of_int8_codes(library, dtype: str, tolerance: float) -> None:
    check(decoder(dtype, kv="u8"), library, STREAM, tolerance)


def test_latent_attention_and_grouped_routing(library) -> None:
    check(latent(), library, STREAM[:7])


def test_sink_logits_soft_caps_and_clamped_experts(library) -> None:
    check(sinking(), library, [3, 8, 1, 8, 8, 5, 8, 8, 8, 2])


def test_a_layer_of_inkling_2_in_miniature(library) -> None:
    check(layer(20, 5, 7), library, [3, 8, 1, 8, 8, 5, 8, 1, 8, 8, 2])


def x_of(b: Builder, cols: int = 12) -> fx.Node:
    return b.input("x", cols)


def elementwise() -> Builder:
    b = Builder().method("m")
    x, y = x_of(b), b.input("y", 12)
    s = b.weight("s", 1)
    out = [
        b.op("add", x, y), b.op("mul", x, y), b.op("add_scaled", x, y, 0.3), b.op("scale", x, -2.0),
        b.op("clamp", x, -0.5, 0.25), b.op("scale_by", x, s), b.op("add_row", x, b.weight("rows", 3, 12), 2),
        b.op("silu", x), b.op("gelu", x), b.op("sigmoid", x), b.op("softcap", x, 1.5), b.op("swiglu", x, y),
        b.op("modulate", x, y, b.op("silu", y)), b.op("columns", x, 3, 7), b.op("reshape", x, 4),
        b.op("l2_clip", x, None, 3, 0.8), b.op("concat_columns", x, y), b.op("rms_norm", x, b.weight("w", 12), 1e-6),
        b.op("rms_norm", x, b.weight("w3", 3), 1e-5), b.op("head_columns", x, 3, 1, 3),
        b.op("concat_heads", x, b.op("columns", y, 0, 2), 4, 2),
        b.op("concat_heads", b.op("columns", y, 0, 5), x, 3, 1), b.op("concat_heads", x, y, 2, 0),
        b.op("mul", x, b.op("columns", b.op("concat_columns", x, y), 6, 18)),
    ]  # fmt: skip
    b.output(*out)
    return b


def fused() -> Builder:
    b = Builder().method("m")
    x, y = x_of(b), b.input("y", 9)
    taps = b.weight("taps", 4, 3), b.state("tail", "conv_tail", 2, 4)
    whole = b.weight("taps9", 9, 2), b.state("tail9", "conv_tail", 1, 9)
    two = b.weight("taps12", 12, 2), b.state("tail12", "conv_tail", 1, 12)
    head = b.weight("w", 9, 12), b.weight("bias", 9), b.weight("s", 1)
    logits = b.op("linear", x, b.weight("gate", 6, 12), None)
    weights, experts = b.two("sink_router", logits, b.weight("choice", 5), b.weight("route", 1), 2, 1, 1.5)
    moe = x, weights, experts, b.weight("up", 6, 10, 12), b.weight("down", 6, 12, 5), None, None, 0.0, 0.0, 0.0, 0.0, 2
    b.output(
        b.op("linear_add", x, *head, y),
        b.op("linear_conv_state", x, *head, *taps, 2, True, 0.5, y),
        b.op("linear_conv_state", x, b.weight("v", 9, 12), None, None, *whole, 0, False, 1.0, None),
        b.op("moe_add", x, *moe),
        b.op("moe_conv_state", *two, True, 0.7, x, *moe),
    )
    return b


def media() -> Builder:
    b = Builder().method("hear")
    pcm = b.input("pcm", 20)
    levels = b.op("dmel_state", pcm, b.weight("window", 1, 52), b.weight("filters", 6, 27),
                  b.state("window.tail", "audio_window", 1, 32), -3.0, 2.0, 4)  # fmt: skip
    b.output(b.op("bag_embedding", b.weight("table", 24, 10), levels, 4))
    b.method("see")
    video = b.input("video", 48, "u8", Dim(16))
    folds = [1, 2, 2, 2]
    b.output(b.op("patchify", video, 2, 8, 4, folds, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    b.method("say")
    frames = b.input("frames", 23)
    b.output(b.op("overlap_add_state", frames, b.weight("hann", 1, 23), b.state("overlap", "overlap", 1, 13), 10))
    b.method("whole")
    frames = b.input("frames", 10)
    b.output(b.op("overlap_add_state", frames, b.weight("flat", 1, 10), b.state("none", "overlap", 1, 3), 7))
    b.method("read")
    ids = b.input("ids", 1, "i64")
    b.output(b.op("embedding", b.weight("words", 4, 6, dtype="bf16"), ids))
    return b


def chance() -> Builder:
    b = Builder().method("dream")
    b.output(b.op("philox_normal", b.input("key", 3, "i64"), 10))
    b.method("choose")
    b.output(b.op("sample", b.input("logits", 9), b.input("key", 3, "i64"), b.input("temperature", 1)))
    b.method("pick")
    x = x_of(b)
    key, warm = b.input("key", 3, "i64"), b.input("temperature", 1)
    b.output(b.op("head_sample", x, b.weight("head", 11, 12), b.weight("hb", 11), key, warm, 0.5, 3.0, 7))
    return b


def routers() -> Builder:
    b = Builder().method("m")
    x = x_of(b)
    made: list[Any] = []
    for scores in (0, 1, 2):
        made += b.two("topk_router", x, None, scores, 3, True, 1, 1, 1.5)
        made += b.two("topk_router", x, b.weight("bias", 12), scores, 2, False, 4, 2, 1.0)
    made += b.two("topk_router", b.op("scale", x, 0.0), None, 1, 4, True, 1, 1, 1.0)  # all equal: lowest first
    b.output(*made)
    return b


def coded(scheme: str) -> Builder:
    """Codes with a last group that is not full, in a projection and in experts."""
    b = Builder().method("m")
    x = b.input("x", 72)
    made: dict[str, fx.Node] = {}
    for name, shape in (("w", (20, 72)), ("up", (3, 2 * 40, 72)), ("down", (3, 72, 40))):
        b.source[f"{name}.floats"] = torch.randn(shape, generator=b.random) / 8
        b.program.weights.source(f"{name}.floats", "f32", shape)
        b.program.weights.quantize(name, f"{name}.floats", scheme)
        made[name] = b.program.add_weight_input("m", name)
    logits = b.op("linear", x, b.weight("gate", 3, 72), None)
    weights, experts = b.two("topk_router", logits, None, 0, 2, True, 1, 1, 1.0)
    moe = b.op("moe", x, weights, experts, made["up"], made["down"], None, None, 0.0, 0.0)
    b.output(b.op("linear", x, made["w"], b.weight("bias", 20)), moe)
    return b


@pytest.mark.parametrize("scheme", ["i8g32", "i4g32", "i4g64"])
def test_codes_stand_for_what_they_do_in_the_ir(library, scheme: str) -> None:
    check(coded(scheme), library, [3, 1, 8], 4e-3)


APART = [elementwise, fused, media, chance, routers]


@pytest.mark.parametrize("make", APART)
def test_ops_by_themselves(library, make) -> None:
    check(make(), library, [3, 1, 8, 5, 2])


def test_every_lowering_is_in_one_of_these_programs() -> None:
    programs = [b.program for b in (decoder(), latent(), sinking(), layer(20, 5, 7), *(make() for make in APART))]
    methods = [method for program in programs for method in program.methods.values()]
    assert {spec_of(node.target).name for method in methods for node in method.calls()} == set(LOWERINGS)
