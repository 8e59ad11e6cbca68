"""The trace, JUnit and summary of a profile, each read by a strict reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_profile import RUDE, bare_profile, full_profile, made_sittings

from tmlc.cli.profile_files import check_files, write_for_ci
from tmlc.errors import UsageError
from tmlc.report.advice import add_advice
from tmlc.report.compare import compare, slower
from tmlc.report.html.page import html_report
from tmlc.report.trace import MOST_MISSES, MOST_TICKS, trace_text

#: Fields of each phase of the Trace Event Format: needed, and allowed beside them.
PHASES = {
    "X": ({"pid", "tid", "name", "cat", "ts", "dur"}, {"args"}),
    "i": ({"pid", "tid", "name", "cat", "ts", "s"}, {"args"}),
    "C": ({"pid", "tid", "name", "ts", "args"}, set()),
    "M": ({"pid", "tid", "name", "ts", "args"}, set()),
}


def read_trace(text: str) -> list[dict[str, Any]]:
    """The events of a trace; AssertionError for anything that the format does not allow."""
    whole = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(whole) == {"traceEvents", "displayTimeUnit", "otherData"} and whole["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = whole["traceEvents"]
    stacks: dict[tuple[int, int], list[int]] = {}
    for event in events:
        needed, more = PHASES[event["ph"]]
        assert needed <= set(event) - {"ph"} <= needed | more, event
        assert type(event["pid"]) is int and type(event["tid"]) is int and event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
        elif event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        elif event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and set(event["args"]) == {"name"}
        else:  # spans of a thread nest: whole ones inside whole ones
            start = round(event["ts"] * 1000)
            end = start + round(event["dur"] * 1000)
            open_ends = stacks.setdefault((event["pid"], event["tid"]), [])
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert end >= start and (not open_ends or end <= open_ends[-1]), event
            open_ends.append(end)
    return events


def test_the_trace_has_ticks_stages_misses_counters_and_kernels() -> None:
    view = full_profile(slow=200.0)
    events = read_trace(trace_text(view))
    ticks = [e for e in events if e["ph"] == "X" and e["cat"] == "tick"]
    steps = view["samples"]["step_ms"]
    assert [e["dur"] for e in ticks] == pytest.approx([1000 * ms for ms in steps], abs=0.01)
    assert [e["args"]["tick"] for e in ticks] == list(range(1, 650))
    stages = sum(e["dur"] for e in events if e["ph"] == "X" and e["cat"] == "stage")
    assert stages == pytest.approx(1000 * sum(steps), rel=0.001)
    assert sum(e["ph"] == "i" for e in events) == sum(ms > 160 for ms in steps) == view["missed_deadlines"] > 0
    assert {e["args"]["budget"] for e in events if e["ph"] == "C"} == {160.0}
    kernels = [e for e in events if e["ph"] == "X" and e["cat"] == "kernel"]
    assert len(kernels) == len(view["kernels"]["calls"])
    whole = sum(c["runs"] * c["ms"] for c in view["kernels"]["calls"]) / view["kernels"]["ticks"]
    assert sum(e["dur"] for e in kernels) == pytest.approx(1000 * whole, rel=1e-3)


def test_a_trace_of_a_long_session_is_bounded_and_keeps_its_misses() -> None:
    view = bare_profile(count=20_000, slow=200.0)
    text = trace_text(view)
    events = read_trace(text)
    ticks = [e for e in events if e["ph"] == "X" and e["cat"] == "tick"]
    assert len(ticks) <= MOST_TICKS + MOST_MISSES and len(text) < 8_000_000
    assert sum(e["ph"] == "i" for e in events) >= min(MOST_MISSES, view["missed_deadlines"])


def test_ticks_longer_than_their_period_follow_one_another() -> None:
    read_trace(trace_text(bare_profile(scale=12.0)))


def cases(path: Path) -> dict[str, str]:
    """Name and result of every case of a JUnit file; its counts must be right."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"]
    found = {}
    for case in root[0]:
        assert case.tag == "testcase" and set(case.attrib) == {"classname", "name", "time"}
        found[case.attrib["name"]] = next((c.tag for c in case if c.tag in ("failure", "skipped")), "passed")
    for group in (root, root[0]):
        for kind, tag in (("failures", "failure"), ("skipped", "skipped")):
            assert int(group.attrib[kind]) == list(found.values()).count(tag)
        assert int(group.attrib["tests"]) == len(found)
    return found


