"""What a profile says of kernels and of timing them, from made-up times in which the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tmlc.report.profile.kernels import KernelTicks, fill, kernel_part, profiling_cost
from tmlc.report.profile.parts import PARTS, Parts
from tmlc.report.profile.stages import MethodCall, in_order, tick_stages
from tmlc.runtimes.core.kernels import KernelCall, KernelTimer, Touched

RATES = {"fp32": 100.0, "bf16": 200.0, "int8": 400.0}
CEILINGS = {"threads": 1, "read_gb_s": 10.0, "multiply": RATES, "measured_ms": 1.0}


def tensor(space: str, dtype: str, rows: tuple[int, int], cols: int, **more: Any) -> dict[str, Any]:
    return {"space": space, "dtype": dtype, "rows": list(rows), "cols": cols, "stride": cols, **more}


PLAN = {
    "tensors": [
        tensor("arena", "f32", (1, 0), 64),
        tensor("weight", "bf16", (0, 4), 64 * 16, name="model.layers.2.up"),
        tensor("weight", "f32", (0, 1), 64, name="model.layers.2.norm"),
    ],
    "methods": [
        {"name": "decode", "code": [
            {"op": "rms_norm", "t": [0, 0, 2], "i": []},
            {"op": "linear", "t": [0, 0, 1], "i": []},
            {"op": "silu", "t": [0, 0], "i": []},
            {"op": "linear", "t": [0, 0, 1], "i": []},
        ]},
    ],
}  # fmt: skip


def calls(ns: float = 1000.0) -> list[KernelCall]:
    names = [("model.layers.2.norm",), ("model.layers.2.up",), (), ("model.layers.2.up",)]
    ops = [call["op"] for call in PLAN["methods"][0]["code"]]
    return [
        KernelCall("decode", k, op, "", 2, 6, ns, Touched(), weights=weights)
        for k, (op, weights) in enumerate(zip(ops, names, strict=True))
    ]


def test_a_call_says_what_it_reached_and_what_bounds_it() -> None:
    part = kernel_part(calls(), PLAN, CEILINGS, every=3, ticks=2, disturbed=0)
    norm, product, silu, _ = part["calls"]
    assert product["ms"] == 0.0005 and product["share"] == 0.25 and product["runs"] == 2
    assert product["bytes"] == 64 * 64 * 2 + 2 * 3 * 64 * 4 and product["operations"] == 2 * 3 * 64 * 64
    assert product["gb_s"] == pytest.approx(product["bytes"] / 500) and product["of_bandwidth"] == product["gb_s"] / 10
    assert product["of_multiply"] == pytest.approx(product["operations"] / 500 / 200)
    assert product["bound"] == "bandwidth" and norm["of_multiply"] is None
    assert [call["layer"] for call in part["calls"]] == [2, 2, 2, 2]  # silu stands between calls of layer 2
    slow = kernel_part(calls(1e6), PLAN, CEILINGS, 3, 2, 0)["calls"]
    assert {call["bound"] for call in slow} == {"latency"} and silu["operations"] == 0


def test_without_ceilings_or_counts_there_is_nothing_to_hold_a_call_against() -> None:
    assert {call["bound"] for call in kernel_part(calls(), PLAN, None, 3, 2, 0)["calls"]} == {None}
    (row,) = kernel_part([KernelCall("m", 0, "layer", "x/layer", 1, 0, 5.0)], None, CEILINGS, 3, 1, 0)["calls"]
    assert row["bytes"] is None and row["gb_s"] is None and row["bound"] is None and row["ms"] == 5e-6


def timed_session(cost: float, count: int = 300, noise: float = 0.02) -> tuple[list[float], list[bool]]:
    """A session that grows, with a clip in every fifth tick, whose timed ticks (every third) take `cost` more."""
    random = np.random.default_rng(0)
    on = [k > 0 and k % 3 == 0 for k in range(count)]
    level = np.linspace(1, 1.5, count) * (1 + 0.1 * (np.arange(count) % 5 == 0))
    steps = level * np.exp(noise * random.standard_normal(count)) * (1 + cost * np.array(on))
    return list(steps), on


@pytest.mark.parametrize("cost", [0.0, 0.05])
def test_what_timing_costs_is_found_beside_growth_and_clips(cost: float) -> None:
    found = profiling_cost(*timed_session(cost))
    assert isinstance(found, dict)
    low, high = found["interval"]
    assert low <= 1 + cost <= high and high - low < 0.03 and found["ratio"] == pytest.approx(1 + cost, abs=0.01)


def test_a_short_session_says_why_it_cannot_tell() -> None:
    assert "8 timed ticks" in str(profiling_cost(*timed_session(0.0, count=20)))


class Stub(KernelTimer):
    """Counts what it is asked for; the first time is for warming up."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.on = False

    def start(self) -> None:
        assert not self.on
        self.on = True

    def stop(self, disturbed: bool) -> bool:
        assert self.on
        self.on = False
        self.asked.append("disturbed" if disturbed else "quiet")
        return len(self.asked) > 1

    def calls(self, disturbed: bool) -> list[KernelCall]:
        self.asked.append(f"calls {disturbed}")
        return calls() if len(self.asked) > 2 else []


