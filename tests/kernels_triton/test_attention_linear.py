"""Attention and its output projection: against float64, and the same bits whether the product adds up the parts of the
splits (one row) or a launch of its own does, alone, in company and cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_attention import DV, NORMS, WEIGHTS, H, attributes, session, with_tables
from triton_harness import Session, Shape, agree, bits, draw, run, weight

from tmlc.kernels.triton import parts, tuning
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import Call, lower

M, TAPS = 21, 3
CONV = {"taps": weight(draw(80, M, TAPS))}
FORMS = {"f32": 1e-5, "bf16": 6e-3, "f8g128": 6e-3, "i8g32": 6e-3, "i4g32": 6e-3}


def sessions(dtype: str, capacity: int, window: int, conv: bool) -> list[Session]:
    """One that begins, one that goes on in a single position, one across splits or the seam of a ring."""
    found = [session(1, 3, 0, dtype, capacity), session(20, 1, 249 if not window else 47, dtype, capacity),
             session(40, 4, 126 if not window else 1000, dtype, capacity)]  # fmt: skip
    for number, one in enumerate(found):
        one.inputs["addend"] = draw(90 + number, one.count, M)
        if conv:
            one.states["tail"] = draw(95 + number, TAPS - 1, M)
    return found


def settings(conv: bool, **changed: float) -> dict:
    return attributes(log_floor=7.0, log_alpha=0.1, **changed) | {
        "eps": 1e-4, "offset": 0, "interleaved": False, "start": 0, "residual": conv, "level": 0.5 if conv else 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype", "window", "conv", "normed", "turned"),
    [("f32", "f32", 0, True, False, True), ("bf16", "f32", 20, False, True, False),
     ("f8g128", "bf16", 0, False, False, False), ("i8g32", "f32", 20, True, True, True),
     ("i4g32", "f32", 0, True, True, False)],
)  # fmt: skip
def test_attention_and_its_projection(machine, form, dtype, window, conv, normed, turned):
    given = weight(draw(81, M, H * DV) * 0.2, form)
    weights = WEIGHTS | {"weight": given, "factor": weight(np.full((1, 1), 1.5))}
    weights |= (NORMS if normed else {}) | (CONV if conv else {})
    given, attrs = sessions(dtype, 256 if not window else 48, window, conv), settings(conv, window=window)
    if turned:
        attrs |= with_tables(given, 4, False, 1)
    agree(
        machine, "attention_linear_state", given, attrs, [Shape("f32", M)], FORMS[form], weights, cuts=(1, 2), batch=4,
        compared=["k_cache", "v_cache", *(["tail"] if conv else [])] if dtype == "f32" else [],
    )  # fmt: skip


def test_parts_of_several_turns(machine, monkeypatch):
    """Programs that read 16 columns at a time, of which the next turn's are asked for a turn ahead."""
    rule = tuning.rule
    monkeypatch.setattr(tuning, "MOST_SLICES", 1)
    monkeypatch.setattr(tuning, "rule", lambda shape: replace(rule(shape), block_k=16))
    assert not tuning.turn_constants("bf16", H * DV, 16, 90)["ONCE"]
    weights = WEIGHTS | {"weight": weight(draw(83, M, H * DV) * 0.2, "bf16")}
    weights |= {"factor": weight(np.full((1, 1), 1.5))}
    given = sessions("f32", 256, 0, False)
    agree(
        machine, "attention_linear_state", given, settings(False, window=0), [Shape("f32", M)], FORMS["bf16"], weights,
        cuts=(1, 2), batch=4, compared=["k_cache", "v_cache"],
    )  # fmt: skip


def test_its_bits_are_those_of_attention_and_then_the_product(machine, monkeypatch):
    """With the parts added up by the product, and with as many parts that a launch does it."""
    given = {"weight": weight(draw(82, M, H * DV), "bf16")}
    one = session(5, 1, 300, "bf16", 320)
    one.inputs["addend"] = draw(96, 1, M)
    for most in (parts.MOST_PARTS, 1):
        monkeypatch.setattr("tmlc.kernels.triton.attention_linear.MOST_PARTS", most)
        fused, apart = (Session(one.inputs, {name: s.copy() for name, s in one.states.items()}, 1) for _ in range(2))
        attrs = settings(False)
        ((found,),) = run(machine, "attention_linear_state", [fused], attrs, [Shape("f32", M)], WEIGHTS | given)
        ((heads,),) = run(machine, "attention_state", [apart], attrs, [Shape("f32", H * DV)], WEIGHTS)
        after = Session({"x": heads, "addend": one.inputs["addend"]}, {}, 1)
        ((wanted,),) = run(machine, "linear_add", [after], {}, [Shape("f32", M)], given)
        assert np.array_equal(bits(found), bits(wanted))
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(fused.states[name], apart.states[name])


def call(batch: int, n: int, capacity: int, **more: Operand) -> Call:
    heads, wide = Operand("arena", "f32", (1, 0), 64, 64), Operand("arena", "f32", (1, 0), 32, 32)
    places = (("k_cache", 64), ("v_cache", 1 << 17))
    states = {name: Operand("state", "bf16", (0, capacity), 32, 32, at) for name, at in places}
    args = {"q": heads, "k": wide, "v": wide, "position": Operand("state", "i64", (0, 1), 1, 1)} | states
    args |= {"weight": Operand("weight", "bf16", (0, 48), 64, 64, name="w", shape=(48, 64))} | more
    attrs = settings(False) | {"num_heads": 4, "num_kv_heads": 2}
    out = Operand("arena", "f32", (1, 0), 48, 48, 4096)
    return Call("attention_linear_state", args, attrs, (out,), Bucket(batch, n), 90)


SINKS = Operand("weight", "f32", (0, 1), 4, 4, name="s", shape=(4,))


@pytest.mark.parametrize(
    ("batch", "n", "capacity", "more", "combined"),
    [(1, 1, 1024, {}, False), (1, 1, 1088, {}, True), (2, 1, 1024, {}, True), (1, 4, 1024, {}, True),
     (1, 5, 1024, {}, True), (1, 1, 1024, {"sink_logits": SINKS}, True)],
)  # fmt: skip
def test_a_product_of_one_row_adds_up_to_16_parts(batch, n, capacity, more, combined):
    lowered = lower(call(batch, n, capacity, **more))
    names = [
        *["kv_write_kernel"] * (n > 4), "attention_kernel", *["attention_combine_kernel"] * combined, "linear_kernel",
    ]  # fmt: skip
    assert [launch.kernel for launch in lowered.launches] == names
    pointers = [arg for launch in lowered.launches for arg in launch.args if getattr(arg, "space", "") == "scratch"]
    assert all(arg.name == "" and arg.offset + arg.nbytes <= lowered.scratch_bytes for arg in pointers)
