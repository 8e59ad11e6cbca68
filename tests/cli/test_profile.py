"""`tmlc profile`: its figures, its verdict, and the arithmetic behind them."""

import json
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from time import perf_counter

import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.errors import UsageError
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset
from tmlc.package import open_package
from tmlc.report.call_work import call_work
from tmlc.report.latency import Budget, growth, parse_milliseconds, spread, turn_latency
from tmlc.report.plan.source import load_planned
from tmlc.report.plan.work import method_work
from tmlc.report.profile.measure import profile_engine
from tmlc.report.profile.parts import PARTS
from tmlc.report.profile.stages import APPEND
from tmlc.report.scenario.inputs import busy_case
from tmlc.report.scenario.show import Show
from tmlc.runtimes.core.session import Session

QUICK = ("--startup-runs", "0", "--sittings", "0", "--no-kernels")


def test_the_report_has_every_figure(tmlc_cli, package):
    view = tmlc_cli("profile", package, "--seconds", "4", "--startup-runs", "1", *QUICK[2:], "--json").json
    assert view["ticks"] == 20 and view["step_ms"]["count"] == 19
    steps = view["step_ms"]
    assert 0 < steps["p50"] <= steps["p95"] <= steps["p99"] <= steps["max"]
    assert {"frame_input", "append", "decode[0]", "embed_audio", "next_token", "vocode", "encode_output"} <= set(
        view["stages_ms"]
    )
    assert view["turn_latency"]["worst"]["total_ms"] == pytest.approx(200 + 10 + 30 + steps["p99"])
    assert view["missed_deadlines"] >= 0
    assert all(view["bytes"][k] > 0 for k in ("weights", "arena", "slot"))
    start = view["startup"]
    assert start["load_and_first_tick_ms"] == pytest.approx(start["load_ms"] + start["first_tick_ms"])
    assert start["peak_rss_bytes"] > 10e6 and view["memory"]["peak_rss_bytes"] > 10e6
    assert view["machine"]["isa"] and view["machine"]["threads"] >= 1


