"""`tmlc profile`: its figures, its verdict, and the arithmetic behind them."""

import json
from importlib.resources import files
from itertools import pairwise
from time import perf_counter

import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.errors import UsageError
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset
from tmlc.report.latency import Budget, growth, parse_milliseconds, spread, turn_latency
from tmlc.report.profile.inputs import synthetic_recording
from tmlc.report.profile.measure import profile_engine
from tmlc.report.profile.parts import PARTS
from tmlc.runtimes.core.clock import make_clock
from tmlc.runtimes.core.session import Session


def test_the_report_has_every_figure(tmlc_cli, package):
    view = tmlc_cli("profile", package, "--seconds", "4", "--startup-runs", "1", "--json").json
    assert view["ticks"] == 20 and view["step_ms"]["count"] == 19
    steps = view["step_ms"]
    assert 0 < steps["p50"] <= steps["p95"] <= steps["p99"] <= steps["max"]
    assert {"decode", "embed_audio", "next_token", "vocode"} <= set(view["stages_ms"])
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
    view = tmlc_cli("profile", package, "--seconds", "2", "--startup-runs", "1", "--json").json
    validator.validate(view)
    assert view["schema"] == 2 and len(view["samples"]["step_ms"]) == 9
    for wrong in ({**view, "schema": 1}, {**view, "more": 1}, {k: v for k, v in view.items() if k != "samples"}):
        assert not validator.is_valid(wrong)
    assert all((view[part] is None) == (part in view["not_measured"]) for part in PARTS)


def test_stages_and_what_is_between_them_add_up_to_the_step(tmlc_cli, package):
    samples = tmlc_cli("profile", package, "--seconds", "10", "--startup-runs", "0", "--json").json["samples"]
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
        recording = synthetic_recording(shape, 30.0, engine.model.hears)
        engine.backend.call = timed(engine.backend.call, called)
        session_tick, marks = Session.tick, []

        def tick(session, given):
            marks.append(len(called))
            return timed(session_tick, walls)(session, given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "tick", tick)
            view = profile_engine(
                engine, recording, 150, make_clock("input", shape.seconds), Budget(), package=nano,
                inputs={"seed": 0}, settings={"threads": 1}, startup_runs=0, report=lambda *_: None,
            )  # fmt: skip
    marks.append(len(called))
    parts = [view["between_calls_ms"], view["wait_ms"], *view["stages_ms"].values()]
    assert sum(part["share"] for part in parts) == pytest.approx(1.0, abs=1e-6)
    assert sum(p["mean"] * p["count"] for p in parts) == pytest.approx(sum(walls[1:]), rel=0.03)
    stages = sum(part["mean"] * part["count"] for part in view["stages_ms"].values())
    outside = [sum(called[a:b]) for a, b in pairwise(marks)]
    assert len(outside) == len(walls) == 150
    assert stages == pytest.approx(sum(outside[1:]), rel=0.03)


def test_the_table_says_the_same_to_a_person(tmlc_cli, package):
    out = tmlc_cli("profile", package, "--seconds", "1", "--startup-runs", "1").stdout
    words = ("p50", "p99", "jitter", "turn latency against 400 ms", "tick wait", "assumed", "missed deadlines",
             "growth", "weights", "slot", "fresh process", "peak")  # fmt: skip
    assert all(word in out for word in words)


def test_json_and_text_files_are_written_beside_each_other(tmlc_cli, package, tmp_path):
    options = ["--seconds", "1", "--startup-runs", "0", "-o", tmp_path / "new" / "report"]
    tmlc_cli("profile", package, *options)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.txt"]
    view = json.loads((tmp_path / "new" / "report.json").read_text())
    assert view["ticks"] == 5 and view["startup"] is None
    assert "turn latency" in (tmp_path / "new" / "report.txt").read_text()
    assert "already holds" in tmlc_cli("profile", package, *options, code=2).stderr
    tmlc_cli("profile", package, *options, "--force")


def test_a_missed_budget_is_exit_1_and_still_reported(tmlc_cli, package, tmp_path):
    options = ["--seconds", "1", "--startup-runs", "0", "--budget", "240.001ms", "-o", tmp_path / "report"]
    result = tmlc_cli("profile", package, *options, code=1)
    assert "over budget" in result.stderr and "OVER" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["turn_latency"]["within_budget"] is False


def test_two_reports_are_compared(tmlc_cli, package, tmp_path):
    for name in "ab":
        tmlc_cli("profile", package, "--seconds", "20", "--startup-runs", "0", "-o", tmp_path / name)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    view = tmlc_cli("profile", "--compare", a, b, "--json").json
    assert {"step p50", "step p95", "step p99", "first audio p50", "decode p50"} <= {f["name"] for f in view["figures"]}
    assert view["a"]["digest"] == view["b"]["digest"] and view["fail_over"] is None
    out = tmlc_cli("profile", "--compare", a, b).stdout
    assert all(word in out for word in ("B against A", "interval", "verdict", "decode p50"))
    for path, factor in ((a, 1.0), (b, 3.0)):  # ticks that no other program disturbed
        path.write_text(json.dumps({**json.loads(path.read_text()), "samples": quiet_samples(factor)}))
    result = tmlc_cli("profile", "--compare", a, b, "--fail-over", "3%", "--json", code=1)
    assert "slower by more than 3%" in result.stderr and "step p50" in result.json["fail_over"]["failed"]
    tmlc_cli("profile", "--compare", b, a, "--fail-over", "3%")  # faster


def quiet_samples(factor):
    step = [factor * (5 + 0.01 * (k * 7 % 11)) for k in range(400)]
    stages = {"decode": [0.9 * ms for ms in step]}
    rest = [0.1 * ms for ms in step]
    return {
        "every": 1, "step_ms": step, "wait_ms": [0.0] * 400, "between_calls_ms": rest, "first_audio_ms": [None] * 400,
        "stages_ms": stages,
    }  # fmt: skip


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
