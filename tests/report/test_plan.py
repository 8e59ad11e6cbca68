"""`tmlc plan`: what is counted is what an engine has and does, and more hardware is never predicted to be worse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tmlc
from tmlc.cli.main import cli
from tmlc.emit.triton.target import Lowerings
from tmlc.errors import EmitError, TargetError, UsageError
from tmlc.ir.text import parse_program, print_program
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Pointer
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig
from tmlc.model_zoo.interaction.modeling import count_parameters
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.report.gpu_plan import launches_of_calls, triton_target
from tmlc.report.plan import source
from tmlc.report.plan.engine import OpsEngine, Part
from tmlc.report.plan.hardware import table
from tmlc.report.plan.predict import BETWEEN, Predictor
from tmlc.report.plan.source import compiler_for, engine_of, load_planned
from tmlc.report.plan.work import MethodCall, OpWork, method_work, session_bytes, tick_calls, weight_bytes
from tmlc.runtimes.cuda.schedule import schedule

GPU = "triton:sm90"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nano in two precisions."""
    folder = tmp_path_factory.mktemp("plan")
    create_checkpoint("nano", 0, folder / "nano")
    made = {}
    for precision in ("bf16", "int8"):
        made[precision] = folder / f"{precision}.tmlc"
        tmlc.compile(folder / "nano", made[precision], precision=precision)
    return made


@pytest.fixture(scope="module")
def program() -> Any:
    return load_planned("nano", "bf16", None)[0]


@pytest.fixture(scope="module")
def gpu_program() -> Any:
    """nano after the passes of the target triton."""
    return load_planned("nano", "bf16", None, GPU)[0]


@pytest.fixture(scope="module")
def lowered(gpu_program: Any) -> Lowerings:
    return triton_target(GPU).lower(gpu_program)


