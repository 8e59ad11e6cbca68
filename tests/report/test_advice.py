"""Advice of a profile: each rule on both sides of its threshold."""

from __future__ import annotations

from typing import Any

import pytest
from made_profile import a_call, bare_profile, full_profile

from tmlc.report import advice
from tmlc.report.plan.precision import BITS


def said(rule: Any, view: dict[str, Any]) -> str:
    return " ".join(found.says for found in rule(view))


def with_calls(*calls: dict[str, Any], p50: float = 10.0, **settings: Any) -> dict[str, Any]:
    """A profile of so many kernel calls, each once a tick, under 29 GB/s and 400 GFLOP/s."""
    view = bare_profile()
    view["step_ms"]["p50"] = p50
    view["kernels"] = {"every": 1, "ticks": 1, "calls": list(calls)}
    view["ceilings"] = {"threads": 2, "read_gb_s": 29.0, "multiply": {"bf16": 400.0, "int8": 760.0}, "measured_ms": 1.0}
    view["memory_map"] = [{"what": "weights", "name": "w", "layer": None, "bytes": 10**9}]
    view["settings"].update(settings)
    return view


def reading(of: float, ms: float = 8.0, **more: Any) -> dict[str, Any]:
    """A call that reads its weight at this part of 29 GB/s."""
    return a_call("decode", 0, "linear", 0, ms, of * 29e6 * ms, 1e6, runs=1, weights=("w",), **more)


def test_a_stage_at_the_bandwidth_is_told_what_fewer_bytes_would_save() -> None:
    assert said(advice.fewer_bytes, with_calls(reading(0.74))) == ""
    (found,) = advice.fewer_bytes(with_calls(reading(0.91)))
    assert "at 91% of the machine's bandwidth: only fewer bytes help" in found.says
    int8, int4 = (0.8 * (1 - BITS[to] / BITS["bf16"]) for to in ("int8", "int4"))
    assert f"int8 would save {int8:.0%}" in found.says and f"int4 would save {int4:.0%}" in found.says
    assert found.about == "decode" and found.gain == pytest.approx(int4)


def test_fewer_bytes_save_no_more_than_the_products_leave() -> None:
    slow = {**reading(0.91), "operations": 760e6 * 0.7 * 7.6}  # 7.6 ms of products in int8
    (found,) = advice.fewer_bytes(with_calls(slow))
    assert found.gain == pytest.approx(0.04)
    lowest = advice.fewer_bytes(with_calls(reading(0.91), precision="int4"))
    assert lowest[0].gain is None and "would save" not in lowest[0].says


def test_a_stage_that_hardly_counts_or_reads_little_is_not_told_of() -> None:
    assert advice.fewer_bytes(with_calls(reading(0.91, ms=0.4))) == []
    other = a_call("decode", 1, "conv", 0, 9.0, 1e3, 1e3, runs=1, bound="latency")
    assert advice.fewer_bytes(with_calls(reading(0.91), other)) == []


def far(of: float) -> dict[str, Any]:
    return a_call("vocode", 0, "conv", None, 2.0, of * 29e6 * 2.0, 0.0, runs=1, bound="latency")


def test_a_kernel_far_from_both_ceilings_is_told_of_and_one_near_to_one_is_not() -> None:
    assert advice.far_from_ceilings(with_calls(far(0.41))) == []
    (found,) = advice.far_from_ceilings(with_calls(far(0.2)))
    assert found.about == "vocode: conv" and "20% of the bandwidth" in found.says
    assert found.gain == pytest.approx((2.0 - 2.0 * 0.2 / 0.8 - 0.0008) / 10.0)
    assert advice.far_from_ceilings(with_calls(far(0.2), p50=50.0)) == []  # 4 % of the step


def test_threads_that_are_too_many_too_few_and_right() -> None:
    view = with_calls(reading(0.5, bound="multiply"))
    assert advice.threads(view) == []
    view["machine"].update(threads=3, cores=2)
    assert "--threads 2" in said(advice.threads, view)
    view["machine"].update(threads=1, cores=2)
    (found,) = advice.threads(view)
    assert found.gain == pytest.approx(0.4) and "1 of 2 cores" in found.says
    bound = with_calls(reading(0.9))
    bound["machine"].update(threads=1, cores=2)
    assert advice.threads(bound)[0].gain is None