def test_the_json_form_is_the_published_one(tmlc_cli, package):
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install 'tmlc[dev]'")
    schema = json.loads((files("tmlc.report") / "profile.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    view = tmlc_cli("profile", package, "--seconds", "2", "--startup-runs", "1", "--sittings", "2", "--json").json
    validator.validate(view)
    assert view["schema"] == 3 and len(view["samples"]["step_ms"]) == 9
    for wrong in ({**view, "schema": 2}, {**view, "more": 1}, {k: v for k, v in view.items() if k != "samples"}):
        assert not validator.is_valid(wrong)
    assert all((view[part] is None) == (part in view["not_measured"]) for part in PARTS)


def test_stages_and_what_is_between_them_add_up_to_the_step(tmlc_cli, package):
    samples = tmlc_cli("profile", package, "--seconds", "10", *QUICK, "--json").json["samples"]
    stages = samples["stages_ms"]
    for k, step in enumerate(samples["step_ms"]):
        parts = sum(column[k] or 0.0 for column in stages.values())
        assert parts + samples["wait_ms"][k] + samples["between_calls_ms"][k] == pytest.approx(step, abs=0.01)
        assert samples["between_calls_ms"][k] > 0


@pytest.fixture(scope="session")
def nano(tmlc_cli, tmp_path_factory):
    """The preset nano, compiled: stages long enough to hold against another clock."""
    folder = tmp_path_factory.mktemp("nano")
    create_checkpoint(InteractionConfig.from_dict(read_preset("nano")["config"]), 0, folder / "nano")
    tmlc_cli("compile", folder / "nano", "-o", folder / "nano.tmlc", "--json")
    return folder / "nano.tmlc"


def test_the_parts_of_nanos_ticks_are_their_wall_time_within_three_percent(nano):
    """Against clocks of the test's own: one around every tick, one around every call of the backend."""
    walls, called = [], []

    def timed(function, into):
        def run(*arguments, **names):
            begun = perf_counter()
            try:
                return function(*arguments, **names)
            finally:
                into.append((perf_counter() - begun) * 1e3)

        return run

    with tmlc.load(nano, threads=1) as engine:
        shape = tick_shape(engine.manifest)
        shown = Show(engine, busy_case(engine, shape, 30.0), shape)
        engine.backend.call = timed(engine.backend.call, called)
        session_tick, marks = Session.tick, []

        def tick(session, given):
            marks.append(len(called))
            return timed(session_tick, walls)(session, given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "tick", tick)
            view = profile_engine(
                engine, shown, Budget(), package=nano,
                inputs={"seed": 0}, settings={"threads": 1}, startup_runs=0, kernels_every=3, report=lambda *_: None,
            )  # fmt: skip
    marks.append(len(called))
    parts = [view["between_calls_ms"], view["wait_ms"], *view["stages_ms"].values()]
    assert sum(part["share"] for part in parts) == pytest.approx(1.0, abs=1e-6)
    assert sum(p["mean"] * p["count"] for p in parts) == pytest.approx(sum(walls[1:]), rel=0.03)
    methods = {name: part for name, part in view["stages_ms"].items() if name not in ("frame_input", "encode_output")}
    stages = sum(part["mean"] * part["count"] for part in methods.values())
    outside = [sum(called[a:b]) for a, b in pairwise(marks)]
    assert len(outside) == len(walls) == 150
    assert stages == pytest.approx(sum(outside[1:]), rel=0.03)
    # Kernels of the timed ticks are a part of their stages.
    timed = {name: sum(ms or 0.0 for ms in view["samples"]["stages_ms"][name][2::3]) for name in methods}
    for method in {call["method"] for call in view["kernels"]["calls"]}:
        own = sum(call["runs"] * call["ms"] for call in view["kernels"]["calls"] if call["method"] == method)
        stage = sum(ms for name, ms in timed.items() if ("decode" if name == APPEND else name.split("[")[0]) == method)
        assert 0 < own < stage, method


def test_a_plan_and_the_program_it_came_from_need_the_same_work(nano):
    """Kernels are counted from the plan, predictions from the program: products exactly, weights but for padding."""
    program, precision = load_planned(str(nano), None, None)
    predicted = method_work(program, precision)
    with open_package(nano) as package:
        plan = package.json(package.manifest.targets["cpu"].plan)
    n, seen = 3, 10  # rows of a call, cached positions that each of them sees
    for method in plan["methods"]:
        ops, macs, weights, caches = predicted[method["name"]], 0.0, 0.0, 0.0
        for call in method["code"]:
            every_expert = call["i"][0] if call["op"] == "moe" else 0
            work = call_work(plan["tensors"], call, n, every_expert, seen, n * seen)
            macs += work.multiply_adds
            caches += work.caches
            weights += 0.0 if "embedding" in call["op"] else work.weights  # tables: no op of a prediction has them
        stored = sum(op.weight_bytes + op.again_bytes + op.experts * op.expert_bytes for op in ops)
        products = n * sum(op.rows * (op.macs + seen * op.position_macs) for op in ops)
        assert macs == products, method["name"]
        assert weights == pytest.approx(stored, rel=0.03, abs=1000), method["name"]
        assert caches == seen * sum(op.position_bytes for op in ops), method["name"]


def test_memory_is_told_by_name_and_adds_up(tmlc_cli, package):
    view = tmlc_cli("profile", package, "--seconds", "1", *QUICK, "--json").json
    sums = Counter()
    for entry in view["memory_map"]:
        sums[entry["what"]] += entry["bytes"]
    assert dict(sums) == {"states": view["bytes"].pop("slot"), **view["bytes"]}
    assert {entry["layer"] for entry in view["memory_map"] if entry["what"] == "weights"} == {None, 0, 1}


def test_kernels_are_timed_in_the_ticks_that_were_asked_for(tmlc_cli, package):
    view = tmlc_cli("profile", package, "--seconds", "6", *QUICK[:4], "--kernels-every", "5", "--json").json
    kernels = view["kernels"]
    assert kernels["every"] == 5 and 0 < kernels["ticks"] <= 5  # of 30 ticks: 5, 10, …, 25
    assert sum(call["share"] for call in kernels["calls"]) == pytest.approx(1.0)
    for call in kernels["calls"]:
        assert call["gb_s"] == pytest.approx(call["bytes"] / call["ms"] / 1e6, rel=0.01, abs=1e-3)
        assert call["bound"] in ("bandwidth", "multiply", "latency")
    (moe,) = (call for call in kernels["calls"] if call["op"] == "moe")
    assert moe["layer"] == 1 and moe["operations"] > 0 and any("gate_up" in name for name in moe["weights"])


def test_the_table_says_the_same_to_a_person(tmlc_cli, package):
    out = tmlc_cli("profile", package, "--seconds", "1", "--startup-runs", "1", "--sittings", "1").stdout
    words = ("p50", "p99", "jitter", "turn latency against 400 ms", "tick wait", "assumed", "missed deadlines",
             "growth", "weights", "slot", "fresh process", "peak",
             "ceilings", "GB/s", "GFLOP/s", "largest", "not measured: it takes 8", "kernels (top 12")  # fmt: skip
    assert all(word in out for word in words)
    without = tmlc_cli("profile", package, "--seconds", "1", *QUICK).stdout
    assert "not measured: left out: profile without --no-kernels" in without


def test_json_and_text_files_are_written_beside_each_other(tmlc_cli, package, tmp_path):
    options = ["--seconds", "1", *QUICK, "-o", tmp_path / "new" / "report"]
    tmlc_cli("profile", package, *options)
    names = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert names == [f"report.{kind}" for kind in ("html", "json", "trace.json", "txt")]
    view = json.loads((tmp_path / "new" / "report.json").read_text())
    assert view["ticks"] == 5 and view["startup"] is None
    assert "turn latency" in (tmp_path / "new" / "report.txt").read_text()
    assert "already holds" in tmlc_cli("profile", package, *options, code=2).stderr
    tmlc_cli("profile", package, *options, "--force")


def test_a_missed_budget_is_exit_1_and_still_reported(tmlc_cli, package, tmp_path):
    options = ["--seconds", "1", *QUICK, "--budget", "240.001ms", "-o", tmp_path / "report"]
    result = tmlc_cli("profile", package, *options, code=1)
    assert "over budget" in result.stderr and "OVER" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["turn_latency"]["within_budget"] is False


def test_two_reports_are_compared(tmlc_cli, package, tmp_path):
    for name in "ab":
        options = ("--startup-runs", "0", "--sittings", "2", "--kernels-every", "2")
        tmlc_cli("profile", package, "--seconds", "4", *options, "-o", tmp_path / name)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    view = tmlc_cli("profile", "--compare", a, b, "--json").json
    names = {f["name"] for f in view["figures"]}
    assert {"step", "step p95", "step p99", "first audio", "append", "decode[0]", "between calls"} <= names
    assert any(name.startswith("kernel decode/linear layer ") for name in names)
    assert {f["verdict"] for f in view["figures"]} == {"too few sittings"}
    assert "too few sittings" in view["warnings"][-1]
    assert (view["a"]["sittings"], view["a"]["ticks"]) == (2, 16)
    assert view["a"]["digest"] == view["b"]["digest"] and view["fail_over"] is None
    out = " ".join(tmlc_cli("profile", "--compare", a, b).stdout.split())
    assert all(word in out for word in ("B against A", "interval", "verdict", "append", "2 × 16 ticks"))
    for path, factor in ((a, 1.0), (b, 3.0)):  # more of them, that no other program disturbed
        path.write_text(json.dumps({**json.loads(path.read_text()), "sittings": quiet_sittings(factor)}))
    result = tmlc_cli("profile", "--compare", a, b, "--fail-over", "3%", "--json", code=1)
    assert "slower by more than 3%" in result.stderr and "step" in result.json["fail_over"]["failed"]
    tmlc_cli("profile", "--compare", b, a, "--fail-over", "3%")  # faster
    b.write_text(json.dumps({**json.loads(b.read_text()), "sittings": None}))
    assert "without --sittings 0" in tmlc_cli("profile", "--compare", a, b, code=2).stderr


def quiet_sittings(factor):
    step = [factor * (5 + 0.01 * (k * 7 % 11)) for k in range(10)]
    figures = {"step": step, "decode[0]": [0.9 * ms for ms in step]}
    return {"ticks": 100, "figures": figures, "busy": [0.0] * 10}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("x.tmlc", "--fail-over", "3%"),
        ("--compare", "a.json", "b.json"),  # not there
        ("--compare", "a.json", "b.json", "--fail-over", "much"),
        ("x.tmlc", "--compare", "a.json", "b.json"),
        ("--compare", "a.json", "b.json", "--seconds", "5"),
    ],
)
def test_a_comparison_takes_two_reports_and_nothing_to_measure(tmlc_cli, arguments):
    tmlc_cli("profile", *arguments, code=2)