def test_junit_has_a_case_a_gate_and_fails_where_the_command_fails(tmp_path: Path) -> None:
    path = tmp_path / "gates.xml"
    view = full_profile()
    add_advice(view)
    write_for_ci(view, path, None)
    assert cases(path) == {"step p99": "passed", "growth": "skipped", "misses": "skipped"}
    view = full_profile(slow=160.0, scale=5.0)
    write_for_ci({**view, "package": "a\x00b\ud800<&>"}, path, None)
    assert cases(path)["step p99"] == "failure"
    view["gate"] = [
        {"figure": "max", "value": 1.0, "limit": 2.0, "unit": "ms", "passed": True},
        {"figure": "growth", "value": 0.4, "limit": 0.05, "unit": "share", "passed": False},
    ]
    write_for_ci(view, path, None)
    assert cases(path) == {"step p99": "skipped", "step max": "passed", "growth": "failure", "misses": "skipped"}
    assert [p.name for p in tmp_path.iterdir()] == ["gates.xml"]


def comparison(scale: float, share: float | None) -> dict[str, Any]:
    """Two profiles whose sittings differ by this factor."""
    sides = [{**bare_profile(), "sittings": made_sittings(by)} for by in (1.0, scale)]
    found = compare(*sides)
    found["fail_over"] = None if share is None else {"share": share, "failed": slower(found, share)}
    return found


def test_a_comparison_has_a_case_a_figure(tmp_path: Path) -> None:
    path, text = tmp_path / "compared.xml", tmp_path / "compared.md"
    write_for_ci(comparison(1.2, 0.03), path, text, compared=True)
    found = cases(path)
    assert found["step"] == found["decode"] == "failure" and found["embed_text"] == "skipped"
    assert "Slower than allowed: step" in text.read_text() and "| ❌ | step |" in text.read_text()
    write_for_ci(comparison(1.2, None), path, None, compared=True)
    assert set(cases(path).values()) == {"skipped"}
    write_for_ci(comparison(1.0, 0.03), path, None, compared=True)
    assert "failure" not in cases(path).values() and cases(path)["step"] == "passed"


def test_a_summary_goes_behind_what_is_there_and_nothing_in_it_is_markup(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("# a step before\n")
    path.chmod(0o640)
    view = full_profile()
    add_advice(view)
    write_for_ci(view, None, path)
    text = path.read_text()
    assert text.startswith("# a step before\n\n### It answers in time: a turn takes 164 ms")
    assert path.stat().st_mode & 0o777 == 0o640 and len(text) < 65536
    assert "| ✅ | step p99 | 25.28 ms of 160 ms |" in text and "**−28%** decode reads" in text
    assert "<script>" not in text and r"\<script\>" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") - line.count(r"\|") for line in rows} == {4, 6}


def test_files_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    check_files(None, tmp_path / "new.xml")
    for path in (tmp_path, tmp_path / "missing" / "new.xml"):
        with pytest.raises(UsageError):
            check_files(path)


def test_the_report_is_the_same_for_the_same_profile_and_has_no_markup_of_others() -> None:
    views = full_profile(), full_profile()
    for view in views:
        add_advice(view)
    one, two = map(html_report, views)
    assert one == two and one.count("<script") == 1 and one.count("</script>") == 1
    assert RUDE not in one and "&lt;script&gt;alert(1)" in one and "\u202e" not in one
    assert "http:" not in one and "https:" not in one and len(one) < 400_000


def test_the_report_needs_no_compiler() -> None:
    code = (
        "import sys, tmlc.report.html.page, tmlc.report.trace, tmlc.report.summary, tmlc.report.advice;"
        "assert not {'torch', 'onnx', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("untold", [("bytes", "operations", "gb_s", "gflop_s"), ("operations", "gflop_s")])
def test_a_target_that_tells_no_bytes_or_operations_has_a_report_with_dashes(untold: tuple[str, ...]) -> None:
    """TensorRT tells neither, a Triton plan no operations; no ceilings of a GPU are measured."""
    view = full_profile()
    view["ceilings"], view["not_measured"]["ceilings"] = None, "not measured on this target"
    for call in view["kernels"]["calls"]:
        call.update(dict.fromkeys((*untold, "of_bandwidth", "of_multiply", "bound")))
    add_advice(view)
    page = html_report(view)
    assert 'id="kernels"' in page and 'id="roofline"' not in page and 'id="roofline"' in html_report(full_profile())
    assert page.count("–") > html_report(full_profile()).count("–")
    assert [e for e in read_trace(trace_text(view)) if e["ph"] == "X" and e["cat"] == "kernel"]
