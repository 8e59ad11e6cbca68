"""compile(): one package for one input, clear refusals, nothing left behind, memory for one tensor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tmlc
import tmlc.compiler as compiler
from tmlc.errors import CheckError, CheckpointError, PackageError, TargetError, UsageError
from tmlc.ir.program import Program
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.package import open_package
from tmlc.package.golden import read_golden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "nano"
    create_checkpoint("nano", 0, folder)
    return folder


@pytest.fixture(scope="module")
def traced(checkpoint: Path) -> Program:
    return compiler.load_program(checkpoint)


@pytest.fixture(autouse=True)
def trace_once(traced: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds and is the frontend's to test."""
    monkeypatch.setattr(compiler, "load_program", lambda source, overrides: traced.clone())


@pytest.fixture(scope="module")
def package(checkpoint: Path, traced: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "nano.tmlc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "load_program", lambda source, overrides: traced.clone())
        tmlc.compile(checkpoint, out)
    return out


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    tmlc.compile(copy, tmp_path / "again.tmlc")
    assert (tmp_path / "again.tmlc").read_bytes() == package.read_bytes()


def test_the_package_says_what_it_is(checkpoint: Path, package: Path) -> None:
    with open_package(package) as opened:
        manifest = opened.manifest
        assert (manifest.model.name, manifest.model.kind) == ("nano", "interaction")
        assert set(manifest.model.source) >= {"config.json", "model.safetensors"}
        assert manifest.method("decode").max_n == manifest.context.max_append
        assert manifest.method("speak").max_n == manifest.context.max_append, "for as many sessions in one call"
        assert manifest.method("speak").outputs[0].name == "mel"
        assert manifest.tokenizer == "tokenizer.json"
        assert opened.read("tokenizer.json") == (checkpoint / "tokenizer.json").read_bytes()
        assert [step["pass"] for step in manifest.pipeline][-1] == "memory.verify"
        assert manifest.tick.sample_rate == 16000
        assert manifest.tick.out_hop == 800
        assert manifest.session_bytes == opened.json("engines/cpu/plan.json")["slot_bytes"]
        assert b"method decode" in opened.read("program.ir")


def test_golden_calls_are_what_the_engine_answers(package: Path) -> None:
    with open_package(package) as opened:
        calls = read_golden(opened)
        allowed = opened.manifest.tolerances
    engine = tmlc.load(package, threads=1, sessions=1)
    assert {call.method for call in calls} == set(engine.backend.methods)
    slot, sequence = None, None
    for call in calls:
        if call.sequence != sequence:
            slot, sequence = aligned(engine.backend.slot_bytes), call.sequence
        found = engine.backend.call(call.method, [(call.n, slot)], call.inputs)
        for got, want in zip(found, call.outputs, strict=True):
            assert got.dtype == want.dtype
            limit = allowed.get(call.method, 0)
            assert np.abs(got.astype(np.float64) - want).max() <= limit, (call.method, call.n)
    engine.close()


def aligned(size: int) -> np.ndarray:
    backing = np.zeros(size + 64, np.uint8)
    return backing[-backing.ctypes.data % 64 :][:size]


def test_bf16_halves_the_weights_and_passes_its_own_check(
    checkpoint: Path, package: Path, tmp_path: Path
) -> None:
    report = tmlc.compile(checkpoint, tmp_path / "b.tmlc", precision="bf16", check=True, folder=True)
    assert report.package_bytes < 0.6 * package.stat().st_size
    assert report.digest == open_package(tmp_path / "b.tmlc").digest
    caches = [s for s in open_package(tmp_path / "b.tmlc").manifest.states if s.kind.startswith("kv")]
    assert caches
    assert {s.dtype for s in caches} == {"bf16"}
    assert json.loads(json.dumps(report.to_json()))["precision"] == "bf16"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "vocoder", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named_and_nothing_stays(
    checkpoint: Path, tmp_path: Path, name: str, value: float
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "bad"))
    weights = load_file(copy / "model.safetensors")
    name = name if name in weights else next(n for n in weights if n.startswith(name))
    weights[name].reshape(-1)[-1] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        tmlc.compile(copy, tmp_path / "out" / "x.tmlc")
    assert name in caught.value.what
    assert not (tmp_path / "out").exists()


