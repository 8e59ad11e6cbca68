"""What int8, int4 and fp8 cost in quality and save in bytes and time: the figures of docs/passes.md.

Quality is measured on the trained text model (tmlc.model_zoo.trained_text), as the mean KL divergence of next-byte
distributions from the float32 engine over held-out text. The rounding of activations is measured apart, in eager
PyTorch: 8 bits a group of 32 (what the kernels do) against 15 bits. fp8 has no engine that runs here: its program runs
in eager PyTorch, with activations rounded to bf16 before each product, as the Triton kernels do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tmlc
from tmlc.model_zoo.trained_text import TrainedText, train_text

STEPS, POSITIONS, ROUNDS = 800, 2000, 25
PRECISIONS = ("fp32", "bf16", "int8", "int4")
KL_TARGETS = {"int8": 1e-3, "int4": 2e-2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedText:
    return train_text(tmp_path_factory.mktemp("trained"), STEPS)


@pytest.fixture(scope="module")
def reports(trained: TrainedText, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packages")
    return {p: tmlc.compile(trained.folder, folder / f"{p}.tmlc", precision=p) for p in PRECISIONS}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def divergence(base: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(base) * (base - other)).sum(1).mean())


def answers(package: Path, tokens: list[int]) -> np.ndarray:
    with tmlc.load(package, threads=1) as engine, engine.session() as session:
        parts = [session.append(tokens=tokens[at : at + 50]) for at in range(0, len(tokens), 50)]
    return log_softmax(np.concatenate(parts))


def test_quality(trained: TrainedText, reports: dict[str, Any], figure: Callable[..., None]) -> None:
    tokens = trained.held_out[:POSITIONS]
    base = answers(reports["fp32"].out, tokens)
    figure("trained text model, loss on held-out bytes", trained.loss, "nats")
    figure("its next-byte distributions, mean entropy", float(-(np.exp(base) * base).sum(1).mean()), "nats")
    for precision in PRECISIONS[1:]:
        found = answers(reports[precision].out, tokens)
        figure(f"{precision} mean KL from fp32", divergence(base, found), "nats", target=KL_TARGETS.get(precision))
        same = float((found.argmax(1) == base.argmax(1)).mean())
        figure(f"{precision} same most likely byte", 100 * same, "%")
        size = reports[precision].weight_bytes / reports["bf16"].weight_bytes
        figure(f"{precision} weights / bf16 weights", size, "×")
    for precision in KL_TARGETS:
        record = next(r for r in reports[precision].passes if r.name == f"quantize.{precision}")
        figure(f"quantize.{precision} worst layer, relative error", float(record.notes[1].rsplit(" ", 1)[1]), "")


def test_quality_of_fp8(
    trained: TrainedText, reports: dict[str, Any], figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that `--precision fp8` makes for a GPU; bf16 beside it, run the same way."""
    from tmlc.frontend.checkpoint import open_checkpoint

    pytest.importorskip("triton", reason="needs Triton")
    tokens = trained.held_out[:POSITIONS]
    base = answers(reports["fp32"].out, tokens)
    source = open_checkpoint(trained.folder)
    functional = torch.nn.functional.linear
    for precision in ("bf16", "int8", "fp8"):
        done = tmlc.compile(
            trained.folder, "unused", target="triton:sm90", precision=precision, stop_after="memory.buckets"
        )
        plain = eager_answers(done.program, source, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: functional(x.bfloat16().float(), w, b))
            found = eager_answers(done.program, source, tokens)
        what = f"{precision} for triton in eager PyTorch"
        figure(f"{what}, mean KL from fp32", divergence(base, plain), "nats")
        figure(f"{what}, activations in bf16, mean KL from fp32", divergence(base, found), "nats")
        figure(f"{what}, same most likely byte", 100 * float((found.argmax(1) == base.argmax(1)).mean()), "%")
    record = next(r for r in done.passes if r.name == "quantize.fp8")
    figure("quantize.fp8 worst layer, relative error", float(record.notes[1].rsplit(" ", 1)[1]), "")


def eager_answers(program: Any, source: Any, tokens: list[int]) -> np.ndarray:
    from tmlc.ir.run import ProgramRunner

    session, parts = ProgramRunner(program, source).session(), []
    for at in range(0, len(tokens), 40):
        (x,) = session.call("embed_text", torch.tensor(tokens[at : at + 40])[:, None])
        (hidden,) = session.call("decode", x)
        parts.append(session.call("unembed", hidden)[0].numpy())
    return log_softmax(np.concatenate(parts))


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4])
def test_what_a_budget_buys(
    trained: TrainedText, reports: dict[str, Any], figure: Callable[..., None], budget: float, tmp_path: Path
) -> None:
    """int4 with a budget spent by the error of weights, and by the effect on outputs (128 bytes of training text)."""
    from tmlc.model_zoo.trained_text import library_bytes
    from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline

    tokens, calibration = trained.held_out[:POSITIONS], library_bytes()[5000:5128].tolist()
    base = answers(reports["fp32"].out, tokens)
    steps = load_pipeline("cpu").configure("quantize.cast", precision="bf16")
    at = [step.name for step in steps.steps].index("quantize.cast")
    for sensitivity in ("weight", "output"):
        coder = Step("quantize.int4", {"budget": budget, "sensitivity": sensitivity, "calibration": calibration})
        pipeline = Pipeline("budget", (*steps.steps[:at], coder, *steps.steps[at:]))
        report = tmlc.compile(trained.folder, tmp_path / f"{sensitivity}.tmlc", pipeline=pipeline)
        what = f"int4, budget {budget}, by {sensitivity}"
        found = answers(tmp_path / f"{sensitivity}.tmlc", tokens)
        figure(f"{what}, mean KL from fp32", divergence(base, found), "nats")
        figure(f"{what}, weights / int4 weights", report.weight_bytes / reports["int4"].weight_bytes, "×")
        ms = next(record.ms for record in report.passes if record.name == "quantize.int4")
        figure(f"{what}, the pass", ms / 1e3, "s")


