"""What measures engines on a GPU: its steps on a device in host memory (their times mean nothing here), its way with
steps that fail, hang or lose the device, and what it says of results."""

import contextlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tmlc.errors import TargetError, UsageError
from tmlc.kernels.triton.launch import Variant
from tmlc.kernels.triton.variants import Compiled, compile_variant
from tmlc.pipeline.pipeline import load_pipeline

#: A variant that compiles in a second.
CHEAP = ("advance_kernel", (), ("*i64:16", "*i64:16", "*i32:16"), 4, 1, 90)
GPU = Path(__file__).parents[2] / "perf/gpu"


@pytest.mark.slow
def test_every_step_of_the_command_runs_in_a_rehearsal(tmp_path):
    """The very command, in processes of its own, on a device in host memory; the second time there is nothing to do."""
    out, work = tmp_path / "r.json", tmp_path / "work"
    command = [sys.executable, str(GPU / "run.py"), "--rehearse", "--out", str(out), "--work", str(work)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    steps = json.loads(out.read_text())["steps"]
    assert {job: [name for name, row in found.items() if "error" in row] for job, found in steps.items()} == {
        "tiny bf16": [], "tiny pytorch": [],
    }  # fmt: skip
    own = steps["tiny bf16"]
    assert own["golden"]["passed"] and own["bits"]["passed"] and own["build"]["spilled"] == 0
    for name in ("cpu", "reference"):
        row = own[name]
        assert row["finite"] and row["positions_beyond"] == 0 and row["max_error"] < row["spread"]
    kernels = own["kernels"]["rows"]
    assert {row["method"] for row in kernels} == {row["method"] for row in own["graphs"]["rows"]}
    assert all(row["seconds"] > 0 and row["count"] > 0 for row in kernels)
    products = [row for row in kernels if row["kernel"] in ("linear_kernel", "moe_gate_up_kernel")]
    assert products and all(row["bytes"] > row["weight_bytes"] > 0 for row in products)
    assert any(row["copies"] > 1 for row in products), "weights that stay in a cache would be timed"
    shares = {row["expert_share"] for row in kernels if row["method"] == "decode" and "moe" in row["kernel"]}
    assert shares == {3 / 7}, "one position reads two experts of six, and the shared one"
    assert {row["chain"] for row in own["chains"]["rows"]} == {"listen", "listen_text", "write", "speak", "rest"}
    assert 0 < own["chains"]["tick_floor_ms"]["silent"] < own["chains"]["tick_floor_ms"]["speaking"]
    assert own["ticks"]["ticks"] == 1 and own["ticks"]["device_bytes_grown"] == 0
    # The grouped product of PyTorch wants rows of whole 16 bytes, which the tiny model has not; the file says so.
    ways = steps["tiny pytorch"]["experts, 1 row"]
    assert ways["eager"]["eager"] > 0 and "16 bytes" in ways["grouped_mm"]["error"]
    before = out.read_text()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert json.loads(out.read_text())["steps"] == json.loads(before)["steps"]


@pytest.mark.slow
def test_an_engine_whose_check_failed_is_built_without_each_pass_in_a_rehearsal(perf, tmp_path):
    """A failure is written into the results of an engine where fuse.norm_attention alone found something: the engine
    without it is built and checked, and its bits are found to be those of the engine with it."""
    out, work = tmp_path / "r.json", tmp_path / "work"
    command = [sys.executable, str(GPU / "run.py"), "--rehearse", "--out", str(out), "--work", str(work)]
    job, other = "tiny bf16", "tiny bf16-fuse.norm_attention"
    first = [*command, "--job", job, "--step", "build", "--step", "bits"]
    assert subprocess.run(first, capture_output=True, check=False).returncode == 0
    results = perf.results.Results(out)
    built, bits = results.get(job, "build"), results.get(job, "bits")
    assert built["matches"]["fuse.norm_attention"] == 2 and bits["passed"]
    results.put(job, "build", {**built, "matches": {"fuse.norm_attention": 2}})
    results.put(job, "golden", {"passed": False})
    done = subprocess.run([*command, "--bisect", job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{job}: golden PASSES without fuse.norm_attention" in done.stdout
    steps = json.loads(out.read_text())["steps"]
    assert set(steps[other]) == {"build", "golden", "bits"} and steps[other]["build"]["matches"]["fuse.norm_linear"]
    assert "fuse.norm_attention" not in steps[other]["build"]["matches"]
    assert steps[other]["bits"]["digest"] == bits["digest"]


class Sums:
    """An engine whose hidden states are a session's running sum; where it has company, `off` is added to the first."""

    def __init__(self, off):
        self.off, self.sums = off, []
        self.model = SimpleNamespace(vocab=50, chunk=8, width=4)
        self.slots = SimpleNamespace(handle=int, memory=SimpleNamespace(read=lambda k: self.sums[k].tobytes()))
        self.backend, self.device = self, contextlib.nullcontext

    def session(self):
        self.sums.append(np.zeros(4))
        return Summed(self, len(self.sums) - 1)

    def call(self, method, parts, inputs):
        rows, at = inputs[0].copy(), 0
        for n, slot in parts:
            for row in rows[at : at + n]:
                self.sums[slot] += row
                row[:] = self.sums[slot]
            at += n
        rows[0] += self.off * (len(parts) > 1)
        return [rows]


class Summed(contextlib.AbstractContextManager):
    def __init__(self, engine, index):
        self.engine, self.index = engine, index

    def append(self, tokens, logits):
        for token in tokens:
            self.engine.sums[self.index] += token

    def close(self):
        pass

    def __exit__(self, *_):
        self.close()


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_a_wrong_bit_is_found(perf, off):
    """One session's hidden state changed where it is in company."""
    found = perf.checks.bits(Sums(off), [5, 2])
    assert found["passed"] == (off == 0) and found["states"] == [True, True] and found["hidden"] == [off == 0, True]


def test_logits_that_took_another_expert_are_counted_and_a_nan_is_not_close(perf):
    wanted = np.random.default_rng(0).standard_normal((10, 8))
    found = wanted.astype(np.float32)
    found[3] += 1
    row = perf.checks.difference(found, wanted, 1e-2)
    assert row["positions_beyond"] == 0.1 and row["max_error"] == pytest.approx(1, rel=1e-3) and row["finite"]
    found[4, 0] = np.nan
    row = perf.checks.difference(found, wanted, 1e-2)
    assert not row["finite"] and row["positions_beyond"] == 0.2


# The command.

CHILD = '''
import json, os, sys, time
sys.path.insert(0, {folder!r})
from results import Results
given = json.loads(sys.argv[sys.argv.index("--process") + 1])
results = Results(__import__("pathlib").Path(sys.argv[sys.argv.index("--out") + 1]))
for step in given["steps"]:
    print("step", step, flush=True)
    what = {script!r}.get(step, "")
    if what == "hangs":
        time.sleep(60)
    if what == "dies":
        os.kill(os.getpid(), 9)
    results.put(given["job"], step, {{"error": "lost"}} if what == "loses" else {{"pid": os.getpid()}})
    if what == "loses":
        sys.exit(4)
'''


@pytest.fixture
def command(perf, tmp_path, monkeypatch):
    """Runs the command with a child that does what a script says of its steps: (exit code, results, lines)."""
    monkeypatch.setattr(perf.command, "device", lambda: (90, ""))
    monkeypatch.setattr(perf.command, "machine", dict)

    def run(script, *more):
        child = tmp_path / "child.py"
        child.write_text(CHILD.format(folder=str(GPU), script=script))
        monkeypatch.setattr(perf.command, "RUN", child)
        lines = []
        words = ["--out", str(tmp_path / "out.json"), "--work", str(tmp_path), "--job", "nano bf16", *more]
        chosen = perf.command.parser().parse_args(words)
        code = perf.command.Run(chosen, lines.append).all()
        return code, json.loads((tmp_path / "out.json").read_text())["steps"].get("nano bf16", {}), lines

    monkeypatch.setattr(perf.command, "claims", lambda results: [])
    return run


def test_steps_that_hang_die_or_lose_the_device_are_told_and_the_others_run(perf, command, tmp_path, monkeypatch):
    monkeypatch.setitem(perf.steps.ENGINE_STEPS, "golden", 0.4)
    code, found, lines = command({"golden": "hangs", "bits": "dies", "kernels": "loses"})
    assert code == 1 and list(found) == list(perf.steps.ENGINE_STEPS)
    errors = {name: row["error"] for name, row in found.items() if "error" in row}
    assert errors == {"golden": "it took more than 0.4 s", "bits": "its process ended with -9", "kernels": "lost"}
    assert len({row["pid"] for row in found.values() if "pid" in row}) == 3  # a new process behind each
    assert any("FAILED nano bf16, golden" in line for line in lines)
    (tmp_path / "nano-bf16-sm90.tmlc").touch()
    done = {name: row["pid"] for name, row in found.items() if "pid" in row}
    code, found, _ = command({})  # again: what failed, and nothing else
    assert code == 0 and not any("error" in row for row in found.values())
    assert {name: found[name]["pid"] for name in done} == done and len({found[name]["pid"] for name in errors}) == 1


def test_time_that_is_over_leaves_the_rest_to_another_command(perf, command, monkeypatch):
    """Also the step that was under way, which is to blame for nothing."""
    monkeypatch.setattr(perf.command, "GRACE", 0.0)
    code, found, lines = command({"load": "hangs"}, "--seconds", "3")
    assert code == 3 and list(found) == ["build"] and "left for another command: nano bf16, load" in lines[-1]
    assert command({"load": "hangs"}, "--seconds", "-1")[0] == 3


def test_what_cannot_be_built_or_loaded_is_not_tried_step_by_step(command):
    code, found, lines = command({"load": "dies"})
    assert code == 3 and list(found) == ["build", "load"] and "left for another command" in lines[-1]


def test_a_package_that_is_gone_is_built_again_for_the_steps_that_are_left(command, tmp_path):
    command({}, "--step", "build", "--step", "load")
    _, before, _ = command({}, "--step", "load")
    _, found, _ = command({}, "--step", "golden")
    assert before["build"] != found["build"] and before["load"] == found["load"]
    (tmp_path / "nano-bf16-sm90.tmlc").touch()
    _, again, _ = command({}, "--step", "bits")
    assert again["build"] == found["build"] and set(again) == {"build", "load", "golden", "bits"}


def test_without_a_gpu_the_engines_are_built_and_nothing_is_said_to_have_run(perf, command, monkeypatch):
    monkeypatch.setattr(perf.command, "device", lambda: (0, "this machine has no NVIDIA driver"))
    code, found, lines = command({}, "--sm", "100")
    assert code == 1 and list(found) == ["build"] and "built for sm100, and nothing was run" in lines[-2]


def test_results_of_another_version_are_not_gone_on_with(perf, tmp_path):
    (tmp_path / "old.json").write_text('{"engines": []}')
    with pytest.raises(ValueError, match="write to another file"):
        perf.results.Results(tmp_path / "old.json")


# Jobs without some passes.


def test_the_name_of_a_job_says_which_passes_it_has(perf):
    parse = perf.jobs.Job.parse
    for name in ("small bf16", "tml-small-276b fp8+overlap", "nano bf16+overlap-fuse.norm_pair-fuse.steps",
                 "tiny pytorch"):  # fmt: skip
        assert parse(name).name == name
    job = parse("nano bf16+overlap-fuse.norm_pair-fuse.steps")
    assert job.plain.name == "nano bf16-fuse.norm_pair-fuse.steps" and job.whole.name == "nano bf16+overlap"
    whole = [step.name for step in load_pipeline("triton").steps]
    assert [step.name for step in parse("nano bf16").pipeline().steps] == whole
    left = [name for name in whole if name not in job.without]
    left.insert(left.index("memory.buckets"), "memory.overlap")
    assert [step.name for step in job.pipeline().steps] == left


@pytest.mark.parametrize(("words", "said"), [
    (["--job", "small"], "names no job"),
    (["--job", "small bf16-"], "names no job"),
    (["--job", "small bf16-fuse.steps+overlap"], "names no job"),
    (["--job", "small pytorch-fuse.steps"], "names no job"),
    (["--job", "small bf16-fuse.nothing"], "the Triton pipeline has no pass fuse.nothing (small bf16-fuse.nothing)"),
    (["--job", "small bf16-state.insert"], "no engine can do without state.insert"),
    (["--bisect", "small pytorch"], "small pytorch is no engine"),
    (["--bisect", "small bf16", "--step", "bits"], "--bisect chooses jobs and steps itself"),
])  # fmt: skip
def test_jobs_that_are_none_are_refused_before_anything_is_built(perf, capsys, tmp_path, words, said):
    with pytest.raises(SystemExit) as ended:
        perf.command.main([*words, "--work", str(tmp_path / "work")])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_what_may_be_left_out_is_told_exact_or_not(perf):
    """docs/passes.md is what claims of bits stand on."""
    known = perf.jobs.exact()
    assert {"fuse.steps", "fuse.norm_pair", "fuse.conv", "route.select_kernel"} <= known
    inexact = {"fuse.norm_linear", "fuse.norm_router", "fuse.norm_topk_router", "quantize.fp8", "route.stack_experts"}
    assert not known & inexact


BISECTED = """
import json, sys
sys.path.insert(0, {folder!r})
from results import Results
given = json.loads(sys.argv[sys.argv.index("--process") + 1])
results = Results(__import__("pathlib").Path(sys.argv[sys.argv.index("--out") + 1]))
matches = {{"fuse.steps": 3, "fuse.norm_pair": 2, "fuse.norm_linear": 1, "fuse.conv": 0, "fuse.head": 1}}
right = {right!r}
for step in given["steps"]:
    print("step", step, flush=True)
    passed = step != "golden" or any(all("-" + left in given["job"] for left in some) for some in right)
    row = {{"matches": matches, "spilled": 0}} if step == "build" else {{"passed": passed, "digest": "same"}}
    results.put(given["job"], step, row)
"""


@pytest.mark.parametrize(("right", "said"), [
    ([["fuse.norm_pair"]], "golden: at fault, or what it hands to: fuse.norm_pair"),
    ([["fuse.norm_pair", "fuse.norm_linear"]], "golden: more than one of these passes is at fault"),
    ([], "golden: none of these passes alone is at fault: look at the kernels that all of them use"),
    ([[]], "golden and bits pass: nothing to look for"),
])  # fmt: skip
def test_a_pass_that_is_at_fault_is_found(perf, tmp_path, monkeypatch, right, said):
    """Among those of level 2 that found something to rewrite; checks are run, and nothing is timed."""
    monkeypatch.setattr(perf.command, "device", lambda: (90, ""))
    monkeypatch.setattr(perf.command, "machine", dict)
    child, out, lines = tmp_path / "child.py", tmp_path / "out.json", []
    child.write_text(BISECTED.format(folder=str(GPU), right=right))
    monkeypatch.setattr(perf.command, "RUN", child)
    words = ["--out", str(out), "--work", str(tmp_path), "--bisect", "nano bf16+overlap"]
    perf.command.Run(perf.command.parser().parse_args(words), lines.append).all()
    assert f"nano bf16+overlap: {said}" in lines
    steps = json.loads(out.read_text())["steps"]
    passes = ("fuse.norm_pair", "fuse.steps", "fuse.norm_linear")  # of level 2, in the pipeline's order
    left = [] if right == [[]] else ["-" + "-".join(passes), *("-" + name for name in passes)]
    assert list(steps) == ["nano bf16+overlap", *("nano bf16+overlap" + name for name in left)]
    assert all(list(found) == ["build", "golden", "bits"] for found in steps.values())


def test_an_engine_without_a_pass_is_told_beside_the_one_with_it(perf, tmp_path):
    """The same bits are wanted where the pass is exact and the others found the same to rewrite."""
    results = perf.results.Results(tmp_path / "r.json")
    jobs = ("small bf16", "small bf16-fuse.norm_pair", "small bf16-fuse.steps", "small bf16-fuse.norm_linear")
    for number, job in enumerate(jobs):
        matches = {"fuse.steps": 5, "fuse.norm_pair": 2, "fuse.norm_linear": 4}
        for left in job.split("-")[1:]:
            del matches[left]
        if job.endswith("steps"):
            matches["fuse.norm_linear"] = 1  # it makes norms that the other takes
        results.put(job, "build", {"spilled": 0, "matches": matches})
        results.put(job, "bits", {"passed": True, "digest": "same" if number < 2 else job})
        graph = {"method": "decode", "bucket": "b1n1", "of_floor": 0.1, "kernels_alone": None}
        results.put(job, "graphs", {"rows": [{**graph, "seconds": 1e-4 * (2 + number)}]})
        chain = {"sessions": 1, "host_gap_seconds": 1e-5, "seconds": 2e-3, "of_floor": 0.5, "launches": 500}
        ms = {"silent": 2.0 + number}
        results.put(job, "chains", {"rows": [chain], "tick_floor_ms": {"silent": 1.0}, "tick_ms": ms})
    said = {(row["job"], row["claim"]): (row["value"], row["met"]) for row in perf.claims.claims(results)}
    bits = {key: value for key, value in said.items() if "with and without" in key[1]}
    assert bits == {(jobs[1], "the same bits with and without fuse.norm_pair"): (True, True)}
    assert said[jobs[3], "decode of one position without fuse.norm_linear over one with"] == (2.5, None)
    assert said[jobs[1], "a silent tick without fuse.norm_pair over one with"] == (1.5, None)
    results.put(jobs[1], "bits", {"passed": True, "digest": "other"})
    said = {(row["job"], row["claim"]): (row["value"], row["met"]) for row in perf.claims.claims(results)}
    assert said[jobs[1], "the same bits with and without fuse.norm_pair"] == (False, False)
    assert said[jobs[1], "a silent tick, part of its floor"] == (1 / 3, None), "times of whole engines only are judged"


# What it says.


def test_claims_are_told_from_the_results_alone(perf, tmp_path):
    results = perf.results.Results(tmp_path / "r.json")
    one = {"method": "decode", "bucket": "b1n1", "count": 2}
    products = [
        {**one, "kernel": "moe_gate_up_kernel", "seconds": 1e-6, "of_floor": 0.8},
        {**one, "kernel": "moe_down_sum_kernel", "seconds": 3e-6, "of_floor": 0.4},
        {**one, "kernel": "linear_kernel", "seconds": 1e-6, "of_floor": 0.9},
        {**one, "method": "speak", "kernel": "linear_kernel", "seconds": 1.0, "of_floor": 0.01},
    ]
    chain = {"sessions": 1, "host_gap_seconds": 1e-5, "seconds": 2e-3, "of_floor": 0.5, "launches": 500}
    for step, row in {
        "build": {"spilled": 0}, "golden": {"passed": True}, "bits": {"passed": False},
        "cpu": {"finite": True, "positions_beyond": 0.1, "tolerance": 0.01, "cpu_precision": "bf16"},
        "kernels": {"rows": products},
        "graphs": {"rows": [{**one, "of_floor": 0.5, "seconds": 2e-5, "kernels_alone": 1e-5}]},
        "chains": {"rows": [chain, {"sessions": 4}], "tick_floor_ms": {"silent": 1.0}, "tick_ms": {"silent": 1.6}},
        "ticks": {"ticks": 10_000, "device_bytes_grown": 0, "host_bytes_grown": 4096, "last_tenth_over_first": 1.0},
    }.items():  # fmt: skip
        results.put("small bf16", step, row)
    results.put("small pytorch", "experts, 1 row", {"grouped_mm": {"eager": 4e-5, "graph": 7e-6}})
    said = {row["claim"]: (row["value"], row["met"]) for row in perf.claims.claims(results)}
    assert said["experts: kernels of one position, part of their floor"] == (pytest.approx(0.5), False)
    assert said["linear: kernels of one position, part of their floor"] == (pytest.approx(0.9), True)
    assert said["PyTorch's grouped_mm (graph) over the experts' kernels"] == (pytest.approx(1.75), True)
    assert said["PyTorch's grouped_mm (eager) over the experts' kernels"] == (pytest.approx(10), None)
    assert said["a silent tick, part of its floor"] == (pytest.approx(0.625), True)
    assert said["a launch beyond its weights, microseconds"] == (pytest.approx(2), None)
    assert said["logits and the CPU engine: positions beyond"] == (0.1, False)
    assert said["graph of decode over its kernels by themselves"] == (pytest.approx(2), False)
    assert said["the same bits alone, in company and cut otherwise"] == (False, False)
    assert said["device memory grown, bytes"] == (0, True)
    results.body["steps"]["nano bf16"] = results.body["steps"].pop("small bf16")
    said = {row["claim"]: (row["target"], row["met"]) for row in perf.claims.claims(results)}
    assert said["a silent tick, part of its floor"] == ("", None), "a model that fits into a cache has no such floor"
    assert said["the same bits alone, in company and cut otherwise"] == ("all", False)
    json.dumps(perf.claims.claims(results))


def test_machine_code_of_another_tool_chain_is_brought_along(perf, tmp_path, monkeypatch):
    """Made in one cache, found in another whose Triton is another; not where the kernels have changed."""
    from tmlc.emit.triton import build

    variant = Variant(*CHEAP)
    made = Compiled(b"machine code", "advance_kernel", 4, 0, 20, 0, 2)

    def plan(preset, target, precision, pipeline):
        assert "fuse.norm_pair" not in [step.name for step in pipeline.steps] and len(pipeline.steps) > 10
        build._keep(variant, made)
        return {"variants": 1, "spills": {}}

    monkeypatch.setenv("TMLC_CACHE", str(tmp_path))
    monkeypatch.setattr(perf.brought, "plan_on_meta", plan)
    perf.brought.make(tmp_path / "made", [perf.jobs.Job.parse("nano bf16-fuse.norm_pair")], 90, lambda line: None)
    assert len(list((tmp_path / "made").iterdir())) == 2
    monkeypatch.setenv("TMLC_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(build, "toolchain", lambda: "another Triton, and another Python")
    assert build._cached(variant) is None
    assert perf.brought.bring(tmp_path / "made")["sm"] == 90 and build._cached(variant) == made
    monkeypatch.setattr(perf.brought, "sources", lambda: "others")
    with pytest.raises(UsageError, match="the kernels have changed since"):
        perf.brought.bring(tmp_path / "made")
    with pytest.raises(UsageError, match="holds no machine code"):
        perf.brought.bring(tmp_path)


def test_pytorch_without_a_gpu_says_what_to_do(perf, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match="sees no GPU") as caught:
        perf.steps.Torch("nano", SimpleNamespace(rehearse=False)).run("linear, 1 row")
    assert caught.value.where == f"PyTorch {torch.__version__}" and "--rehearse" in caught.value.fix


@pytest.mark.slow
def test_pytorch_beside_it_runs_the_sizes_of_the_model(perf, monkeypatch):
    monkeypatch.setattr(perf.peers, "ROTATED", 1)
    made = perf.peers.linear(32, 16, 2, 1, device="cpu")
    assert made["eager"]["eager"] > 0 and made["compile"]["eager"] > 0
    pytest.importorskip("transformers", reason="needs transformers")
    made = perf.peers.experts(16, 8, 4, 2, 3, 1, device="cpu")
    assert all(made[way]["eager"] > 0 for way in ("eager", "batched_mm", "grouped_mm", "grouped_mm, compiled"))


def test_kernels_compile_where_tmlc_is_not_installed(tmp_path):
    """An environment that has the libraries and not tmlc, as a lent machine's is, started in the checkout's folder: the
    processes that compile a kernel find tmlc, too, and make the same machine code."""
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment/bin/python"
    (tmp_path / "script.py").write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(GPU)!r})
import bare
assert "numpy" not in bare.missing() and not bare._there("tmlc")
bare.prepare(pathlib.Path({str(tmp_path / "rooms")!r}))
import tmlc.package.reader, tmlc.runtimes.cuda.chains, tmlc.kernels.triton.tuning as tuning
from tmlc.emit.triton.build import build_variants
from tmlc.kernels.triton.launch import Variant
tuning.table()
(made,) = build_variants([Variant(*{(*CHEAP,)!r})], jobs=1).values()
print(tuning.__file__, made.digest)
""")
    environment = {**os.environ, "PYTHONPATH": str(Path(np.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1",
                   "TMLC_CACHE": str(tmp_path / "cache")}  # fmt: skip
    command = [python, tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=GPU.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    file, digest = done.stdout.split()
    assert file.startswith(str(tmp_path / "rooms")) and digest == compile_variant(Variant(*CHEAP)).digest
