"""`tmlc profile --junit` and `--summary`, from the command line to the files."""

import json
import os
from xml.etree import ElementTree

import pytest

from tmlc.cli.profile_files import write_for_ci

QUICK = ("--startup-runs", "0", "--sittings", "0", "--no-kernels", "--budget", "60s")


@pytest.fixture(scope="module")
def measured(tmlc_cli, package, tmp_path_factory):
    """A session of six seconds: its folder with a.json, gates.xml and summary.md."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "summary.md").write_text("# a step before\n")
    tmlc_cli("profile", package, "--seconds", "6", *QUICK, "-o", folder / "a", "--junit", folder / "gates.xml",
             "--summary", folder / "summary.md")  # fmt: skip
    return folder


def results(path):
    """Name of every case, with what it says of itself: failure, skipped or system-out; and its text."""
    return {
        case.attrib["name"]: (case[0].tag, case[0].text or case[0].attrib["message"])
        for case in ElementTree.parse(path).getroot().iter("testcase")
    }


def test_a_profile_writes_its_gates_and_its_summary(measured):
    view = json.loads((measured / "a.json").read_text())
    found = results(measured / "gates.xml")
    assert {name: kind for name, (kind, _) in found.items()} == {
        "step p99": "system-out", "growth": "skipped", "misses": "skipped"
    }  # fmt: skip
    # 29 ticks behind the first: thirds of 9, which last 1.8 s. No minute is spoken of.
    assert view["growth"]["window_seconds"] == pytest.approx(1.8)
    assert "from the first 1.8 s to the last 1.8 s" in found["growth"][1]
    text = (measured / "summary.md").read_text()
    assert text.startswith("# a step before\n\n### It answers in time: a turn takes")
    assert "| ✅ | step p99 |" in text and "from the first 1.8 s to the last 1.8 s" in text and "minute" not in text
    assert not [path for path in measured.iterdir() if path.name.startswith(".tmlc-")]


def test_a_comparison_writes_a_case_a_figure_even_when_it_fails(tmlc_cli, measured, tmp_path):
    gates, summary = tmp_path / "gates.xml", tmp_path / "summary.md"
    view = json.loads((measured / "a.json").read_text())
    paths = []
    for name, factor in (("quick", 1.0), ("slow", 3.0)):
        steps = [factor * (20.0 + k % 3) for k in range(10)]
        figures = {"step": steps, "decode[0]": [ms - 1.0 for ms in steps]}
        sittings = {"ticks": 100, "figures": figures, "busy": [0.0] * 10}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({**view, "sittings": sittings}))
    files = ("--fail-over", "3%", "--junit", gates, "--summary", summary)
    tmlc_cli("profile", "--compare", *paths, *files, code=1)
    assert results(gates)["step"][0] == "failure"
    assert "### Slower than allowed: step" in summary.read_text()
    tmlc_cli("profile", "--compare", *reversed(paths), *files)
    assert results(gates)["step"][0] == "system-out" and "failure" not in {k for k, _ in results(gates).values()}
    assert summary.read_text().count("### ") == 2 and "\n### Faster: " in summary.read_text()


@pytest.mark.parametrize("option", ["--junit", "--summary"])
def test_a_file_without_a_folder_is_refused_before_anything_is_measured(tmlc_cli, package, tmp_path, option):
    done = tmlc_cli("profile", package, "--seconds", "6", *QUICK, option, tmp_path / "none" / "file", "-o",
                    tmp_path / "a", code=2)  # fmt: skip
    assert "folder" in done.stderr and not list(tmp_path.iterdir())


def test_a_write_that_breaks_off_leaves_what_was_there(measured, tmp_path, monkeypatch):
    junit, summary = tmp_path / "gates.xml", tmp_path / "summary.md"
    view = json.loads((measured / "a.json").read_text())
    for path in (junit, summary):
        path.write_text("before")

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    for files in ((junit, None), (None, summary)):
        with pytest.raises(OSError, match="full"):
            write_for_ci(view, *files)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "gates.xml": "before", "summary.md": "before"
    }  # fmt: skip
