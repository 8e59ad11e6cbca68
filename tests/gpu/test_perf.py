"""What measures engines on a GPU, run on a device in host memory: that it runs, checks, and says what it should. Its
times mean nothing here."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

GPU = Path(__file__).parents[2] / "perf/gpu"


@pytest.fixture
def perf(monkeypatch):
    """The scripts of perf/gpu, as the command imports them."""
    monkeypatch.syspath_prepend(str(GPU))
    for name in ("checks", "timing", "peers", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("run")
    for name in ("checks", "timing", "peers", "run"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def engine(tiny, lab, machine):
    mark = machine.mark()
    with lab.load(tiny.gpu, machine, 4) as made:
        yield made
    machine.release(mark)


@pytest.mark.slow
def test_an_engine_is_checked_and_timed(perf, engine, tiny, monkeypatch):
    monkeypatch.setattr(perf, "BUCKETS", [(1, 1)])
    monkeypatch.setattr(perf, "CUTS", [3, 2])
    ids = perf.text(engine.model.vocab)
    wanted = perf.checks.reference_logits(tiny.checkpoint, ids)
    assert wanted.dtype == np.float64 and wanted.shape == (5, 272)
    monkeypatch.setattr(perf.checks, "golden", lambda *_: {"passed": True})  # test_interaction.py replays them
    monkeypatch.setattr(perf.timing, "ticks", lambda *_: {})
    found = perf.measure(engine, tiny.gpu, tiny.checkpoint, wanted, times=1, ticks=1, copy_bytes=1 << 16)
    assert found["reference"]["max_error"] < 2e-4 < found["reference"]["spread"]
    assert found["reproducible"]["passed"] and found["copy_bytes_per_second"] > 0
    assert {row["method"] for row in found["kernels"]} == set(engine.backend.methods)
    assert all(row["seconds"] > 0 for row in found["kernels"])
    assert all(row["bytes"] > 0 for row in found["kernels"] if row["kernel"] == "linear_kernel")
    decode = next(row for row in found["graphs"] if row["method"] == "decode")
    assert 0 < decode["weight_bytes"] < engine.backend.memory()["weights"]
    json.dumps(found)


def test_a_wrong_bit_is_found(perf, engine, monkeypatch):
    """One session's hidden state changed where it is in company."""
    call = engine.backend.call

    def altered(method, parts, inputs):
        out = call(method, parts, inputs)
        if method == "decode" and len(parts) > 1:
            out[0][0, 0] += 1e-3
        return out

    monkeypatch.setattr(engine.backend, "call", altered)
    found = perf.checks.bits(engine, [2, 2])
    assert not found["passed"] and found["hidden"] == [False, True] and found["states"] == [True, True]


@pytest.mark.slow
def test_pytorch_beside_it_runs_the_sizes_of_the_model(perf):
    peers = importlib.import_module("peers")
    assert set(peers.linear(32, 16, 2, 1, device="cpu")) == {"eager", "compile"}
    pytest.importorskip("transformers", reason="needs transformers")
    made = peers.experts(16, 8, 4, 2, 3, 1, device="cpu")
    assert set(made) == {"eager", "batched_mm", "grouped_mm", "grouped_mm, compiled"} and min(made.values()) > 0


def test_without_a_gpu_pytorch_is_not_run_and_says_so(perf, tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert perf.peers(tiny.checkpoint, 1) == {"not run": "PyTorch sees no GPU"}
