"""`tmlc eval` on a small compiled model with random weights, which can do nothing yet."""

import importlib.util
import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner

import tmlc
from tmlc.cli.eval import TARGETS
from tmlc.cli.main import cli
from tmlc.eval.eager import open_model
from tmlc.eval.play import play
from tmlc.eval.view import below, fallen
from tmlc.frontend import checkpoint as frontend
from tmlc.ir.run import one_thread
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.tasks import TASKS
from tmlc.runtimes.media.audio import write_wav

spec = importlib.util.spec_from_file_location("cli_conftest", Path(__file__).parents[1] / "cli/conftest.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    create_checkpoint(tiny.tiny_config(), 0, folder)
    return folder


@pytest.fixture(scope="module")
def package(checkpoint):
    tmlc.compile(checkpoint, checkpoint.parent / "tiny.tmlc")
    return checkpoint.parent / "tiny.tmlc"


def run(*args, code=0):
    result = CliRunner().invoke(cli, ["eval", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_json_holds_every_task_and_failures_are_written_to_listen_to(package, tmp_path):
    given = (package, "--tasks", "delegate,turn_taking", "--episodes", 2, "--json", "-o", tmp_path / "failures")
    view = json.loads(run(*given).stdout)
    assert view["schema"] == 1 and view["target"] == "cpu" and view["precision"] == "fp32"
    assert list(view["tasks"]) == ["turn_taking", "delegate"]
    for task in view["tasks"].values():
        low, high = task["interval"]
        assert 0 <= low <= task["score"] <= high <= 1 and task["episodes"] == 2 and task["errors"] == 0
    with wave.open(str(tmp_path / "failures/turn_taking-0.wav")) as file:
        assert file.getnchannels() == 2 and file.getnframes() > 16000
    assert "no answer" in (tmp_path / "failures/turn_taking-0.txt").read_text()


def test_what_a_session_does_does_not_depend_on_its_company(package, bank):
    episodes = [TASKS["rep_count"].episode(seed, "test", bank) for seed in range(3)]
    with tmlc.load(package, sessions=3) as engine:
        together = play(engine, episodes)
    with tmlc.load(package, sessions=1) as engine:
        alone = play(engine, episodes)
    for one, other in zip(together, alone, strict=True):
        assert (one.audio == other.audio).all() and one.text == other.text and not one.error


def test_a_checkpoint_is_played_in_pytorch_as_its_engine_plays(checkpoint, package, bank):
    """The model of PyTorch: same words, and samples that differ by rounding."""
    episodes = [TASKS[task].episode(0, "test", bank) for task in ("turn_taking", "rep_count")]
    assert {bool(episode.video) for episode in episodes} == {True, False}
    with one_thread(), open_model(checkpoint, 2) as model:
        assert (model.target, model.kind) == ("pytorch", "interaction")
        eager = play(model, episodes)
        alone = play(model, episodes[1:])[0]
    with tmlc.load(package, threads=1, sessions=2) as engine:
        compiled = play(engine, episodes)
    for one, other in zip(eager, compiled, strict=True):
        assert one.text == other.text and not one.error and not other.error
        np.testing.assert_allclose(one.audio, other.audio, atol=1e-4)
    assert any("".join(record.text) for record in eager)
    assert (alone.audio == eager[1].audio).all()  # a slot that was used before is a new session


def test_a_checkpoint_is_opened_once(checkpoint, monkeypatch):
    """What is run is what was traced, also where the folder is exported anew in between."""
    read, opened = frontend.read_header, []
    monkeypatch.setattr(frontend, "read_header", lambda file: opened.append(file.name) or read(file))
    with open_model(checkpoint, 1) as model:
        assert model.kind == "interaction" and opened == ["model.safetensors"]


def test_a_folder_that_holds_a_checkpoint_is_evaluated_in_pytorch(checkpoint):
    view = json.loads(run(checkpoint, "--tasks", "start_stop", "--episodes", 1, "--json").stdout)
    assert view["target"] == "pytorch" and view["precision"] == "fp32" and view["tasks"]["start_stop"]["errors"] == 0


def test_a_score_below_the_least_is_exit_code_one(package):
    result = run(package, "--tasks", "start_stop", "--episodes", 1, "--min-score", "90%", code=1)
    assert "start_stop is 0.0 %, below 90.0 %" in result.output


def test_unknown_tasks_and_wrong_inputs_are_refused(package):
    result = CliRunner().invoke(cli, ["eval", str(package), "--tasks", "dance"])
    assert result.exit_code == 2 and "no task dance" in result.output
    result = CliRunner().invoke(cli, ["eval", str(package), "--all-targets"])
    assert result.exit_code == 2 and "compiles one checkpoint" in result.output


def test_recordings_of_others_are_played_and_counted(package, tmp_path):
    for name, label, recording in (("candor_turn_taking", [{"timestamp": [0.5]}], "1"), ("icc_backchannel", None, "a")):
        folder = tmp_path / name / recording
        folder.mkdir(parents=True)
        write_wav(folder / "input.wav", np.zeros(10000), 16000)
        if label:
            (folder / "turn_taking.json").write_text(json.dumps(label))
    view = json.loads(run(package, "--data", tmp_path, "--json").stdout)
    assert list(view["sets"]) == ["candor_turn_taking", "icc_backchannel"] and view["seconds"] == pytest.approx(1.6)
    for figures in view["sets"].values():
        assert figures["recordings"] == 1 and figures["errors"] == 0 and figures["rates"]["took over"]["of"] == 1
    both = run(package, package, "--data", tmp_path, "--tasks", "icc_backchannel", "--episodes", 1)
    assert both.output.count("backchannels_per_s") == 2 and "candor" not in both.output
    (tmp_path / "test").mkdir()
    with av.open(str(tmp_path / "test/a.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        film.mux(stream.encode())
    (tmp_path / "test.csv").write_text("name,count\na.mp4,7\n")
    figures = json.loads(run(package, "--data", tmp_path, "--tasks", "repcount_test", "--json").stdout)["sets"]
    assert figures["repcount_test"]["recordings"] == 1 and figures["repcount_test"]["errors"] == 0
    assert figures["repcount_test"]["means"]["absolute error (MAE)"]["mean"] == pytest.approx(7 / 7.1)
    for option in (["--min-score", "90%"], ["-o", tmp_path / "out"]):
        assert "no score" in run(package, "--data", tmp_path, *option, code=2).output


def test_all_targets_compiles_a_checkpoint_and_shows_one_table(checkpoint, monkeypatch):
    monkeypatch.setattr("tmlc.cli.eval.TARGETS", (("cpu", "fp32"), ("cpu", "int4")))  # all are in the slow test
    result = run(checkpoint, "--all-targets", "--tasks", "time_speak", "--episodes", 1)
    assert "compiling cpu fp32" in result.stderr and "compiling cpu int4" in result.stderr
    assert "points from the first" in result.stdout and "cpu int4" in result.stdout


@pytest.mark.slow
def test_a_checkpoint_is_compared_on_every_target(checkpoint):
    view = json.loads(run(checkpoint, "--all-targets", "--tasks", "turn_taking", "--episodes", 1, "--json").stdout)
    told = [(model["target"], model["precision"]) for model in view["models"]]
    assert told == list(TARGETS)
    assert view["broken"] == []


def test_a_precision_may_cost_a_point_and_int4_three():
    def view(precision, score):
        return {"target": "cpu", "precision": precision, "tasks": {"rep_count": {"score": score}}}

    first = view("fp32", 0.95)
    assert fallen([first, view("int8", 0.94), view("int4", 0.92)]) == []
    assert len(fallen([first, view("int8", 0.93), view("int4", 0.91)])) == 2
    assert len(below([first], 0.96)) == 1
