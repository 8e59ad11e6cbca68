"""`tmlc doctor`."""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import tmlc.report.doctor as doctor


def test_it_names_every_target_and_extra(tmlc_cli):
    out = tmlc_cli("doctor").stdout
    assert all(word in out for word in ("cpu", "triton", "tensorrt", "onnx", "media", "C++ compiler", "portable"))


def test_json_has_the_same(tmlc_cli):
    view = tmlc_cli("doctor", "--json").json
    targets = {t["name"]: t for t in view["targets"]}
    assert targets["cpu"]["compile"] and targets["cpu"]["run"] and view["healthy"]
    assert "portable" in view["cpu_kernels"]["available"]
    assert view["cpu_kernels"]["chosen"] == view["cpu_kernels"]["available"][0]


def test_what_is_missing_comes_with_the_command_that_installs_it(tmlc_cli, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    out = tmlc_cli("doctor").stdout
    for extra in doctor.EXTRAS:
        assert f"pip install 'tmlc[{extra}]'" in out


def test_the_extras_are_those_of_the_project():
    """Each with every distribution that it brings, by way of other extras too."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]

    def brought(requirement):
        if requirement.name == "tmlc":
            lines = [line for extra in requirement.extras for line in extras[extra]]
            return {name for line in lines for name in brought(Requirement(line))}
        inner = map(Requirement, metadata.requires(requirement.name) if requirement.extras else ())
        more = {one.name for one in inner for extra in requirement.extras if _marked(one, extra)}
        return {requirement.name} | more

    def _marked(requirement, extra):
        return requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}) and (
            requirement.marker.evaluate({"extra": extra})
        )

    wanted = {name: brought(Requirement(f"tmlc[{name}]")) for name in extras if name not in ("dev", "all")}
    assert {name: set(extra.all_packages()) for name, extra in doctor.EXTRAS.items()} == wanted


def test_a_kernel_variant_that_is_not_there_is_said_and_fails(tmlc_cli, monkeypatch):
    monkeypatch.setenv("TMLC_CPU_ISA", "abacus")
    view = tmlc_cli("doctor", "--json", code=1).json
    assert not view["healthy"]
    cpu = view["targets"][0]
    assert not cpu["run"] and "abacus" in cpu["note"] and cpu["fix"]


def test_without_torch_the_cpu_still_runs_packages(tmlc_cli, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    cpu = tmlc_cli("doctor", "--json", code=1).json["targets"][0]
    assert cpu["run"] and not cpu["compile"] and cpu["fix"] == "pip install 'tmlc[compile]'"


def test_a_triton_that_is_refused_for_an_architecture_is_said(tmlc_cli, monkeypatch):
    there = doctor.installed
    for version, said in (("3.6.0", "Triton 3.6.0 makes wrong code for sm100"), ("3.9.0", "")):
        monkeypatch.setattr(doctor, "installed", lambda name, v=version: v if name == "triton" else there(name))
        (triton,) = (one for one in tmlc_cli("doctor", "--json").json["targets"] if one["name"] == "triton")
        assert triton["compile"] and (said in triton["note"] if said else "wrong" not in triton["note"])
        assert triton["fix"].count("pip install 'triton>=3.7'") == bool(said)