@pytest.mark.parametrize("budget", ["soon", "-1ms", "0", "240ms", "1h"])
def test_a_budget_that_makes_no_sense_is_refused(tmlc_cli, package, budget):
    tmlc_cli("profile", package, "--seconds", "1", "--budget", budget, code=2)


def test_budgets_are_read_in_both_units():
    assert parse_milliseconds("400ms") == parse_milliseconds("0.4s") == parse_milliseconds(" 400 ") == 400
    with pytest.raises(UsageError):
        parse_milliseconds("400 minutes")


def test_what_is_left_of_the_budget_for_a_step():
    assert Budget().step_ms == 160 and Budget(300, 200).step_ms == 60


def test_percentiles_are_observed_values_never_below_the_rank():
    steps = spread([float(v) for v in range(1, 101)])
    assert (steps.p50, steps.p95, steps.p99, steps.max, steps.mean) == (51, 96, 100, 100, 50.5)
    assert steps.jitter == 1.0
    assert spread([3.0]).p99 == 3.0 and spread([3.0]).jitter == 0.0


def test_the_parts_of_a_turn_add_up():
    turn = turn_latency(spread([20.0] * 10), Budget())
    assert turn["typical"]["total_ms"] == 100 + 10 + 20 + 30
    assert turn["worst"]["total_ms"] == 200 + 10 + 20 + 30
    assert turn["within_budget"] and not turn_latency(spread([161.0] * 3), Budget())["within_budget"]


def test_growth_compares_the_last_minute_with_the_first_and_leaves_the_first_tick_out():
    steady = growth([99.0] + [5.0] * 700, 200)
    assert steady["window_ticks"] == 300 and steady["ratio"] == 1.0
    assert growth([5.0] + [5.0] * 300 + [10.0] * 300, 200)["ratio"] == 2.0
    assert growth([9.0] + [4.0] * 10 + [5.0] * 10 + [6.0] * 10, 200)["ratio"] == 1.5
    assert growth([5.0, 5.0], 200)["ratio"] is None
