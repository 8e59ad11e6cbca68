"""`--target triton:...`: names, buckets, the package that comes out, machine code that is the same everywhere."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import triton
from click.testing import CliRunner
from random_models import random_model
from released import MODELS, write
from triton import knobs

import tmlc
from tmlc.cli.main import cli
from tmlc.emit.targets import find_target
from tmlc.emit.triton import build
from tmlc.emit.triton.host_device import HostDevice
from tmlc.emit.triton.plan import least_driver
from tmlc.emit.triton.target import spills
from tmlc.emit.triton.weights import stored_weights
from tmlc.errors import REPORT, EmitError, KernelError, PipelineError, TargetError, UsageError
from tmlc.ir.program import Fact, Method, Program
from tmlc.kernels.triton import variants, versions
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.launch import Variant
from tmlc.kernels.triton.layouts import unpack
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.model_zoo.interaction.config import PRESETS
from tmlc.package.reader import open_package
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.pipeline.registry import get_pass
from tmlc.report.gpu_plan import plan_on_meta
from tmlc.runtimes.cuda import nvidia
from tmlc.runtimes.cuda.driver import DeviceInfo
from tmlc.versions import release


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("triton", r"needs an architecture.*\n  Write triton:sm90, or several: triton:sm80\+sm90"),
        ("triton:sm91", "unknown architecture 'sm91'"),
        ("triton:sm90,sm80", "unknown architecture"),
        ("triton:sm90+", "needs an architecture|unknown"),
    ],
)
def test_a_name_that_is_no_target_is_one_clear_error(name, match):
    with pytest.raises(TargetError, match=match):
        find_target(name)


def test_architectures_are_sorted_and_once():
    assert find_target("triton:sm120+sm80+sm80").architectures == (80, 120)


def test_a_precision_that_the_kernels_have_not_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="no precision fp16"):
        tmlc.compile(tiny.checkpoint, tmp_path / "x", target="triton:sm90", precision="fp16")


def test_an_fp8_package_says_what_a_reader_must_know(tiny, lab, tmp_path):
    out = lab.compile(tiny.checkpoint, tmp_path / "fp8.tmlc", "fp8")
    with open_package(out) as held:
        assert held.manifest.targets["triton:sm90"].precision == "fp8"
        assert "weights.rows.fp8" in held.manifest.required_features
        scales = {name: entry for name, entry in held.tensors.items() if name.endswith(".scales")}
        assert scales and {entry.dtype for entry in scales.values()} == {"f32"}
        assert {held.tensors[name.removesuffix(".scales")].dtype for name in scales} == {"u8"}


def test_every_architecture_takes_fp8(tiny, tmp_path, monkeypatch):
    """The kernels take codes apart with integers, so that sm80, which has no e4m3 instructions, has them too."""
    monkeypatch.setattr(versions, "OLDEST", {})  # nothing is compiled
    name = "triton:" + "+".join(f"sm{sm}" for sm in ARCHITECTURES)
    done = tmlc.compile(tiny.checkpoint, tmp_path / "x", target=name, precision="fp8", dry_run=True)
    assert done.precision == "fp8" and all(row.kernel for row in done.coverage) and not (tmp_path / "x").exists()


def test_without_triton_the_error_names_the_command_that_installs_it():
    code = "import sys; sys.modules['triton'] = None\nimport tmlc.emit.targets as t\nt.find_target('triton:sm90')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "target triton needs Triton, which is not installed" in done.stderr
    assert "pip install 'tmlc[triton]'" in done.stderr


def buckets(max_n, **settings):
    chosen = get_pass("memory.buckets")
    from torch import fx

    from tmlc.ir.dims import Dim
    from tmlc.ir.types import TensorType

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(role=("input", "x"), type=TensorType("f32", (Dim(1), 1024)))
    graph.output((x,))
    program = Program({"m": Method("m", graph, max_n)}, None, facts=frozenset({Fact.STATEFUL}))
    chosen(chosen.Config(**settings)).run(program, None)
    return program.meta["buckets"]["m"]


def test_buckets_are_the_pairs_whose_rows_fit():
    assert buckets(64, batch=[1, 4], positions=[1, 16], rows=64) == [[1, 1], [1, 16], [1, 64], [4, 1], [4, 16]]
    assert buckets(6, batch=[1], positions=[1, 4, 16]) == [[1, 1], [1, 4], [1, 6]]
    assert buckets(1, batch=[1, 2], positions=[1, 4]) == [[1, 1], [2, 1]]
    assert buckets(4096, batch=[1, 2], positions=[1, 4], rows=4) == [[1, 1], [1, 4], [2, 1]]


def test_buckets_stay_below_the_bytes_that_calls_may_move():
    """8 KB a position here."""
    assert buckets(512, batch=[1, 64], positions=[1, 64], rows=4096, megabytes=1) == [[1, 1], [1, 64], [64, 1]]


@pytest.mark.parametrize("settings", [{"batch": [2]}, {"positions": [4, 1]}, {"batch": [1, 8192]}])
def test_sizes_that_are_no_list_from_one_are_refused(settings):
    with pytest.raises(PipelineError, match=r"memory\.buckets"):
        buckets(8, **settings)


def test_inspect_counts_the_launches_of_each_methods_smallest_bucket(tiny, parsed):
    shown = CliRunner().invoke(cli, ["inspect", str(tiny.gpu), "--json"])
    assert shown.exit_code == 0, shown.stderr
    counts, code = json.loads(shown.stdout)["op_counts"]["triton:sm90"], json.loads(parsed.code)
    kernels = [variant["kernel"] for variant in code["variants"]]
    assert set(counts) == set(code["code"])
    for name, found in counts.items():
        assert found == Counter(kernels[launch[0]] for launch in code["code"][name]["b1n1"])
    assert "linear_kernel" in CliRunner().invoke(cli, ["inspect", str(tiny.gpu)]).stdout


def test_verify_without_a_gpu_says_what_it_did_and_what_it_could_not(tiny, tmp_path, monkeypatch):
    def no_driver():
        raise TargetError("this machine has no NVIDIA driver", where="cuda runtime", fix="use another machine")

    monkeypatch.setattr(nvidia, "NvidiaDriver", no_driver)
    told = CliRunner().invoke(cli, ["verify", str(tiny.gpu)])
    assert told.exit_code == 2 and not told.stdout
    assert "every byte is as it was written, but the recorded calls were not replayed: this machine" in told.stderr
    altered = bytearray(tiny.gpu.read_bytes())
    with open_package(tiny.gpu) as package:
        altered[package.place("weights.safetensors")[1] + 4096] ^= 1
    (tmp_path / "altered.tmlc").write_bytes(altered)
    told = CliRunner().invoke(cli, ["verify", str(tmp_path / "altered.tmlc")])
    assert told.exit_code == 2 and "altered or damaged" in told.stderr and "every byte" not in told.stderr


def test_a_dry_run_refuses_the_sizes_that_compiling_refuses(tmp_path):
    """Not only ops that have no kernel: a head of 288 columns is known to be too wide when the call is lowered."""
    random_model("llama", 1, num_attention_heads=1, num_key_value_heads=1, head_dim=288).save_pretrained(tmp_path / "x")
    words = ["compile", str(tmp_path / "x"), "--target", "triton:sm80+sm90", "--dry-run", "--json"]
    told = CliRunner().invoke(cli, words)
    refused = [row for row in json.loads(told.stdout)["coverage"] if row["kernel"] is None]
    assert told.exit_code == 1 and {row["method"] for row in refused} == {"decode"}
    assert all("heads of 288 columns" in row["reason"] and "up to 256" in row["fix"] for row in refused)
    assert all(" at modeling_llama.py:" in row["source"] for row in refused)
    with pytest.raises(EmitError, match="heads of 288 columns"):
        tmlc.compile(tmp_path / "x", tmp_path / "x.tmlc", target="triton:sm90")
    assert not (tmp_path / "x.tmlc").exists()


def test_a_package_for_two_architectures_holds_a_plan_for_each(tiny, lab, tmp_path):
    lab.compile(tiny.checkpoint, tmp_path / "two.tmlc", "bf16", "triton:sm80+sm90")
    with open_package(tmp_path / "two.tmlc") as held:
        assert list(held.manifest.targets) == ["triton:sm80+sm90"]
        assert {"triton.plan.v1", "weights.rows"} <= set(held.manifest.required_features)
        assert held.json("engines/triton/plan.json")["architectures"] == ["sm80", "sm90"]
        for sm in (80, 90):
            code = held.json(f"engines/triton/sm{sm}/code.json")
            assert code["driver"] == 12000, "these stand for machine code and name no assembler"
            assert {v["file"] for v in code["variants"]} == {
                name for name in held.names() if name.startswith(f"engines/triton/sm{sm}/") and name.endswith(".cubin")
            }


def test_the_same_checkpoint_gives_the_same_package(tiny, lab, tmp_path):
    assert lab.compile(tiny.checkpoint, tmp_path / "again.tmlc").read_bytes() == tiny.gpu.read_bytes()


@pytest.mark.parametrize(("scheme", "k"), [("i8g32", 40), ("i4g32", 96), ("i4g64", 70), ("f8g128", 200)])
def test_stored_codes_are_the_values_of_the_weight(scheme, k):
    import torch

    from tmlc.ir.weights import WeightMap

    weights = WeightMap()
    weights.source("w.float", "f32", (3, 5, k))
    weights.quantize("w", "w.float", scheme)
    source = {"w.float": torch.randn(3, 5, k, generator=torch.Generator().manual_seed(1))}
    stored = stored_weights(Program({}, weights), ["w"])
    parts = [np.concatenate([p.reshape(-1).view(np.uint8) for p in s.pieces(source["w.float"])]) for s in stored]
    floats = scheme == "f8g128"
    wide = [4 if s.dtype == "f32" else 1 for s in stored]
    assert [p.nbytes for p in parts] == [s.rows * s.cols * size for s, size in zip(stored, wide, strict=True)]
    assert [s.dtype for s in stored] == ["u8", "f32" if floats else "u8", "u8"][: len(stored)]
    codes, scales, *zeros = (p.reshape(15, -1) for p in parts)
    have = unpack(scheme, [codes, scales.view(np.float32 if floats else np.float16), *zeros], k)
    assert np.abs(have - weights.evaluate("w", source).reshape(15, k).numpy()).max() < 1e-6


def test_what_a_plan_for_a_gpu_cannot_hold_is_refused_with_what_to_do():
    from torch import fx

    from tmlc.emit.triton.arena import _Buffer, _check
    from tmlc.ir.weights import WeightMap

    weights = WeightMap()
    weights.source("w", "i8", (3, 5))
    with pytest.raises(EmitError, match="weight w is i8") as caught:
        stored_weights(Program({}, weights), ["w"])
    assert caught.value.fix == "use f32, bf16, f8g128, i8g32, i4g32, i4g64"
    method = Method("decode", fx.Graph(), 4)
    _check(method, [_Buffer(64, 0, 1, 0), _Buffer(64, 1, 2, 64)])
    with pytest.raises(EmitError, match="share bytes") as caught:
        _check(method, [_Buffer(64, 0, 1, 0), _Buffer(64, 1, 2, 63)])
    assert caught.value.where == "method decode, arena of the Triton plan" and caught.value.fix == REPORT


def test_a_device_in_host_memory_says_what_to_do_where_a_gpu_would_not(machine):
    device = HostDevice(machine, {}, DeviceInfo("a device", 90, 12080))
    for asked, fix in (
        (lambda: device.load(b"", "kernel", 0), "HostDevice.of this very package"),
        (lambda: device.zero(64, 4), "on a GPU"),
    ):
        with pytest.raises(KernelError) as caught:
            asked()
        assert fix in caught.value.fix and caught.value.where == "host device"
    device.close()
    with pytest.raises(KernelError, match="closed") as caught:
        device.allocate(4)
    assert caught.value.fix == "make another with HostDevice.of"


def some_variants(count=2):
    """A few of the kernels that every model has."""
    from tmlc.kernels.triton.bucket import Bucket
    from tmlc.kernels.triton.launch import Operand
    from tmlc.kernels.triton.registry import Call, lower

    x, out = (Operand(space, "f32", (1, 0), 64, 64, 0, "0") for space in ("input", "output"))
    table = Operand("weight", "f32", (0, 1), 64, 64, 0, "w", (64,))
    norm = lower(Call("rms_norm", {"x": x, "weight": table}, {"eps": 1e-6}, (out,), Bucket(1, 4), 90))
    add = lower(Call("add", {"a": x, "b": x}, {}, (out,), Bucket(1, 4), 90))
    return [launch.variant(90) for lowered in (norm, add) for launch in lowered.launches][:count]


def test_machine_code_is_the_same_in_other_processes_and_folders(tmp_path, monkeypatch):
    variants = some_variants()
    made = []
    for folder in ("here", "a much longer path/elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / folder))
        made.append(build.build_variants(variants, jobs=2))
    first, second = made
    for variant in variants:
        assert first[variant].cubin == second[variant].cubin and first[variant].cubin[:4] == b"\x7fELF"
        assert first[variant].registers > 0 and first[variant].spill_bytes == 0
        assert str(tmp_path).encode() not in first[variant].cubin
        assert os.fsencode(os.path.dirname(tmlc.__file__)) not in first[variant].cubin


def test_variants_are_kept_in_the_compile_cache_and_damage_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TMLC_CACHE", str(tmp_path))
    (variant,) = some_variants(1)
    first = build.build_variants([variant])
    (entry,) = (tmp_path / "triton").rglob("*.json")
    assert variant_key(variant) in entry.name

    def no_processes(*args, **named):
        raise AssertionError("a kernel was compiled")

    with monkeypatch.context() as patch:
        patch.setattr(build.subprocess, "Popen", no_processes)
        assert build.build_variants([variant]) == first
    body = json.loads(entry.read_text())
    entry.write_text(json.dumps(body | {"cubin": body["cubin"][:-8] + "AAAAAAA="}))
    assert build.build_variants([variant]) == first


def test_a_kernel_that_does_not_compile_is_named_and_stops_the_rest():
    (good,) = some_variants(1)
    bad = Variant(good.kernel, good.constexprs, (*good.signature[:-1], "*u8"), good.num_warps, good.num_stages, 90)
    with pytest.raises(EmitError, match=good.kernel) as caught:
        build.build_variants([bad, good], jobs=1)
    assert "“Versions of Triton”" in caught.value.fix


def test_a_child_that_is_killed_is_one_error_that_says_what_to_do(monkeypatch):
    """As the system does where memory ends. Ctrl-C, which reaches a whole process group, does not reach the child."""
    start, groups = build.subprocess.Popen, []

    def killed(command, **named):
        child = start([sys.executable, "-c", "import os; input(); os.kill(os.getpid(), 9)"], **named)
        groups.append((os.getpgid(child.pid), child.pid))
        return child

    monkeypatch.setattr(build.subprocess, "Popen", killed)
    monkeypatch.setattr(build, "_cached", lambda variant: None)
    with pytest.raises(EmitError, match="ended by signal 9") as caught:  # pytest tells of exceptions in threads, too
        build.build_variants(some_variants(), jobs=1)
    assert "more memory" in caught.value.fix and groups and all(group == child for group, child in groups)


@pytest.mark.parametrize("said", [None, "print(7)", "print('{}')"], ids=["does not start", "a number", "no kernel"])
def test_a_child_that_does_not_start_or_answers_anything_else_is_an_error(monkeypatch, said):
    """And whoever waits for the kernels hears of it."""
    start = build.subprocess.Popen

    def other(command, **named):
        if said is None:
            raise OSError(12, "Cannot allocate memory")
        return start([sys.executable, "-c", f"input(); {said}"], **named)

    monkeypatch.setattr(build.subprocess, "Popen", other)
    monkeypatch.setattr(build, "_cached", lambda variant: None)
    with pytest.raises(EmitError, match="Cannot allocate memory" if said is None else "compiles kernels") as caught:
        build.build_variants(some_variants(), jobs=2)
    assert caught.value.fix and "_kernel" in caught.value.where


def test_a_triton_that_makes_wrong_code_for_an_architecture_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(variants.triton, "__version__", "3.6.0")
    with pytest.raises(TargetError, match=r"Triton 3\.6\.0 makes wrong code for sm100") as caught:
        find_target("triton:sm90+sm100")
    assert "triton>=3.7" in caught.value.fix and find_target("triton:sm90+sm120").architectures == (90, 120)
    for sm in (100, 103):
        with pytest.raises(TargetError, match=f"wrong code for sm{sm}"):
            variants.compile_variant(replace(some_variants(1)[0], sm=sm))


def test_kept_machine_code_is_of_the_assembler_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv("TMLC_CACHE", str(tmp_path / "cache"))
    folders = []
    try:
        for release in (None, b"one", b"another"):
            if release is not None:
                (tmp_path / "ptxas").write_bytes(release)
                monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
            build.toolchain.cache_clear()
            folders.append(build.kept_folder())
    finally:
        build.toolchain.cache_clear()
    assert len(set(folders)) == 3


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_the_driver_that_a_package_asks_for_is_that_of_the_assembler(sm, monkeypatch):
    """The assemblers of the wheel one after the other. Below Blackwell the header of the machine code says the same,
    which CUDA 13 changed (ELF's OS/ABI, 0x33 before, 0x41 since)."""
    variant = replace(some_variants(1)[0], sm=sm)
    seen = set()
    for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
        monkeypatch.setenv("TRITON_PTXAS_PATH", tool.path)
        monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", tool.path)
        cubin = variants.compile_variant(variant).cubin
        major = int(tool.version.partition(".")[0])
        assert sm >= 100 or {0x33: 12, 0x41: 13}[cubin[7]] == major
        assert least_driver(sm, [cubin], False) == max(1000 * major, ARCHITECTURES[sm].driver)
        seen.add(major)
    assert seen == ({12, 13} if release(triton.__version__) >= (3, 7) else {12})


def test_launches_that_overlap_ask_for_a_driver_that_has_them_in_graphs():
    assert (least_driver(90, [b"\x7fELF"], False), least_driver(90, [b"\x7fELF"], True)) == (12000, 12030)
    assert least_driver(121, [b"\x7fELF"], True) == 12090


def test_a_triton_in_doubt_is_named_to_whoever_compiles():
    notes = versions.doubts((80, 90, 100, 103, 120), "3.7.1")
    assert [note.partition(":")[0] for note in notes] == ["Triton 3.7.1 for sm100", "Triton 3.7.1 for sm103"]
    assert all("compile with Triton 3.8 or newer" in note for note in notes)
    assert versions.doubts((80, 90, 100, 120), "3.10.0") == ()


def test_variants_that_spill_are_told_to_whoever_compiles():
    first, second = some_variants()
    fine = Compiled(b"", first.kernel, 4, 0, 40, 0, 2)
    assert spills({first: fine, second: fine}) == ()
    (note,) = spills({first: fine, second: replace(fine, spill_bytes=120)})
    assert note.startswith("1 of 2 kernel variants spill registers") and f"{second.kernel} on sm90 120 bytes" in note


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_kernel_of_every_preset_builds_without_spills(preset, precision):
    """In bf16 with overlapping launches too; weights on meta."""
    steps = load_pipeline("triton")
    overlapping = [steps.before("memory.buckets", "memory.overlap")] if precision == "bf16" else []
    for pipeline in (steps, *overlapping):
        view = plan_on_meta(preset, "triton:sm80+sm90+sm100", precision, pipeline=pipeline)
        assert view["variants"] > 100 and view["spills"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision"),
    [("triton:sm80+sm90+sm100", "bf16"), ("triton:sm90", "fp8"), ("triton:sm90", "int8"), ("triton:sm90", "int4")],
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_released_models_builds_without_spills(tmp_path, name, target, precision):
    """From their config.json alone."""
    view = plan_on_meta(str(write(name, tmp_path)), target, precision)
    assert view["variants"] > 20 and view["spills"] == {}


@pytest.mark.slow
def test_every_kernel_of_nano_compiles_for_every_architecture_without_spills(tmp_path):
    from tmlc.model_zoo.interaction import create_checkpoint

    create_checkpoint("nano", 0, tmp_path / "nano")
    architectures = tuple(ARCHITECTURES)
    target = "triton:" + "+".join(f"sm{sm}" for sm in architectures)
    for precision in ("bf16", "fp8", "int8", "int4"):
        out = tmp_path / f"{precision}.tmlc"
        tmlc.compile(tmp_path / "nano", out, target=target, precision=precision)
        with open_package(out) as held:
            for sm in architectures:
                spilled = {
                    v["name"]: v["spill_bytes"]
                    for v in held.json(f"engines/triton/sm{sm}/code.json")["variants"]
                    if v["spill_bytes"]
                }
                assert not spilled
