"""The way of `make demo`, with the recordings that are in the repository: checkpoint, package, talks, report."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from click.testing import CliRunner

from tmlc.cli.main import cli
from tmlc.eval.recogniser import Recogniser
from tmlc.eval.record import Heard, Record
from tmlc.eval.rules import RULES
from tmlc.model_zoo.interaction.tasks import SpeechBank
from tmlc.runtimes.media.timed_text import read_timed_text
from tmlc.runtimes.media.video import VideoSource

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, along = script("make_demo"), script("read_along")
SCENES = {scene.name: scene for scene in make.SCENES}


def recording(name):
    """The options of `tmlc run` for a scene: what of it there is."""
    files = {"--audio": f"{name}.wav", "--video": f"{name}.mp4", "--text": f"{name}.yaml"}
    return [part for option, file in files.items() if (DEMO / file).is_file() for part in (option, DEMO / file)]


def tmlc(*args):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == 0, f"{args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Everything that `make demo` leaves, made the same way."""
    out = tmp_path_factory.mktemp("demo")
    tmlc("zoo", "create", "interaction-nano", "-o", out / "interaction-nano")
    tmlc("compile", out / "interaction-nano", "-o", out / "interaction-nano.tmlc", "--check")
    tmlc("verify", out / "interaction-nano.tmlc")
    for name in SCENES:
        tmlc("run", out / "interaction-nano.tmlc", *recording(name), "-o", out / name)
    return out


@pytest.fixture(scope="module")
def episodes():
    return {name: make.play(scene, SpeechBank.load()) for name, scene in SCENES.items()}


def test_the_recordings_are_what_their_generator_makes_and_small(episodes):
    for name, (episode, _) in episodes.items():
        committed, rate = soundfile.read(DEMO / f"{name}.wav", dtype="float32")
        assert rate == 16000 and np.abs(committed - episode.audio).max() < 1e-4
        typed = "".join(episode.text)
        assert not typed or [text.text for text in read_timed_text(DEMO / f"{name}.yaml")] == [typed]
        if episode.video:
            source = VideoSource(DEMO / f"{name}.mp4", 64, 64)
            for tick, clip in sorted(episode.video.items()):
                shown = [source.at(tick * 0.2 + at) for at in (0.05, 0.15)]
                assert np.abs(np.stack(shown).astype(int) - clip).mean() < 8  # what compression leaves of it
    assert yaml.safe_load((DEMO / "scenes.yaml").read_text()) == {name: notes for name, (_, notes) in episodes.items()}
    assert sum(p.stat().st_size for p in DEMO.iterdir() if p.is_file()) < 2_000_000


def test_the_user_is_none_that_the_model_learned_from(episodes):
    assert all(episode.split == "test" for episode, _ in episodes.values())
    assert {episode.task for episode, _ in episodes.values()} == {"barge_in", "time_speak", "rep_count"}


@pytest.mark.parametrize("name", SCENES)
def test_the_model_does_what_it_is_asked(name, demo, episodes):
    """By the rules of `tmlc eval`."""
    episode, _ = episodes[name]
    audio, _ = soundfile.read(demo / name / "output.wav", dtype="float32")
    lines = [json.loads(line) for line in (demo / name / "timeline.jsonl").read_text().splitlines()]
    assert len(lines) == episode.ticks and len(audio) == len(episode.audio)
    heard = Heard(Record(audio, [line["text"] for line in lines]), Recogniser(SpeechBank.load()))
    verdict = RULES[episode.task](episode, heard)
    assert verdict.score == 1.0, verdict.why


def test_a_person_can_read_along(demo, capsys):
    along.main(demo)
    printed = capsys.readouterr().out
    assert '"stop"' in printed and "types: hello every 3s" in printed and "shows a jump" in printed
    for word in ("one", "hello", "four"):
        assert any(line.rstrip().endswith(word) for line in printed.splitlines())


def test_words_of_the_timeline_are_put_together_as_they_were_written():
    ticks = [" o", "ne", " t", "", " t", "wo", "x", ""]
    timeline = [{"tick": n, "at": n * 0.2, "text": text} for n, text in enumerate(ticks)]
    words = [(round(at, 1), word) for at, word in along.model_words(timeline)]
    assert words == [(0.2, "one"), (0.6, "t"), (1.0, "twox")]


def test_the_model_hears_sees_and_reads_each_of_its_inputs(demo, tmp_path):
    """Leaving one input out changes what it says."""
    outputs = {"all": (demo / "see" / "output.wav").read_bytes()}
    given = recording("see")
    for left_out in ("--video", "--text"):
        at = given.index(left_out)
        out = tmp_path / left_out[2:]
        tmlc("run", demo / "interaction-nano.tmlc", *given[:at], *given[at + 2 :], "-o", out)
        outputs[left_out] = (out / "output.wav").read_bytes()
    assert len(set(outputs.values())) == 3


def test_the_engine_answers_like_the_public_interface_does(demo):
    """What `tmlc run` wrote is what a program gets that feeds the same ticks through tmlc.load."""
    import tmlc as library

    audio, _ = soundfile.read(DEMO / "see.wav", dtype="float32")
    typed = {int(t.at / 0.2 + 1e-6): t.text for t in read_timed_text(DEMO / "see.yaml")}
    with library.load(demo / "interaction-nano.tmlc", threads=1) as engine:
        tick = engine.manifest.tick
        video = VideoSource(DEMO / "see.mp4", tick.frame_height, tick.frame_width)
        session = engine.session(seed=0)
        spoken = []
        for index in range(60):
            clip = np.stack([video.at(index * 0.2 + 0.05), video.at(index * 0.2 + 0.15)]) if index % 5 == 0 else None
            heard = audio[index * 3200 : (index + 1) * 3200]
            spoken.append(session.tick(library.TickInput(audio=heard, video=clip, text=typed.get(index))).audio)
    written, _ = soundfile.read(demo / "see" / "output.wav", dtype="int16")
    expected = np.round(np.concatenate(spoken).astype(np.float64) * 32767).astype(np.int16)
    assert np.array_equal(written[: expected.size], expected)


def test_the_report_holds_the_run_against_the_budget(demo, episodes):
    given = (*recording("see"), "--startup-runs", "1", "--sittings", "1", "--budget", "60s")
    tmlc("profile", demo / "interaction-nano.tmlc", *given, "-o", demo / "report")
    view = json.loads((demo / "report.json").read_text())
    assert view["ticks"] == episodes["see"][0].ticks and view["turn_latency"]["budget_ms"] == 60000
    assert "missed deadlines" in (demo / "report.txt").read_text()
