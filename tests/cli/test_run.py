"""`tmlc run`: what it writes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from tmlc.kernels.cpu import available_isas
from tmlc.report.tables import printable
from tmlc.report.transcript import Transcript, clock_time


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """1.1 seconds of stereo audio at 44.1 kHz, eight pictures, and two typed lines."""
    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    soundfile.write(folder / "speech.wav", random.standard_normal((48510, 2)) * 0.1, 44100)
    (folder / "frames").mkdir()
    for index in range(8):
        Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / "frames" / f"{index}.png")
    (folder / "typed.yaml").write_text('- {at: 0.1, text: "hi"}\n- {at: 0.7, text: "you"}\n')
    return folder


def inputs(media):
    return ["--audio", media / "speech.wav", "--video", media / "frames", "--fps", "8", "--text", media / "typed.yaml"]


def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_kernels_are_kept_for_tensorrt_packages_only(tmlc_cli, package, tmp_path):
    asked = ["--seconds", 1, "-o", tmp_path / "out", "--kernel-cache", tmp_path / "kernels"]
    told = tmlc_cli("run", package, *asked, code=2).stderr
    assert "target cpu compiles no kernels when it is loaded" in told and not (tmp_path / "kernels").exists()


def test_a_run_writes_audio_transcript_and_timeline(tmlc_cli, package, media, tmp_path):
    view = tmlc_cli("run", package, *inputs(media), "-o", tmp_path / "out", "--json").json
    assert view["ticks"] == 6 and len(view["files"]) == 3
    samples, rate = soundfile.read(tmp_path / "out" / "output.wav")
    assert rate == 16000 and samples.size == 6 * 3200 and np.abs(samples).max() > 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "timeline.jsonl").read_text().splitlines()]
    assert [line["tick"] for line in lines] == list(range(6))
    assert [line["at"] for line in lines] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert [line["typed"] for line in lines] == ["hi", None, None, "you", None, None]
    assert [line["frames"] for line in lines] == [2, 0, 0, 0, 0, 0]
    assert all(line["tokens"] and line["step_ms"] > 0 and line["timings_ms"]["decode"] > 0 for line in lines)
    assert lines[0]["counters"]["dropped_clips"] == 0
    transcript = (tmp_path / "out" / "transcript.txt").read_text()
    assert "[00:00.000] typed: hi\n" in transcript and "[00:00.600] typed: you\n" in transcript


def test_the_same_seed_gives_the_same_files_whatever_threads_and_clock(tmlc_cli, package, media, tmp_path):
    for name, options in {"a": [], "b": ["--threads", "1"], "c": ["--clock", "wall"]}.items():
        tmlc_cli("run", package, *inputs(media), "-o", tmp_path / name, *options, "--json")
    for name in ("output.wav", "transcript.txt"):
        assert len({(tmp_path / run / name).read_bytes() for run in "abc"}) == 1
    tokens = [
        [json.loads(line)["tokens"] for line in (tmp_path / run / "timeline.jsonl").read_text().splitlines()]
        for run in "abc"
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_portable_bits_give_the_same_files_on_every_variant(tmlc_cli, package, media, tmp_path, monkeypatch):
    written = []
    for isa in available_isas():
        monkeypatch.setenv("TMLC_CPU_ISA", isa)
        tmlc_cli("run", package, *inputs(media), "--portable-bits", "-o", tmp_path / isa)
        files = read(tmp_path / isa)
        del files["timeline.jsonl"]  # holds times
        written.append(files)
    assert all(files == written[0] for files in written)


def test_temperature_and_seed_change_the_words(tmlc_cli, package, media, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tmlc_cli("run", package, *inputs(media), "-o", tmp_path / name, "--seed", seed, "--temperature", "2", "--json")
    texts = [(tmp_path / name / "output.wav").read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_the_wall_clock_runs_in_real_time(tmlc_cli, package, tmp_path):
    tmlc_cli("run", package, "--seconds", "0.6", "--clock", "wall", "-o", tmp_path / "out", "--json")
    lines = [json.loads(line) for line in (tmp_path / "out" / "timeline.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["late_ms"] >= 0 for line in lines)


def test_seconds_and_tail_set_the_length(tmlc_cli, package, media, tmp_path):
    for options, ticks in ((["--seconds", "0.4"], 2), (["--tail", "1"], 11), (["--seconds", "2", "--tail", "1"], 15)):
        view = tmlc_cli("run", package, *inputs(media), *options, "-o", tmp_path / "out", "--force", "--json").json
        assert view["ticks"] == ticks


def test_existing_results_are_kept_unless_forced(tmlc_cli, package, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "output.wav").write_text("precious")
    (out / "notes.txt").write_text("mine")
    assert "output.wav" in tmlc_cli("run", package, "--seconds", "0.2", "-o", out, code=2).stderr
    assert read(out) == {"output.wav": b"precious", "notes.txt": b"mine"}
    tmlc_cli("run", package, "--seconds", "0.2", "-o", out, "--force", "--json")
    assert set(read(out)) == {"output.wav", "transcript.txt", "timeline.jsonl", "notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("make", "option", "words"),
    [
        (None, "--audio", "no such audio file"),
        (None, "--video", "no such video file or folder"),
        (None, "--text", "no such timed-text file"),
        (b"junk", "--audio", "cannot be decoded"),
        (b"junk", "--video", "cannot be decoded"),
        (b"- {at: 0, txt: a}", "--text", "unknown key 'txt'"),
        (b"- {at: soon, text: a}", "--text", "not a number of seconds"),
    ],
)
def test_bad_media_is_two_lines_and_leaves_no_folder(tmlc_cli, package, tmp_path, make, option, words):
    path = tmp_path / "input"
    if make is not None:
        path.write_bytes(make)
    error = tmlc_cli("run", package, option, path, "-o", tmp_path / "a" / "out", code=2).stderr
    assert words in error and "input" in error and len(error.rstrip("\n").split("\n")) == 2
    assert not (tmp_path / "a").exists()


def test_nothing_to_play_is_said(tmlc_cli, package, tmp_path):
    assert "nothing to play" in tmlc_cli("run", package, "-o", tmp_path / "out", code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_nothing(package, tmp_path):
    command = [sys.executable, "-m", "tmlc.cli.main", "run", str(package), "--seconds", "60", "--clock", "wall"]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    assert "playing" in process.stderr.readline()
    assert (tmp_path / "out").is_dir()
    os.kill(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_run_needs_no_torch(package, tmp_path):
    code = (
        "import sys; from click.testing import CliRunner; from tmlc.cli.main import cli\n"
        f"words = ['run', {str(package)!r}, '--seconds', '0.4', '-o', {str(tmp_path / 'out')!r}]\n"
        "done = CliRunner().invoke(cli, words)\n"
        "assert done.exit_code == 0, done.stderr\n"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transcript_joins_neighbouring_ticks_and_keeps_one_line_a_turn():
    transcript = Transcript(0.2)
    for tick, typed, text in [(0, None, "a"), (1, None, "b\n"), (2, "hi", "c"), (3, None, ""), (4, None, "d")]:
        transcript.add(tick, typed, text)
    assert list(transcript.lines()) == [
        "[00:00.000] model: ab\\n",
        "[00:00.400] typed: hi",
        "[00:00.400] model: c",
        "[00:00.800] model: d",
    ]


def test_times_and_control_characters_are_written_readably():
    assert clock_time(0.2) == "00:00.200" and clock_time(61.0005) == "01:01.000" and clock_time(3601.5) == "1:00:01.500"
    assert printable("grüß\tdich\x1b[2J") == "grüß\\tdich\\x1b[2J"