def played(count: int, disturbed: bool) -> tuple[Stub, dict[str, Any]]:
    timer, parts = Stub(), Parts()
    ticks = KernelTicks(timer, 3)
    for tick in range(count):
        ticks.before(tick)
        ticks.after(disturbed)
    fill(parts, ticks, timed_session(0.0, count)[0], PLAN, CEILINGS)
    return timer, parts.to_json()


def test_disturbed_ticks_count_only_where_hardly_any_other_is_left() -> None:
    timer, view = played(40, disturbed=False)
    assert timer.asked[-1] == "calls False" and view["kernels"]["ticks"] == 12 and view["kernels"]["disturbed"] == 0
    timer, view = played(40, disturbed=True)
    assert timer.asked[-1] == "calls True" and view["kernels"]["ticks"] == view["kernels"]["disturbed"] == 12
    _, view = played(4, disturbed=False)
    assert view["kernels"] is None and "too short" in view["not_measured"]["kernels"]


def test_every_part_is_there_or_has_a_reason() -> None:
    parts = Parts()
    parts.measured("ceilings", CEILINGS)
    parts.missing("kernels", "why")
    view = parts.to_json()
    assert set(view) == {*PARTS, "not_measured"} and set(view["not_measured"]) == set(PARTS) - {"ceilings"}
    assert view["not_measured"]["kernels"] == "why" and view["ceilings"] == CEILINGS


def at(*spans: tuple[str, float, float]) -> list[MethodCall]:
    return [MethodCall(method, round(begin * 1e6), round(end * 1e6)) for method, begin, end in spans]


def test_decode_is_the_append_and_then_one_stage_a_step() -> None:
    tick = at(
        ("embed_audio", 2, 3), ("decode", 3, 7), ("next_token", 7, 8), ("embed_text", 8, 9), ("decode", 9, 11),
        ("vocode", 12, 13), ("embed_speech", 13, 14), ("decode", 14, 17),
    )  # fmt: skip
    stages = tick_stages(tick, 0, 20_000_000, waited_ms=0.5)
    assert stages == pytest.approx({
        "frame_input": 1.5, "embed_audio": 1, "append": 4, "next_token": 1, "embed_text": 1, "decode[0]": 2,
        "vocode": 1, "embed_speech": 1, "decode[1]": 3, "encode_output": 3,
    })  # fmt: skip
    names = ["frame_input", "embed_audio", "embed_text", "append", "decode[0]", "decode[1]"]
    assert in_order(stages)[:6] == names and in_order(stages)[-1] == "encode_output"


def test_calls_of_another_sessions_tick_are_not_this_ones() -> None:
    others = at(("decode", 1, 4))
    own = at(("embed_audio", 5, 6), ("decode", 6, 8))
    stages = tick_stages(others + own, 0, 9_000_000, waited_ms=4.5)
    assert stages == pytest.approx({"frame_input": 0.5, "embed_audio": 1, "append": 2, "encode_output": 1})
