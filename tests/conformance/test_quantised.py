"""Compiled int8 and int4 engines: their size, their bits, and how far their distributions are from float32.

The quality is measured on a model that is really trained (tmlc.model_zoo.trained_text): bytes of Python's standard
library, an Inkling text model of transformers, some seconds here and minutes in the slow test. Bounds are the issue's.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import tmlc
from tmlc.ir.quantize import SCHEMES
from tmlc.model_zoo.trained_text import TrainedText, train_text
from tmlc.package.reader import open_package

KL_BOUNDS = {"int8": 1e-3, "int4": 2e-2}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def distributions(package: Path, tokens: list[int]) -> np.ndarray:
    with tmlc.load(package, threads=1) as engine, engine.session() as session:
        parts = [session.append(tokens=tokens[at : at + 50]) for at in range(0, len(tokens), 50)]
    return log_softmax(np.concatenate(parts))


def divergences(packages: dict[str, Path], tokens: list[int]) -> dict[str, float]:
    """Mean KL divergence of next-byte distributions from the float32 engine's, in nats, on held-out text."""
    base = distributions(packages["fp32"], tokens)
    entropy = float(-(np.exp(base) * base).sum(1).mean())
    assert 0.5 < entropy < 3.0, "the model has learnt to expect some bytes and not others"
    return {
        precision: float((np.exp(base) * (base - distributions(packages[precision], tokens))).sum(1).mean())
        for precision in KL_BOUNDS
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedText:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_text(tmp_path_factory.mktemp("trained"), steps=120)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reports(trained: TrainedText, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tmlc.CompileReport]:
    folder = tmp_path_factory.mktemp("packages")
    return {
        name: tmlc.compile(trained.folder, folder / f"{name}.tmlc", precision=name, check=name != "fp32")
        for name in ("fp32", *KL_BOUNDS)
    }


def test_distributions_stay_near_those_of_float32(
    reports: dict[str, tmlc.CompileReport], trained: TrainedText
) -> None:
    found = divergences({name: Path(str(report.out)) for name, report in reports.items()}, trained.held_out[:300])
    assert all(found[precision] <= bound for precision, bound in KL_BOUNDS.items()), found
    assert found["int8"] < found["int4"]


@pytest.mark.slow
def test_distributions_of_a_longer_trained_model_stay_near_too(tmp_path: Path) -> None:
    longer = train_text(tmp_path / "checkpoint", steps=800)
    for precision in ("fp32", *KL_BOUNDS):
        tmlc.compile(longer.folder, tmp_path / f"{precision}.tmlc", precision=precision)
    packages = {precision: tmp_path / f"{precision}.tmlc" for precision in ("fp32", *KL_BOUNDS)}
    found = divergences(packages, longer.held_out[:2000])
    assert all(found[precision] <= bound for precision, bound in KL_BOUNDS.items()), found


@pytest.mark.parametrize("precision", KL_BOUNDS)
def test_the_size_on_disk_is_what_the_bits_predict(reports: dict[str, tmlc.CompileReport], precision: str) -> None:
    report = reports[precision]
    predicted = 0
    for name in report.program.used_weights():
        kind = report.program.weights[name].type
        scheme = SCHEMES.get(kind.dtype)
        rows = kind.numel() // kind.shape[-1]
        predicted += kind.nbytes() if scheme is None else scheme.nbytes(rows, kind.shape[-1])
    with open_package(report.out) as package:
        assert abs(report.weight_bytes / predicted - 1) <= 0.03
        header = package.manifest.files["weights.safetensors"].bytes - report.weight_bytes
        assert 0 < header < 200 * len(package.tensors) + 500, "names and places: nothing that grows with the weights"
        needed = set(package.manifest.required_features) - {"cpu.plan.v1", "weights.k16"}
        assert package.manifest.targets["cpu"].precision == precision
    # The unembedding is outside the decoder, so int4 has 8-bit codes too.
    assert needed == {"int8": {"weights.k16.int8"}, "int4": {"weights.k16.int8", "weights.k16.int4"}}[precision]


@pytest.mark.parametrize("precision", KL_BOUNDS)
def test_bits_do_not_depend_on_chunks_or_threads(
    reports: dict[str, tmlc.CompileReport], trained: TrainedText, precision: str
) -> None:
    tokens = trained.held_out[:120]
    with tmlc.load(reports[precision].out, threads=1) as engine, engine.session() as session:
        whole = session.append(tokens=tokens)
    for threads, sizes in ((1, [1] * 120), (2, [3, 17, 1, 40, 2, 57])):
        with tmlc.load(reports[precision].out, threads=threads) as engine, engine.session() as session:
            at, parts = 0, []
            for size in sizes:
                parts.append(session.append(tokens=tokens[at : at + size]))
                at += size
        assert np.array_equal(np.concatenate(parts), whole)


def test_the_same_input_gives_the_same_package(
    reports: dict[str, tmlc.CompileReport], trained: TrainedText, tmp_path: Path
) -> None:
    again = tmlc.compile(trained.folder, tmp_path / "again.tmlc", precision="int4")
    assert again.digest == reports["int4"].digest


def test_a_budget_in_the_pipeline_file_keeps_the_worst_layers_at_eight_bits(
    reports: dict[str, tmlc.CompileReport], trained: TrainedText, tmp_path: Path
) -> None:
    from tmlc.pipeline.pipeline import Pipeline, load_pipeline

    steps = load_pipeline("cpu").to_yaml().replace(
        "- pass: quantize.cast",
        "- pass: quantize.int4\n  config: {budget: 0.1}\n- pass: quantize.cast\n  config: {precision: bf16}",
    )
    report = tmlc.compile(trained.folder, tmp_path / "b.tmlc", pipeline=Pipeline.parse(steps, "test"))
    assert report.precision == "int4"
    plain = reports["int4"].weight_bytes
    assert plain < report.weight_bytes <= 1.11 * plain
    notes = next(record.notes for record in report.passes if record.name == "quantize.int4")
    assert any("spared" in note for note in notes)
