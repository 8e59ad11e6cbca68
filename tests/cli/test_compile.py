"""`tmlc compile`: what it writes, what it refuses, and that a failure leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import yaml
from safetensors.numpy import load_file, save_file


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to damage, in a folder that a test can compare before and after."""
    return shutil.copytree(checkpoint, tmp_path / "tiny")


def test_the_report_names_passes_sizes_and_the_package(tmlc_cli, checkpoint, tmp_path):
    result = tmlc_cli("compile", checkpoint, "-o", tmp_path / "a.tmlc")
    assert "state.insert" in result.stdout and "a.tmlc" in result.stdout
    assert "packing weights" in result.stderr
    view = tmlc_cli("compile", checkpoint, "-o", tmp_path / "b.tmlc", "--json").json
    assert view["package_bytes"] == (tmp_path / "b.tmlc").stat().st_size
    assert [r["pass"] for r in view["passes"]][-1] == "memory.verify"
    assert view["precision"] == "fp32" and view["seconds"]["passes"] > 0
    assert (tmp_path / "a.tmlc").read_bytes() == (tmp_path / "b.tmlc").read_bytes()


def test_a_dry_run_says_what_lowers_and_writes_nothing(tmlc_cli, checkpoint, tmp_path):
    view = tmlc_cli("compile", checkpoint, "-o", tmp_path / "a.tmlc", "--dry-run", "--json").json
    assert view["out"] is None and not list(tmp_path.iterdir())
    assert all(row["kernel"] and (row["source"] or row["op"] == "advance") for row in view["coverage"])
    refused = tmlc_cli("compile", checkpoint, "--dry-run", "--passes", "canonicalize.dead_code", code=1).stdout
    assert all(word in refused for word in ("refused", "attention", "source", "reason", "what to do"))
    tmlc_cli("compile", checkpoint, "--dry-run", "--stop-after", "state.insert", code=2)


def test_bf16_halves_the_weights_and_is_checked_after_every_pass(tmlc_cli, checkpoint, package, tmp_path):
    view = tmlc_cli("compile", checkpoint, "-o", tmp_path / "b.tmlc", "--precision", "bf16", "--check", "--json").json
    assert view["precision"] == "bf16"
    bf16, fp32 = (zipfile.ZipFile(p).getinfo("weights.safetensors").file_size for p in (tmp_path / "b.tmlc", package))
    assert bf16 < 0.65 * fp32
    tmlc_cli("verify", tmp_path / "b.tmlc", "--json")


def test_a_package_can_be_a_folder(tmlc_cli, checkpoint, tmp_path):
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "nano.tmlc", "--folder", "--json")
    assert (tmp_path / "nano.tmlc" / "manifest.json").is_file()
    tmlc_cli("verify", tmp_path / "nano.tmlc", "--json")


def test_context_options_reach_the_package(tmlc_cli, checkpoint, tmp_path):
    options = ["--context", "128", "--context-policy", "end", "--max-append", "32"]
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", *options, "--json")
    context = tmlc_cli("inspect", tmp_path / "x.tmlc", "--json").json["manifest"]["context"]
    assert (context["limit"], context["policy"], context["max_append"]) == (128, "end", 32)


def test_the_printed_pipeline_is_one_that_compile_reads(tmlc_cli, checkpoint, package, tmp_path):
    text = tmlc_cli("compile", checkpoint, "--print-pipeline").stdout
    assert yaml.safe_load(text)[0]["pass"] == "canonicalize.dead_code"
    (tmp_path / "mine.yaml").write_text(text)
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--pipeline", tmp_path / "mine.yaml", "--json")
    assert (tmp_path / "x.tmlc").read_bytes() == package.read_bytes()
    shorter = tmlc_cli("compile", checkpoint, "--print-pipeline", "--disable", "fuse.residual_norm").stdout
    assert "fuse.residual_norm" in text and "fuse.residual_norm" not in shorter
    chosen = tmlc_cli("compile", checkpoint, "--print-pipeline", "--passes", "route.fuse_router").stdout
    assert [step["pass"] for step in yaml.safe_load(chosen)] == ["route.fuse_router"]


def test_stop_after_dumps_programs_and_writes_no_package(tmlc_cli, checkpoint, tmp_path):
    dump = tmp_path / "dump"
    result = tmlc_cli("compile", checkpoint, "--stop-after", "route.fuse_router", "--dump", dump)
    assert "no package was written" in result.stderr
    assert tree(tmp_path) == ["dump"] + [f"dump/{n}" for n in sorted(p.name for p in dump.iterdir())]
    assert "00_input.ir" in (names := {p.name for p in dump.iterdir()}) and any("route.fuse_router" in n for n in names)