def test_an_interrupt_while_weights_stream_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def press(stage: str, done: int, total: int) -> None:
        if stage == "packing weights" and done > 5:
            raise KeyboardInterrupt

    (tmp_path / "old.tmlc").write_bytes(b"what was there before")
    with pytest.raises(KeyboardInterrupt):
        tmlc.compile(checkpoint, tmp_path / "old.tmlc", on_progress=press)
    assert [p.name for p in tmp_path.iterdir()] == ["old.tmlc"]
    assert (tmp_path / "old.tmlc").read_bytes() == b"what was there before"


def test_a_place_that_cannot_be_written_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackageError, match="cannot write"):
        tmlc.compile(checkpoint, tmp_path / "file" / "x.tmlc")


def test_targets_and_precisions_that_do_not_fit_are_told_apart_from_unknown_ones(checkpoint: Path) -> None:
    with pytest.raises(TargetError, match="needs an architecture"):
        tmlc.compile(checkpoint, "x", target="triton")
    with pytest.raises(TargetError, match="unknown target"):
        tmlc.compile(checkpoint, "x", target="abacus")
    with pytest.raises(UsageError, match="target cpu has no precision fp8"):
        tmlc.compile(checkpoint, "x", passes=["quantize.fp8", "quantize.cast"])
    with pytest.raises(UsageError, match="target cpu has no precision fp8"):
        tmlc.compile(checkpoint, "x", precision="fp8")
    with pytest.raises(UsageError, match="unknown precision"):
        tmlc.compile(checkpoint, "x", precision="fp31")


def test_stopping_early_writes_programs_but_no_package(checkpoint: Path, tmp_path: Path) -> None:
    report = tmlc.compile(
        checkpoint, tmp_path / "x.tmlc", stop_after="route.stack_experts", dump=tmp_path / "dump"
    )
    assert report.out is None
    assert not (tmp_path / "x.tmlc").exists()
    assert [r.name for r in report.passes][-1] == "route.stack_experts"
    assert len(list((tmp_path / "dump").iterdir())) == len(report.passes) + 1


def test_a_bounded_context_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    report = tmlc.compile(checkpoint, tmp_path / "x.tmlc", context=256, context_policy="end", max_append=16)
    context = open_package(tmp_path / "x.tmlc").manifest.context
    assert (context.limit, context.policy, context.max_append) == (256, "end", 16)
    assert open_package(tmp_path / "x.tmlc").manifest.method("decode").max_n == 16
    assert report.session_bytes < 500_000


def test_check_names_the_pass_that_breaks_the_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmlc.pipeline.registry import get_pass

    cls = get_pass("fuse.residual_norm")
    run = cls.run

    def broken(self: object, program: Program, ctx: object) -> object:
        result = run(self, program, ctx)
        node = result.program.methods["decode"].calls("add_rms_norm")[0]
        node.args = (*node.args[:3], 0.5)
        return result

    monkeypatch.setattr(cls, "run", broken)
    with pytest.raises(CheckError, match=r"fuse\.residual_norm"):
        tmlc.compile(checkpoint, tmp_path / "x.tmlc", check=True)
    assert list(tmp_path.iterdir()) == []


def test_only_one_tensor_is_in_memory_at_a_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the bytes of evaluated weights that are alive while the package is written."""
    from tmlc.ir.weights import WeightMap

    evaluate, alive, most, largest = WeightMap.evaluate, [0], [0], [0]

    def counted(self: WeightMap, name: str, source: object) -> torch.Tensor:
        import weakref

        tensor = evaluate(self, name, source)
        size = tensor.numel() * tensor.element_size()
        largest[0] = max(largest[0], size)
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(WeightMap, "evaluate", counted)
    monkeypatch.setattr("tmlc.emit.golden.KEEP_BYTES", 0)
    tmlc.compile(checkpoint, tmp_path / "x.tmlc")
    assert most[0] <= 2 * largest[0]
