"""`tmlc bench` against a server that is scripted: what it counts, what it shows, when it fails."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tmlc.bench import dialects, run
from tmlc.cli.bench import parse_part
from tmlc.cli.main import cli
from tmlc.errors import CheckError, UsageError


def bench(*args, code=0):
    result = CliRunner().invoke(cli, ["bench", *map(str, args)])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def test_every_attempt_is_counted_and_every_tick_measured(scripted, tmp_path):
    server = scripted(slots=2)
    url = server.url.removesuffix("/v1")
    options = ["--sessions", 3, "--seconds", 7, "--ramp", 0.5, "--metrics", f"{url}/metrics", "--processes", 2]
    view = json.loads(bench(server.url, *options, "--json", "-o", tmp_path / "report").stdout)
    assert view["attempts"] == {"all": 3, "held": 2, "refused": 1, "failed": 0, "cut": 0}
    assert view["details"] == {"HTTP 503, Retry-After 7": 1} and view["errors"] == {}
    assert view["ticks"]["arrived"] >= 50 and view["ticks"]["lost"] == 0 and view["turns"]["unanswered"] == 0
    assert view["turns"]["all"] >= 2 and view["turn_latency_ms"]["count"] == view["turns"]["all"]
    assert view["answering_tick_ms"]["max"] <= view["turn_latency_ms"]["max"]
    assert view["generator"]["processes"] == 2 and view["generator"]["send_late_ms"]["count"] >= 500
    assert view["server_metrics"] == {'tmlc_samples{of="all"}': server.heard}
    assert view["server"]["model"] == "scripted" and view["broken"] == []
    assert view["server_memory"] is None, "this server does not say it"
    assert json.loads((tmp_path / "report.json").read_text()) == view
    assert "turn latency" in (tmp_path / "report.txt").read_text() and server.most == 2


def test_a_late_server_fails_the_bench(scripted):
    server = scripted(delay=1.0)
    options = ["--sessions", 2, "--seconds", 6, "--ramp", 0, "--max-p99", "400ms", "--max-misses", "0.1%"]
    result = bench(server.url, *options, code=1)
    assert "400 ms were allowed" in result.stderr and "0.100% were allowed" in result.stderr
    assert "of 0 ticks" not in result.stdout and "p99" in result.stdout


def test_a_server_that_drops_its_sessions_and_skips_ticks_is_caught(scripted):
    server = scripted(cut_after=16, skip=5)
    view = json.loads(bench(server.url, "--sessions", 2, "--seconds", 6, "--ramp", 0, "--json").stdout)
    assert view["attempts"]["cut"] == 2 and view["attempts"]["held"] == 0
    assert view["ticks"]["lost"] == 4 and view["misses"] >= 4 / 32


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["http://127.0.0.1:9/v1"], "does not list its models"), (["nowhere.tmlc"], "no such package"),
        (["http://127.0.0.1:9/v1", "--max-p99", "soon"], "not a duration"),
        (["http://127.0.0.1:9/v1", "--max-misses", "3"], "not a part"),
        (["http://127.0.0.1:9/v1", "--serve-option", "x"], "there already"),
        (["http://127.0.0.1:9/v1", "--arrivals", "poisson"], "give --hold"),
    ],
)  # fmt: skip
def test_what_cannot_be_benched_is_refused(args, said):
    assert said in str(CliRunner().invoke(cli, ["bench", *args]).stderr)
    bench(*args, code=2)


def test_a_server_that_says_no_is_told_in_its_words():
    class Refusing:
        async def recv(self):
            return SimpleNamespace(type="error", error=SimpleNamespace(code="model_not_found", message="no nano here"))

    with pytest.raises(CheckError, match="model_not_found: no nano here") as caught:
        asyncio.run(dialects._wait_for(Refusing(), "session.started"))
    assert "--model and --dialect" in caught.value.fix


def test_a_generator_that_stops_says_why_and_not_its_advice(monkeypatch):
    stops = "from tmlc.errors import UsageError; raise UsageError('no client', fix='install one')"
    monkeypatch.setattr(run, "python_module", lambda name: [sys.executable, "-c", stops])
    with pytest.raises(CheckError, match=r"a process of the load generator stopped: .*UsageError: no client") as caught:
        run._work([{}], SimpleNamespace(seconds=2), SimpleNamespace(look=lambda passed: None), lambda *told: None)
    assert caught.value.fix.startswith("correct what it says")


def test_parts_are_read_in_both_forms():
    assert parse_part("0.1%") == parse_part("0.001") == pytest.approx(0.001) and parse_part("1") == 1
    with pytest.raises(UsageError):
        parse_part("101%")