def test_a_disabled_pass_that_others_need_is_said(tmlc_cli, checkpoint, tmp_path):
    result = tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--disable", "state.insert", code=2)
    assert result.stderr.count("error: ") == 1
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp8"], "has no precision"),
        (["--precision", "int7"], "unknown precision"),
        (["--target", "triton"], "needs an architecture"),
        (["--target", "abacus"], "unknown target"),
        (["--passes", "route.fuse_roter"], "route.fuse_router"),
        (["--passes", ","], "names no pass"),
        (["--disable", "nonsense"], "nonsense"),
        (["--stop-after", "nonsense"], "nonsense"),
        (["--pipeline", "missing.yaml"], "missing.yaml"),
        (["--preset", "nonsense"], "nonsense"),
        (["--context-policy", "forget"], "forget"),
        (["--sinks", "100000"], "sinks"),
    ],
)
def test_unknown_choices_are_refused_in_two_lines(tmlc_cli, checkpoint, tmp_path, options, words):
    result = tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", *options, code=2)
    error = result.stderr[result.stderr.index("error: ") :]
    assert words in error and len(error.rstrip("\n").split("\n")) == 2
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "passes: []",
        "- pass: nonsense",
        "- {pass: state.insert, setings: {}}",
        "- [",
        "- pass: state.insert\n  config: {x: 1}",
    ],
)
def test_a_wrong_pipeline_file_is_refused_before_any_work(tmlc_cli, checkpoint, tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--pipeline", tmp_path / "p.yaml", code=2)
    assert tree(tmp_path) == ["p.yaml"]


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(tensors):
    tensors["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: edit_config(f, lambda c: c.update(model_type="gpt9")), "gpt9"),
        (lambda f: edit_config(f, lambda c: c["text_config"].update(colour="red")), "colour"),
        (lambda f: os.truncate(f / "model.safetensors", 100_000), "cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=t["model.norm.weight"])), "extra"),
        (lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][1:]})), "31"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype("i4")})),
            "I32",
        ),
        (lambda f: edit_tensors(f, poison), "model.norm.weight"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    ],
)
def test_a_bad_checkpoint_is_named_and_leaves_nothing(tmlc_cli, broken, tmp_path, damage, words):
    damage(broken)
    before = tree(tmp_path)
    result = tmlc_cli("compile", broken, "-o", tmp_path / "x.tmlc", code=2)
    error = result.stderr[result.stderr.index("error: ") :]
    assert words in error and len(error.rstrip("\n").split("\n")) == 2
    assert tree(tmp_path) == before


def test_an_existing_output_is_kept_unless_forced(tmlc_cli, checkpoint, package, tmp_path):
    out = tmp_path / "x.tmlc"
    out.write_text("precious")
    assert "already exists" in tmlc_cli("compile", checkpoint, "-o", out, code=2).stderr
    assert out.read_text() == "precious"
    tmlc_cli("compile", checkpoint, "-o", out, "--force", "--json")
    assert out.read_bytes() == package.read_bytes()


def test_a_failure_keeps_the_older_package(tmlc_cli, broken, tmp_path):
    edit_tensors(broken, poison)
    out = tmp_path / "x.tmlc"
    out.write_text("precious")
    tmlc_cli("compile", broken, "-o", out, "--force", code=2)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("signum", "code", "stage"),
    [(signal.SIGINT, 130, "packing weights"), (signal.SIGTERM, 143, "recording golden calls")],
)
def test_an_interrupt_at_any_stage_leaves_nothing(checkpoint, tmp_path, signum, code, stage):
    out = tmp_path / "new" / "x.tmlc"
    out.parent.mkdir()
    program = (
        "import os, sys, signal, threading\n"
        "import tmlc.cli.common as common, contextlib\n"
        "@contextlib.contextmanager\n"
        "def progress(quiet):\n"
        "    def report(stage, done, total):\n"
        f"        if stage == {stage!r}: os.kill(os.getpid(), {int(signum)})\n"
        "    yield report\n"
        "common.progress = progress\n"
        "from tmlc.cli.main import main\n"
        f"sys.argv = ['tmlc', 'compile', {str(checkpoint)!r}, '-o', {str(out)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "stopped before it was done" in done.stderr and "Traceback" not in done.stderr
    assert tree(tmp_path) == ["new"]


def test_ctrl_c_from_outside_leaves_nothing(checkpoint, tmp_path):
    command = [sys.executable, "-m", "tmlc.cli.main", "compile", str(checkpoint), "-o", str(tmp_path / "x.tmlc")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process.stderr.readline()  # the first line of progress: work has begun
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "Traceback" not in rest
    assert tree(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmlc_cli, checkpoint, tmp_path):
    """Writes into a limited file size, which the system reports like a full disk where the package is concerned."""
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from tmlc.cli.main import main\n"
        f"sys.argv = ['tmlc', 'compile', {str(checkpoint)!r}, '-o', {str(tmp_path / 'x.tmlc')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    error = done.stderr[done.stderr.index("error: ") :]
    assert done.returncode == 2 and len(error.rstrip("\n").split("\n")) == 2, done.stderr
    assert tree(tmp_path) == []


def test_a_level_is_the_targets_pipeline_cut_down_and_compiles(tmlc_cli, checkpoint, tmp_path):
    names = {}
    for level in ("O0", "O1", "O2"):
        text = tmlc_cli("compile", checkpoint, "--print-pipeline", "--preset", level).stdout
        names[level] = [step["pass"] for step in yaml.safe_load(text)]
    assert len(names["O0"]) < len(names["O1"]) < len(names["O2"])
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--preset", "O0", "--check", "--json")
    tmlc_cli("verify", tmp_path / "x.tmlc", "--json")