@pytest.mark.parametrize("bits", [15, 8])
def test_rounded_activations(
    trained: TrainedText,
    reports: dict[str, Any],
    figure: Callable[..., None],
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """int8 weights with and without activations rounded to `bits` bits for each group of 32."""
    from tmlc.frontend.checkpoint import open_checkpoint

    program, source = reports["int8"].program, open_checkpoint(trained.folder)
    tokens = trained.held_out[:400]
    peak = 32512 if bits == 15 else 127

    def rounded(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).reshape(len(x), -1, 32)
        scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-30) / peak
        return (torch.round(padded / scale) * scale).reshape(len(x), -1)[:, : x.shape[1]]

    exact = eager_answers(program, source, tokens)
    functional = torch.nn.functional.linear
    # Every product of the program goes through nnf.linear; the router's, which stays float32, is rounded here too.
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: functional(rounded(x), w, b))
    moved = divergence(exact, eager_answers(program, source, tokens))
    figure(f"activations of {bits} bits, mean KL beside int8 weights", moved, "nats")


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_products(rows: int, figure: Callable[..., None]) -> None:
    """A linear of 2048 × 1024 read from memory (64 MB of weights in each form, all of them between two visits of one),
    one thread; the best of many visits to each, in rounds that alternate between the forms."""
    from tmlc.emit.packing import packed_weight
    from tmlc.kernels.cpu import Plan, load_library
    from tmlc.package.safetensors_io import WeightItem, layout
    from tmlc.runtimes.cpu.plan import plan_words

    m, k = 2048, 1024
    library, rng = load_library(), np.random.default_rng(0)
    visits: dict[str, list[Callable[[], None]]] = {}
    sizes: dict[str, int] = {}
    for dtype in ("bf16", "i8g32", "i4g32", "i4g64"):
        packed = packed_weight("w", "k16", dtype, (m, k))
        stored = {"bf16": 2}.get(packed.dtype, 1) * packed.rows * packed.cols
        count = -(-(64 << 20) // stored)
        items = [WeightItem(f"w{i}", packed.dtype, (packed.rows, packed.cols), lambda: b"") for i in range(count)]
        _, entries, total = layout(items)
        weights = rng.integers(0, 60, total + 64, np.uint8)
        weights = weights[-weights.ctypes.data % 64 :][:total]
        form = {"rows": [1, 0], "dtype": "f32"}
        tensors: list[dict[str, Any]] = [
            {"space": "input", "offset": 0, "cols": k, "stride": k, **form},
            {"space": "output", "offset": 0, "cols": m, "stride": m, **form},
        ]
        tensors += [
            {"space": "weight", "name": w.name, "dtype": packed.dtype, "rows": [0, packed.rows], "cols": packed.cols,
             "stride": packed.cols} for w in items
        ]  # fmt: skip
        methods = [
            {"name": f"linear{i}", "max_n": rows, "inputs": [0], "outputs": [1],
             "code": [{"op": "linear", "t": [1, 0, 2 + i], "i": [], "f": []}]} for i in range(count)
        ]  # fmt: skip
        plan = {"version": 2, "arena_bytes": 0, "slot_bytes": 0, "tensors": tensors, "methods": methods}
        engine = Plan(library, plan_words(plan, entries, library.ops).words, weights, 1)
        x, y = rng.standard_normal((rows, k)).astype(np.float32), np.zeros((rows, m), np.float32)
        slot = np.zeros(0, np.uint8)
        visits[dtype] = [partial(engine.run, None, i, rows, slot, [x], [y]) for i in range(count)]
        sizes[dtype] = stored
    best = {dtype: np.full(len(calls), np.inf) for dtype, calls in visits.items()}
    for _ in range(ROUNDS):
        for dtype, calls in visits.items():
            for i, call in enumerate(calls):
                started = time.perf_counter()
                call()
                best[dtype][i] = min(best[dtype][i], time.perf_counter() - started)
    times = {dtype: float(values.mean()) for dtype, values in best.items()}
    for dtype, seconds in times.items():
        figure(f"linear 2048 × 1024, {rows} rows, {dtype}", seconds * 1e6, "µs")
        figure(f"linear 2048 × 1024, {rows} rows, {dtype}, weights read", sizes[dtype] / seconds / 1e9, "GB/s")
    for dtype in ("i8g32", "i4g32"):
        figure(f"linear 2048 × 1024, {rows} rows, bf16 / {dtype}", times["bf16"] / times[dtype], "×")