@pytest.mark.parametrize(
    ("change", "told"),
    [({}, True), ({"huge_pages": True}, False), ({"target": "onnx"}, False), ({"weights": 63e6}, False)],
)
def test_large_pages_are_for_large_weights_on_the_cpu(change: dict[str, Any], told: bool) -> None:
    view = bare_profile()
    view["bytes"]["weights"] = change.pop("weights", 64e6)
    view["settings"].update(change)
    assert bool(advice.huge_pages(view)) is told


def test_time_between_the_calls_and_for_the_device() -> None:
    view = bare_profile()
    for key in ("between_calls_ms", "wait_ms"):
        view[key]["share"] = 0.049
    assert advice.between_calls(view) == []
    for key in ("between_calls_ms", "wait_ms"):
        view[key]["share"] = 0.05
    assert [found.about for found in advice.between_calls(view)] == ["between the calls", "waiting for the device"]


def test_slow_ticks_are_laid_to_the_stage_that_makes_them_slow() -> None:
    assert advice.tail(bare_profile()) == []
    (found,) = advice.tail(bare_profile(slow=80.0))
    assert found.about == "decode" and "is decode" in found.says


def test_a_first_tick_that_is_slow_or_over_the_budget() -> None:
    view = bare_profile()
    usual = view["step_ms"]["p50"]
    for first, told in ((4.9 * usual, False), (5.1 * usual, True)):
        view["first_tick_ms"] = first
        assert bool(advice.first_tick(view)) is told
    view["first_tick_ms"] = 161.0
    assert "over the 160 ms of the budget" in said(advice.first_tick, view)


def test_growth_of_steps_and_of_memory() -> None:
    view = bare_profile()
    view["growth"] = {"window_ticks": 300, "window_seconds": 60.0, "first_ms": 20.0, "last_ms": 20.9, "ratio": 1.045}
    assert advice.growth(view) == []
    view["growth"].update(last_ms=30.0, ratio=1.5)
    view["seconds"], view["step_ms"]["p99"] = 660.0, 60.0
    assert "by 1 ms a minute" in said(advice.growth, view) and "after 100 more minutes" in said(advice.growth, view)
    quiet, view["noise"] = view["noise"], {"too_noisy": True, "why": ["something else ran"]}
    assert advice.growth(view) == [], "nothing is known of growth on a noisy machine"
    view["noise"] = quiet
    view["growth"]["ratio"] = None
    view["memory"].update(resident_early_bytes=100_000_000, resident_end_bytes=107_900_000)
    assert advice.growth(view) == []
    view["memory"]["resident_end_bytes"] = 109_000_000
    assert "100.00 MB to 109.00 MB" in said(advice.growth, view)


def test_misses_though_the_p99_holds() -> None:
    view = bare_profile()
    assert advice.misses(view) == []
    view.update(missed_deadlines=2, latest_start_ms=44.0)
    assert "2 of 650 ticks" in said(advice.misses, view) and "44.00 ms late" in said(advice.misses, view)
    view["turn_latency"]["within_budget"] = False
    assert advice.misses(view) == []


def test_a_pass_that_costs_is_named_and_one_that_may_not_is_left_alone() -> None:
    view = bare_profile()
    row = {"pass": "fuse", "p50_with_ms": 1.0, "p50_without_ms": 0.97, "change": -0.03, "interval": [-0.05, -0.01],
           "verdict": "faster", "note": ""}  # fmt: skip
    view["ablation"] = [row]
    assert advice.costly_passes(view)[0].gain == 0.03
    for harmless in ({"interval": [-0.06, 0.001]}, {"change": -0.019}, {"change": None, "interval": None}):
        view["ablation"] = [{**row, **harmless}]
        assert advice.costly_passes(view) == []


def test_the_budget_is_missed_or_a_faster_step_would_hardly_be_heard() -> None:
    assert "must fall by 43%" in said(advice.budget, bare_profile(slow=160.0, scale=5.0))
    assert "at most" in said(advice.budget, bare_profile())  # 25 of 265 ms
    assert advice.budget(bare_profile(scale=4.0)) == []  # 101 of 341 ms


def test_a_noisy_machine_comes_first_and_the_rest_by_gain() -> None:
    view = full_profile()
    view["noise"] = {"too_noisy": True, "why": ["it was busy"]}
    found = advice.advise(view)
    assert "it was busy" in found[0]["says"]
    gains = [a["gain"] or 0.0 for a in found[1:]]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0.1
    view["noise"]["too_noisy"] = False
    assert advice.noise(view) == []
