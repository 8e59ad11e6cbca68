"""`tmlc profile` with cases, gates, scores, other packages, other numbers of sessions and without passes."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest

from tmlc.bench.dialogues import made_up
from tmlc.package import open_package
from tmlc.report.profile import experiments
from tmlc.runtimes.core.session import Session

QUICK = ("--startup-runs", "0", "--sittings", "0", "--no-kernels")
NO_LIMIT = ("--budget", "100000ms")


def case(folder, text):
    path = folder / "case.yaml"
    path.write_text(f"name: short\nseconds: 2\nwarm_up: 2\n{text}")
    return path


def test_a_case_is_played_as_it_is_written(tmlc_cli, package, tmp_path):
    path = case(tmp_path, "sessions: 2\nrepetitions: 2\naudio: {kind: dialogue}\ntext: {kind: made-up}\n")
    view = tmlc_cli("profile", package, "--case", path, *QUICK, *NO_LIMIT, "--json").json
    assert view["scenario"]["name"] == "short" and view["scenario"]["sessions"] == 2
    assert view["ticks"] == 1 + 2 * (10 - 2)
    assert view["inputs"]["clock"] == "input"
    assert view["hesitation"] is not None and view["stop_latency"] is not None
    for option in (("--seconds", "3"), ("--clock", "wall"), ("--audio", path)):
        assert "--case" in tmlc_cli("profile", package, "--case", path, *option, code=2).stderr


def test_a_model_that_answers_and_stops_has_its_latencies_told(tmlc_cli, package, tmp_path, monkeypatch):
    """The engine is real, its voice is scripted: it is silent in ticks in which it hears somebody, and speaks in all
    others. It begins after the labelled end and stops after the labelled start of each utterance, by as much as that
    takes: counted here tick by tick."""
    heard, plain = [], Session.tick

    def scripted(session, given):
        out = plain(session, given)
        heard.append(bool(np.abs(given.audio).max() > 0.02))
        return replace(out, audio=np.full_like(out.audio, 0.0 if heard[-1] else 0.3))

    monkeypatch.setattr(Session, "tick", scripted)
    path = case(tmp_path, "audio: {kind: dialogue}\n")
    path.write_text(path.read_text().replace("seconds: 2", "seconds: 40"))
    view = tmlc_cli("profile", package, "--case", path, *QUICK, *NO_LIMIT, "--json").json
    (dialogue,) = made_up(1, 16000, 0, 40.0)
    spoken, ticks = dialogue.until(40.0), len(heard)
    assert len(spoken) >= 6 and ticks == 200
    waits = []
    for utterance in spoken:
        end = int(utterance.end / 0.2)
        waits.append(200.0 * next(k - end for k in range(end, ticks) if not heard[k]))
    told = view["hesitation"]
    assert (told["ends"], told["count"], told["already_speaking"]) == (len(spoken), len(spoken), 0)
    assert told["mean"] == pytest.approx(np.mean(waits)) and told["p50"] == 200.0
    stop = view["stop_latency"]
    assert stop["trials"] == stop["stopped"] == len(spoken)
    # Its silence begins with the tick that heard somebody: handed out when that tick is over, 40 ms and the step later.
    slowest = view["step_ms"]["max"]
    silent = [200.0 * next(k + 1 for k in range(int(u.start / 0.2), ticks) if heard[k]) + 40.0 for u in spoken]
    least = max(at - 1000 * u.start for at, u in zip(silent, spoken, strict=True))
    assert least < stop["max_ms"] <= least + slowest + 1e-6
    assert 40.0 < stop["p50_ms"] <= 240.0 + slowest


def test_words_to_say_are_said_in_every_tick(tmlc_cli, package, tmp_path):
    path = case(tmp_path, "audio: {kind: dialogue}\nspeak: always\n")
    view = tmlc_cli("profile", package, "--case", path, *QUICK, *NO_LIMIT, "--json").json
    assert "next_token" not in view["stages_ms"] and view["stages_ms"]["vocode"]["count"] == 8
    assert view["hesitation"] is None and "does not choose" in view["not_measured"]["hesitation"]


def test_gates_decide_the_exit_code(tmlc_cli, package):
    profile = ("profile", package, "--seconds", "3", *QUICK)
    view = tmlc_cli(*profile, *NO_LIMIT, "--fail-over", "p50,p99,max,misses:0%,growth:900%", "--json").json
    assert [(gate["figure"], gate["passed"]) for gate in view["gate"]] == [
        (figure, True) for figure in ("p50", "p99", "max", "misses", "growth")
    ]
    over = tmlc_cli(*profile, "--budget", "240.001ms", "--fail-over", "p50,misses:0%", "--json", code=1)
    assert {gate["figure"]: gate["passed"] for gate in over.json["gate"]}["p50"] is False
    assert "over budget: " in over.stderr and "p50" in over.stderr
    tmlc_cli(*profile, "--budget", "240.001ms", "--fail-over", "misses:100%")


def test_the_search_for_sessions_starts_at_one_and_says_what_ended_it(tmlc_cli, package, monkeypatch):
    profile = ("profile", package, "--seconds", "1", *QUICK, "--find-sessions", "--fail-over", "misses:100%", "--json")
    none = tmlc_cli(*profile, "--budget", "240.001ms").json["sessions_held"]
    assert none["held"] == 0 and [one["sessions"] for one in none["tried"]] == [1] and "budget" in none["limit"]
    few = functools.partial(experiments.sessions_held, most=3, ticks=10)
    monkeypatch.setattr(experiments, "sessions_held", few)
    found = tmlc_cli(*profile, *NO_LIMIT).json["sessions_held"]
    assert found["held"] == 3 and [one["sessions"] for one in found["tried"]] == [1, 2, 3]
    assert found["limit"] == "no more than 3 were tried"


def test_a_package_does_not_differ_from_itself(tmlc_cli, package, tmp_path):
    options = ("--against", package, "--seconds", "6")
    view = tmlc_cli("profile", package, *options, "--fail-over", "1000%", "-o", tmp_path / "turns", "--json").json
    assert view["outputs"]["says"] == "outputs equal bit for bit in 30 ticks"
    assert view["a"]["digest"] == view["b"]["digest"] and view["fail_over"]["failed"] == []
    assert json.loads((tmp_path / "turns.json").read_text()) == view
    assert "outputs equal" in (tmp_path / "turns.txt").read_text()
    for wrong in (("--no-kernels",), ("--junit", tmp_path / "j.xml"), ("--budget", "300ms"), ("--find-sessions",)):
        assert "--against" in tmlc_cli("profile", package, *options, *wrong, code=2).stderr


@pytest.mark.slow
def test_a_pass_that_is_left_out_is_played_against_the_package(tmlc_cli, checkpoint, package):
    with open_package(package) as opened:
        idle = next(r["pass"] for r in opened.manifest.pipeline
                    if not r["matches"] and r["ops_before"] == r["ops_after"])  # fmt: skip
    asked = ("--ablate", f"fuse.residual_norm,{idle}", "--checkpoint", checkpoint)
    view = tmlc_cli("profile", package, "--seconds", "2", *QUICK, *NO_LIMIT, *asked, "--json").json
    rows = {row["pass"]: row for row in view["ablation"]}
    assert set(rows) == {"fuse.residual_norm", idle}
    assert rows[idle]["verdict"] == "no match" and rows[idle]["p50_without_ms"] is None
    played = rows["fuse.residual_norm"]
    assert played["p50_with_ms"] > 0 and played["p50_without_ms"] > 0 and "10 ticks" in played["note"]
    assert view["passes"] and {"pass", "config", "matches"} <= set(view["passes"][0])


def test_an_ablation_needs_the_packages_own_checkpoint_and_passes(tmlc_cli, checkpoint, package, tmp_path):
    profile = ("profile", package, "--seconds", "1", *QUICK, *NO_LIMIT)
    assert "belong together" in tmlc_cli(*profile, "--ablate", code=2).stderr
    assert "belong together" in tmlc_cli(*profile, "--checkpoint", checkpoint, code=2).stderr
    unknown = tmlc_cli(*profile, "--ablate", "fuse.everything", "--checkpoint", checkpoint, code=2)
    assert "without a pass 'fuse.everything'" in unknown.stderr
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes() + b"\n")
    refused = tmlc_cli(*profile, "--ablate", "fuse.residual_norm", "--checkpoint", other, code=2)
    assert "tokenizer.json differs" in refused.stderr
    assert "playing" not in unknown.stderr + refused.stderr  # it is said before minutes of playing, not after


def test_scores_of_eval_stand_beside_the_speed(tmlc_cli, package, tmp_path):
    scores = tmlc_cli("eval", package, "--tasks", "turn_taking", "--episodes", "1", "--threads", "1", "--json")
    (tmp_path / "eval.json").write_text(scores.stdout)
    profile = ("profile", package, "--seconds", "1", *QUICK, *NO_LIMIT, "--quality")
    found = tmlc_cli(*profile, tmp_path / "eval.json", "--json").json["quality"]
    task = scores.json["tasks"]["turn_taking"]
    assert found["kl"] is None and found["scores"] == {
        "turn_taking": {"score": task["score"], "interval": task["interval"]}
    }
    assert "scores of" in found["against"]
    (tmp_path / "eval.json").write_text("{}")
    assert "no scores" in tmlc_cli(*profile, tmp_path / "eval.json", code=2).stderr
    said = tmlc_cli(*profile, tmp_path / "absent.json", code=2).stderr
    assert "cannot be read: No such file" in said and "Errno" not in said


@pytest.mark.parametrize("gate", ["p98", "p99:3%", "3%"])
def test_a_gate_without_a_figure_is_refused_before_anything_is_played(tmlc_cli, package, gate):
    assert "--fail-over" in tmlc_cli("profile", package, "--fail-over", gate, code=2).stderr


def test_a_case_the_model_cannot_play_is_refused(tmlc_cli, package, tmp_path):
    absent = case(tmp_path, "audio: {kind: file, path: absent.wav}\n")
    tmlc_cli("profile", package, "--case", absent, *QUICK, code=2)
    short = tmp_path / "short.yaml"
    short.write_text("name: x\nseconds: 1\nwarm_up: 9\n")
    assert "warm" in tmlc_cli("profile", package, "--case", short, *QUICK, code=2).stderr
