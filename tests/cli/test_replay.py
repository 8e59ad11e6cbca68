"""`tmlc replay`: what it compares, what it writes, and what it refuses."""

import json

import numpy as np
import pytest
import soundfile

import tmlc
from tmlc.runtimes.core.clock import ManualClock
from tmlc.runtimes.core.scheduler import Scheduler


@pytest.fixture(scope="module")
def logs(package, tmp_path_factory):
    """A live session of ten ticks with typed text and two missed ticks, closed with a snapshot; and how it went on."""
    folder = tmp_path_factory.mktemp("logs")
    with tmlc.load(package, sessions=2) as engine:
        for name, blob in (("first", None), ("second", folder / "first.snap")):
            clock, records = ManualClock(), []
            scheduler = Scheduler(engine, clock=clock)
            seat = scheduler.open(
                lambda event: None, seed=5, log=records.append, snapshot=blob.read_bytes() if blob else None
            )
            scheduler.step()
            for number in range(8):
                seat.hear(np.full(3200, 0.01 * number, np.float32))
                seat.read("hi" if number == 1 else "")
                clock.advance(0.6 if number == 4 else 0.2)
                scheduler.step()
            future = seat.snapshot()
            scheduler.step()
            (folder / f"{name}.snap").write_bytes(future.result(0))
            scheduler.close()
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_log_is_verified(tmlc_cli, package, logs):
    view = tmlc_cli("replay", package, logs / "first.jsonl", "--verify", "--json").json
    assert (view["ticks"], view["missed"], view["verified"], view["files"]) == (10, 2, True, [])
    assert view["events"]["tick"] == 8 and view["events"]["collapse"] == view["events"]["join"] == 1
    assert "10 ticks, 2 of them missed" in tmlc_cli("replay", package, logs / "first.jsonl", "--verify").stdout


def test_a_log_that_was_altered_is_found_out(tmlc_cli, package, logs, tmp_path):
    lines = (logs / "first.jsonl").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if json.loads(line).get("tick") == 3 and '"out_tokens"' in line)
    record = json.loads(lines[at])
    record["out_tokens"] = [1]
    lines[at] = json.dumps(record)
    (tmp_path / "altered.jsonl").write_text("\n".join(lines))
    found = tmlc_cli("replay", package, tmp_path / "altered.jsonl", "--verify", "-o", tmp_path / "out", code=1)
    assert "tick 3 gave another out_tokens" in found.stderr and f"altered.jsonl:{at + 1}" in found.stderr
    assert "--portable-bits" in found.stderr and not (tmp_path / "out").exists()


def test_files_hold_every_tick_the_missed_ones_as_silence(tmlc_cli, package, logs, tmp_path):
    view = tmlc_cli("replay", package, logs / "first.jsonl", "-o", tmp_path / "out", "--json").json
    assert not view["verified"] and len(view["files"]) == 3
    samples, rate = soundfile.read(tmp_path / "out" / "output.wav")
    assert (rate, samples.size) == (16000, 10 * 3200)
    lines = [json.loads(line) for line in (tmp_path / "out" / "timeline.jsonl").read_text().splitlines()]
    assert [line["tick"] for line in lines] == list(range(10))
    missed = [line["tick"] for line in lines if line["missed"]]
    assert len(missed) == 2 and all(not samples[3200 * tick : 3200 * (tick + 1)].any() for tick in missed)
    assert "typed: hi" in (tmp_path / "out" / "transcript.txt").read_text()
    tmlc_cli("replay", package, logs / "first.jsonl", "-o", tmp_path / "out", code=2)
    tmlc_cli("replay", package, logs / "first.jsonl", "-o", tmp_path / "out", "--force")


def test_a_log_that_goes_on_needs_its_snapshot(tmlc_cli, package, logs):
    assert "snapshot at tick 10" in tmlc_cli("replay", package, logs / "second.jsonl", "--verify", code=2).stderr
    given = ("--snapshot", logs / "first.snap", "--verify", "--json")
    assert tmlc_cli("replay", package, logs / "second.jsonl", *given).json["ticks"] == 10


def test_a_log_that_was_cut_is_done_up_to_there(tmlc_cli, package, logs, tmp_path):
    lines = (logs / "first.jsonl").read_text().splitlines()
    ticks = [number for number, line in enumerate(lines) if json.loads(line)["event"] == "tick"]
    kept = lines[: ticks[2] + 1]
    cut = json.dumps({"event": "cut", "tick": 2, "reason": "bound"})
    path = tmp_path / "cut.jsonl"
    path.write_text("\n".join([*kept, cut]) + "\n")
    assert tmlc_cli("replay", package, path, "--verify", "--json").json["events"]["cut"] == 1
    assert "it was cut" in tmlc_cli("replay", package, path, "--verify").stdout.replace("\n", " ")
    path.write_text("\n".join([*kept, cut, lines[ticks[3]]]) + "\n")
    said = " ".join(tmlc_cli("replay", package, path, "--verify", code=2).stderr.split())
    assert "goes on after" in said and "give its records up to that one" in said


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "not a tick log"), ("{}\n", "not a tick log"), ("[\n", ":1"), ('{"event": "open", "version": 99}\n', "log")],
)
def test_what_is_not_a_log_is_refused(tmlc_cli, package, tmp_path, text, what):
    (tmp_path / "log.jsonl").write_text(text)
    said = tmlc_cli("replay", package, tmp_path / "log.jsonl", "--verify", code=2).stderr
    assert what in said and "log.jsonl:1" in said and "give a tick log" in said


def test_a_replay_without_a_purpose_is_refused(tmlc_cli, package, logs):
    assert "nothing to do" in tmlc_cli("replay", package, logs / "first.jsonl", code=2).stderr
