"""The way of `make demo`, with the recording that is in the repository: checkpoint, package, conversation, report."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from tmlc.cli.main import cli
from tmlc.runtimes.media.timed_text import read_timed_text
from tmlc.runtimes.media.video import VideoSource

DEMO = Path(__file__).parents[2] / "examples" / "demo"
RECORDING = ["--audio", DEMO / "speech.wav", "--video", DEMO / "camera.mp4", "--text", DEMO / "typed.yaml"]


def tmlc(*args):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == 0, f"{args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Everything that `make demo` leaves, made the same way."""
    out = tmp_path_factory.mktemp("demo")
    tmlc("zoo", "create", "nano", "--seed", "0", "-o", out / "nano")
    tmlc("compile", out / "nano", "-o", out / "nano.tmlc", "--check")
    tmlc("verify", out / "nano.tmlc")
    tmlc("run", out / "nano.tmlc", *RECORDING, "-o", out)
    return out


def generator():
    spec = importlib.util.spec_from_file_location("make_demo", DEMO / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recording_is_what_its_generator_makes_and_small(tmp_path):
    make = generator()
    committed, rate = soundfile.read(DEMO / "speech.wav", dtype="int16")
    assert rate == 16000 and committed.size == 30 * 16000
    made = np.round(make.voice() * 32767).astype(np.int16)
    assert np.abs(made.astype(int) - committed).max() <= 1  # sine differs in the last bit between machines
    make.write_text(tmp_path / "typed.yaml")
    assert (tmp_path / "typed.yaml").read_text() == (DEMO / "typed.yaml").read_text()
    assert len(read_timed_text(DEMO / "typed.yaml")) == 5
    source, shown = VideoSource(DEMO / "camera.mp4", make.SIDE, make.SIDE), make.frames()
    for index in (0, 100, 299):
        difference = source.at((index + 0.5) / make.FPS).astype(int) - shown[index]
        assert np.abs(difference).mean() < 8  # what compression leaves of it
    assert sum(p.stat().st_size for p in DEMO.iterdir() if p.is_file()) < 2_000_000


def test_it_leaves_audio_transcript_and_timeline_of_half_a_minute(demo):
    samples, rate = soundfile.read(demo / "output.wav")
    assert rate == 16000 and samples.size == 30 * 16000 and np.isfinite(samples).all()
    lines = [json.loads(line) for line in (demo / "timeline.jsonl").read_text().splitlines()]
    assert len(lines) == 150
    assert sum(line["frames"] > 0 for line in lines) == 30
    assert [line["typed"] for line in lines if line["typed"]] == [t.text for t in read_timed_text(DEMO / "typed.yaml")]
    transcript = (demo / "transcript.txt").read_text()
    assert "[00:08.800] typed: what do you see?" in transcript and "model: " in transcript


def test_the_model_hears_sees_and_reads_each_of_its_inputs(demo, tmp_path):
    """Leaving one input out changes what it says."""
    outputs = {"all": (demo / "output.wav").read_bytes()}
    for left_out in ("--audio", "--video", "--text"):
        at = RECORDING.index(left_out)
        rest = RECORDING[:at] + RECORDING[at + 2 :]
        tmlc("run", demo / "nano.tmlc", *rest, "--seconds", "30", "-o", tmp_path / left_out[2:])
        outputs[left_out] = (tmp_path / left_out[2:] / "output.wav").read_bytes()
    assert len(set(outputs.values())) == 4


def test_the_engine_answers_like_the_public_interface_does(demo):
    """What `tmlc run` wrote is what a program gets that feeds the same ticks through tmlc.load."""
    import tmlc as library

    audio, _ = soundfile.read(DEMO / "speech.wav", dtype="float32")
    typed = {int(t.at / 0.2 + 1e-6): t.text for t in read_timed_text(DEMO / "typed.yaml")}
    with library.load(demo / "nano.tmlc", threads=1) as engine:
        tick = engine.manifest.tick
        video = VideoSource(DEMO / "camera.mp4", tick.frame_height, tick.frame_width)
        session = engine.session(seed=0)
        spoken = []
        for index in range(60):
            clip = np.stack([video.at(index * 0.2 + 0.05), video.at(index * 0.2 + 0.15)]) if index % 5 == 0 else None
            heard = audio[index * 3200 : (index + 1) * 3200]
            spoken.append(session.tick(library.TickInput(audio=heard, video=clip, text=typed.get(index))).audio)
    written, _ = soundfile.read(demo / "output.wav", dtype="int16")
    expected = np.round(np.concatenate(spoken).astype(np.float64) * 32767).astype(np.int16)
    assert np.array_equal(written[: expected.size], expected)


def test_the_report_holds_the_run_against_the_budget(demo):
    options = ("--startup-runs", "1", "--sittings", "1", "--budget", "60s")
    tmlc("profile", demo / "nano.tmlc", *RECORDING, *options, "-o", demo / "report")
    view = json.loads((demo / "report.json").read_text())
    assert view["ticks"] == 150 and view["turn_latency"]["budget_ms"] == 60000
    assert "missed deadlines" in (demo / "report.txt").read_text()
