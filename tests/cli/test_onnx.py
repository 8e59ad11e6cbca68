"""The verbs on a package with ONNX graphs."""

import json
from zipfile import ZipFile

import numpy as np
import pytest
import soundfile

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def graphs(tmlc_cli, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.tmlc"
    view = tmlc_cli("compile", checkpoint, "-o", path, "--target", "onnx", "--json").json
    assert view["target"] == "onnx" and all(row["kernel"] for row in view["coverage"])
    return path


def test_the_package_has_graphs_at_its_top_and_what_a_driver_needs(graphs):
    with ZipFile(graphs) as package:
        names = package.namelist()
        told = json.loads(package.read("engines/onnx/signature.json"))
        guide = package.read("engines/onnx/README.md").decode()
    assert {"decode.onnx", "speak.onnx", "weights.safetensors"} <= set(names)
    assert {f"{name}.onnx" for name in told["methods"]} == {name for name in names if name.endswith(".onnx")}
    for name, method in told["methods"].items():
        assert f"### {name} " in guide and all(f"`{state['name']}`" in guide for state in method["states"])


def test_inspect_counts_operators(tmlc_cli, graphs):
    view = tmlc_cli("inspect", graphs, "--json").json
    assert view["op_counts"]["onnx"]["decode"]["ScatterND"] >= 4
    shown = tmlc_cli("inspect", graphs).stdout
    assert "ScatterND" in shown and "onnx (fp32)" in shown


def test_verify_replays_the_golden_calls(tmlc_cli, graphs):
    view = tmlc_cli("verify", graphs, "--json").json
    assert view["passed"] and view["target"] == "onnx"


def test_run_and_profile(tmlc_cli, graphs, tmp_path):
    soundfile.write(tmp_path / "speech.wav", np.random.default_rng(0).standard_normal(9000) * 0.1, 16000)
    out = tmlc_cli("run", graphs, "--audio", tmp_path / "speech.wav", "-o", tmp_path / "out", "--json")
    assert out.json["ticks"] == 3 and len(out.json["files"]) == 3
    view = tmlc_cli("profile", graphs, "--seconds", 1, "--startup-runs", 1, "--sittings", 1, "--json").json
    assert view["machine"]["isa"].startswith("onnxruntime ") and view["startup"]["runs"] == 1


def test_an_unknown_flavour_is_two_lines(tmlc_cli, checkpoint, tmp_path):
    told = tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--target", "onnx:fast", code=2).stderr
    assert "no flavour 'fast'" in told and "onnx:contrib" in told


def test_doctor_says_what_is_there_and_what_is_not(tmlc_cli, monkeypatch):
    import tmlc.report.doctor as doctor

    row = next(t for t in tmlc_cli("doctor", "--json").json["targets"] if t["name"] == "onnx")
    assert row["compile"] and row["run"] and "onnxruntime" in row["note"]
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "onnxruntime" else "1.0")
    row = next(t for t in tmlc_cli("doctor", "--json").json["targets"] if t["name"] == "onnx")
    assert row["compile"] and not row["run"] and row["fix"] == "pip install onnxruntime"
