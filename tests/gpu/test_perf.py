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
    monkeypatch.setattr(perf.timing, "ticks", lambda *_: {})  # they run in a test of their own
    found = perf.measure(engine, tiny.gpu, tiny.checkpoint, wanted, times=1, ticks=1, copy_bytes=1 << 16)
    assert found["reference"]["max_error"] < 2e-4 < found["reference"]["spread"]
    assert found["reproducible"]["passed"] and found["copy_bytes_per_second"] > 0
    assert {row["method"] for row in found["kernels"]} == set(engine.backend.methods)
    assert all(row["seconds"] > 0 for row in found["kernels"])
    assert all(row["bytes"] > 0 for row in found["kernels"] if row["kernel"] == "linear_kernel")
    assert {row["chain"] for row in found["chains"]} == {"listen", "listen_text", "write", "speak", "rest"}
    floor = found["tick_floor_ms"]
    assert 0 < floor["silent"] < floor["speaking"]
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
def test_ticks_are_counted_in_graphs_and_method_by_method(perf, engine):
    """As many as were asked for, or as the time allows; the engine is left as it was."""
    before, log = engine.driver, engine.backend.driver.log
    graphs = []
    for methods in (False, True):
        begun = log.count("replay")
        found = perf.timing.ticks(engine, 1, methods=methods)
        graphs.append(log.count("replay") - begun)
        assert (found["ticks"], found["asked"], found["by_methods"]) == (1, 1, methods)
        assert found["device_bytes_grown"] == 0 and found["p50_ms"] > 0
    assert graphs[0] <= 3 and 7 <= graphs[1] <= 23
    assert perf.timing.ticks(engine, 100, most_seconds=1e-9)["ticks"] == 1 and engine.driver is before


def test_without_a_gpu_the_engines_are_built_and_nothing_is_said_to_have_run(perf, tiny, tmp_path, monkeypatch, capsys):
    import tmlc.model_zoo.interaction as zoo

    if perf.device()[0]:
        pytest.skip("this machine has a GPU")
    made = {"seconds": 1.0}
    monkeypatch.setattr(perf, "build", lambda folder, package, sm, precision: {**made, "sm": sm})
    monkeypatch.setattr(zoo, "create_checkpoint", lambda *_: None)
    monkeypatch.setattr(perf, "peers", lambda *_: {"not run": "PyTorch sees no GPU"})
    out = tmp_path / "result.json"
    assert perf.main(["--preset", "nano", "--precision", "fp8", "--sm", "100", "--out", str(out)]) == 1
    body = json.loads(out.read_text())
    assert body["not run"] and body["engines"] == [{"preset": "nano", "precision": "fp8", "build": {**made, "sm": 100}}]
    assert "built for sm100, and nothing was run" in capsys.readouterr().out


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