@pytest.fixture(scope="module")
def kernels(gpu_program: Any) -> Any:
    return engine_of(gpu_program, "bf16", GPU)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_counts_the_bytes_that_a_package_has(packages: dict[str, Path], precision: str) -> None:
    planned, stored = load_planned(str(packages[precision]), None, None)
    with tmlc.load(packages[precision], threads=1, sessions=1) as engine:
        capacity = engine.capacity()
    assert stored == precision
    counted = weight_bytes(method_work(planned, precision), planned, precision)
    # The engine pads rows to blocks of 16 and each tensor to 64 bytes, and keeps a few vectors more.
    assert counted == pytest.approx(capacity.weight_bytes, rel=0.06)
    assert session_bytes(planned) == pytest.approx(capacity.session_bytes, rel=0.01)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_routers_are_counted_in_float32_in_every_precision(program: Any, precision: str) -> None:
    config = InteractionConfig.from_preset("nano").text_config
    routers = [op for op in method_work(program, precision)["decode"] if op.op == "router"]
    assert len(routers) == config.mlp_layer_types.count("sparse")
    # A row an expert, and a correction of each one's choice; the shared one has a row, too, where it competes.
    rows = {op.weight_bytes / 4 // config.hidden_size for op in routers}
    assert rows <= {config.n_routed_experts, config.n_routed_experts + 1}, rows


def test_counts_each_multiply_add_of_a_position_once(program: Any) -> None:
    config = InteractionConfig.from_preset("nano")
    work = method_work(program, "bf16")
    macs = sum(op.macs for name in ("decode", "unembed") for op in work[name])
    text = config.text_config
    _, active = count_parameters(config)
    outside = sum(op.macs for name in ("speak", "vocode", "embed_audio", "embed_video") for op in work[name])
    # A position's multiply-adds are its active parameters, but for tables that are looked up and stems and heads that
    # other positions use.
    assert macs < active < macs + outside + 3 * text.vocab_size * text.hidden_size + 80 * 16 * text.hidden_size


@pytest.mark.parametrize("video", [False, True])
def test_a_tick_makes_the_calls_that_the_driver_makes(packages: dict[str, Path], program: Any, video: bool) -> None:
    made: list[tuple[str, int]] = []
    with tmlc.load(packages["bf16"], threads=1, sessions=1) as engine:
        session, layout, inner = engine.session(seed=1), engine.manifest.tick, engine.backend.call

        def recording(method: str, parts: Sequence[Any], inputs: Sequence[np.ndarray]) -> Any:
            made.append((method, sum(n for n, _ in parts)))
            return inner(method, parts, inputs)

        engine.backend.call = recording  # type: ignore[method-assign]
        clip = np.zeros((layout.clip_frames, layout.frame_height, layout.frame_width, 3), np.uint8)
        for _ in range(40):
            made.clear()
            given = tmlc.TickInput(np.zeros(0, np.float32), clip if video else None, tokens=[65, 66])
            out = session.tick(given)
            # A tick in which the model says and writes all it can, as plans assume.
            in_full = len(out.tokens) == layout.text_out and layout.end_of_tick_token_id not in out.tokens
            if in_full and not out.stats["silent"] and not out.stats["dropped_clips"]:
                break
        else:
            pytest.fail("in 40 ticks the model never spoke and wrote in full")
    assert sorted(made) == sorted((call.method, call.n) for call in tick_calls(program, video))


def test_counts_the_bytes_that_launches_read(gpu_program: Any, lowered: Lowerings) -> None:
    """Two counts of one thing: of the ops of a program, and of the operands that its launches are given."""
    work = method_work(gpu_program, "bf16")
    for method, ops in work.items():
        launches = lowered.launches[90][method][Bucket(1, 1)]
        given = [arg for launch in launches if launch.kernel != "embedding_kernel" for arg in launch.args]
        read = sum(arg.nbytes for arg in given if isinstance(arg, Pointer) and arg.space == "weight")
        counted = sum(op.weight_bytes + op.again_bytes + op.experts * op.expert_bytes for op in ops)
        assert counted == read, method


def test_fused_ops_need_what_the_ops_before_them_need(gpu_program: Any, program: Any) -> None:
    for method, ops in method_work(gpu_program, "bf16").items():
        before = method_work(program, "bf16")[method]
        if method == "unembed":  # head_logits leaves out what pads the vocabulary
            continue
        for name in ("macs", "position_macs", "position_bytes"):
            total, other = (sum(op.rows * getattr(op, name) for op in some) for some in (ops, before))
            assert total == other, (method, name)
        assert sum(op.experts * op.expert_bytes for op in ops) == sum(op.experts * op.expert_bytes for op in before)
        assert sum(op.chosen for op in ops) == sum(op.chosen for op in before)


def test_a_tick_on_a_gpu_makes_the_launches_of_its_graphs(kernels: Any) -> None:
    found = launches_of_calls("nano", GPU, "bf16", load_pipeline("triton"))
    runs = kernels.tick(1, False)
    told = [sum(part.launches for part in run.parts) + run.between for run in runs]
    assert told == [sum(found[f"{name}.b1"].values()) for name in ("listen_text", "write", "speak")]
    step = Predictor(kernels.program, "bf16", table()["h200"], 1, 1024, engine=kernels).step(1, False)
    assert (step.launches, step.waits) == (sum(told), 3)
    assert step.parts["launches"] == pytest.approx(sum(told) * 1.3e-6 + 3 * 20e-6)
    assert step.seconds == pytest.approx(sum(step.parts.values())) == pytest.approx(sum(step.methods.values()))
    assert step.methods[BETWEEN] > 0


@pytest.mark.parametrize("sessions", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("video", [False, True])
def test_runs_of_a_gpu_cover_the_calls_of_a_tick(kernels: Any, sessions: int, video: bool) -> None:
    asked: dict[str, int] = {}
    for call in tick_calls(kernels.program, video):
        asked[call.method] = asked.get(call.method, 0) + call.n * sessions
    done: dict[str, int] = {}
    runs = kernels.tick(sessions, video)
    for part in (part for run in runs for part in run.parts):
        done[part.method] = done.get(part.method, 0) + part.rows
        assert 0 < part.sessions <= sessions and part.launches > 0
    assert done == asked
    groups = -(-sessions // 64)
    assert len(runs) == 3 * groups if not video else len(runs) > 3 * groups  # a clip is taken in method by method


def test_calls_of_a_gpu_run_in_the_buckets_of_the_runtime(kernels: Any, lowered: Lowerings) -> None:
    for n, sessions in ((1, 1), (7, 1), (300, 1), (5, 40)):
        parts = [part for run in kernels.calls([MethodCall("decode", n)], sessions) for part in run.parts]
        runs = schedule([n] * sessions, lowered.buckets["decode"])
        launches = lowered.launches[90]["decode"]
        assert parts == [
            Part("decode", len(pieces), sum(size for _, _, size in pieces), len(launches[shape]))
            for shape, pieces in runs
        ]


def test_what_an_engine_is_not_known_for_counts_an_op_as_a_launch(
    program: Any, gpu_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = parse_program(print_program(gpu_program))  # as a package has it
    assert engine_of(again, "bf16", "triton:sm80").launches.endswith("kernels of triton:sm80")
    for one, target, why in ((program, "cpu", ""), (program, GPU, "another target"), (again, "cpu", "another target")):
        engine = engine_of(one, "bf16", target)
        assert isinstance(engine, OpsEngine) and engine.launches.endswith(why or "is a launch")
        ops = [op for op in method_work(one, "bf16")["decode"] if op.computes]
        assert engine.calls([MethodCall("decode", 1)], 1)[0].parts[0].launches == len(ops)
    assert compiler_for(table()["h200"]) == (GPU, "")

    def missing(name: str) -> Any:
        raise TargetError("Triton is not installed", fix="install it")

    monkeypatch.setattr(source, "find_target", missing)
    assert compiler_for(table()["h200"]) == ("cpu", "Triton is not installed. install it")
    engine = engine_of(program, "bf16", GPU, "Triton is not installed")
    assert engine.launches == "an op is a launch: Triton is not installed"


def test_a_program_without_a_kernel_is_planned_by_its_ops(gpu_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, program: Any) -> Any:
        raise EmitError("heads of 512 columns", where="decode, attention_state", fix="use narrower heads")

    monkeypatch.setattr(type(triton_target(GPU)), "lower", refuse)
    said = engine_of(gpu_program, "bf16", GPU).launches
    assert said == "an op is a launch: decode, attention_state: heads of 512 columns"


def test_expected_experts_are_what_a_lottery_gives() -> None:
    op = OpWork("moe", experts=32, chosen=4)
    random = np.random.default_rng(0)
    drawn = [len({int(e) for _ in range(16) for e in random.choice(32, 4, replace=False)}) for _ in range(400)]
    assert op.touched(16) == pytest.approx(np.mean(drawn), rel=0.02)
    assert op.touched(1) == pytest.approx(4)
    assert op.touched(1000, spread=0.25) == pytest.approx(8)
    assert op.touched(1, spread=0.01) == pytest.approx(4)


@pytest.mark.parametrize("split", ["tensors", "experts"])
def test_more_devices_and_fewer_bits_never_take_longer_but_for_links(program: Any, split: str) -> None:
    device = table()["h200"]
    alone = Predictor(program, "bf16", device, 1, 1024).step(4, True)
    shared = Predictor(program, "bf16", device, 4, 1024, split).step(4, True)
    fewer = Predictor(program, "int8", device, 1, 1024).step(4, True)
    assert alone.parts["links"] == 0 < shared.parts["links"]
    assert shared.parts["bytes"] < alone.parts["bytes"]
    assert fewer.bytes < alone.bytes and fewer.operations == alone.operations
    assert alone.seconds == pytest.approx(sum(alone.parts.values())) == pytest.approx(sum(alone.methods.values()))


def test_the_most_sessions_are_the_last_that_fit(program: Any) -> None:
    predictor = Predictor(program, "bf16", table()["rtx4090"], 1, 1024)
    most = predictor.most_sessions(0.160)
    assert most > 1
    assert predictor.p99(most) <= 0.160 < predictor.p99(most + 1) or not predictor.fits(most + 1)
    assert predictor.most_sessions(1e-6) == 0


def test_every_machine_has_a_source_and_plausible_figures() -> None:
    for device in table().values():
        assert device.source and 0 < device.reach["bytes"] <= 1 and 0 < device.reach["products"] <= 1
        assert 1e10 < device.memory < 1e12 and 1e11 < device.bandwidth < 1e14
        assert device.rates["fp32"] < device.rates["bf16"]


def test_refuses_what_makes_no_sense(packages: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="neither a preset"):
        load_planned("no-such-model", None, None)
    with pytest.raises(UsageError, match="fixed"):
        load_planned(str(packages["bf16"]), None, 77)
    without = replace(table()["a100"], rates={"fp32": 1e13, "bf16": 1e14})
    with pytest.raises(UsageError, match="no products of fp8"):
        Predictor(load_planned(str(packages["bf16"]), None, None)[0], "fp8", without, 1, 1024)


def test_a_folder_that_is_no_checkpoint_does_not_hide_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_planned("nano", None, None)[0].meta["name"] == "nano"


def test_help_names_every_machine() -> None:
    shown = CliRunner().invoke(cli, ["plan", "--help"]).output
    assert all(name in shown for name in table())


def test_every_number_of_devices_without_room_is_told(packages: dict[str, Path]) -> None:
    run = CliRunner()
    tight = run.invoke(cli, ["plan", str(packages["int8"]), "--on", "h200", "--devices", "1-3", "--budget", "240.5ms"])
    assert "0 sessions, devices 1, 2, 3" in tight.output


def test_the_verb_prints_a_plan_and_fails_when_nothing_fits(packages: dict[str, Path]) -> None:
    run = CliRunner()
    done = run.invoke(cli, ["plan", str(packages["int8"]), "--on", "h200", "--devices", "1,2", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert [row["devices"] for row in plan["devices"]] == [1, 2]
    assert plan["counted"] == "an op is a launch: the package is one of another target"
    assert plan["devices"][0]["launches"] > 500 and plan["devices"][0]["waits"] == 24
    assert plan["precision"] == "int8" and plan["devices"][0]["sessions"] > 0
    tight = run.invoke(cli, ["plan", str(packages["int8"]), "--on", "h200", "--budget", "240.5ms"])
    assert tight.exit_code == 1 and "over the budget" in tight.output
    assert run.invoke(cli, ["plan", "nano", "--on", "abacus"]).exit_code == 2
    assert run.invoke(cli, ["plan", "nano", "--on", "h200", "--devices", "0"]).exit_code == 2
