"""`tmlc profile`: its figures, its verdict, and the arithmetic behind them."""

import json

import pytest

from tmlc.errors import UsageError
from tmlc.report.latency import Budget, growth, parse_milliseconds, spread, turn_latency


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
