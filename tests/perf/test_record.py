"""`perf/record.py`: recording a part of perf/ renews that part and drops nothing else."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("perf_record", Path(__file__).parents[2] / "perf" / "record.py")
assert _SPEC is not None and _SPEC.loader is not None
record = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(record)

BOX = {"cpu": "Some CPU", "cores": 2, "system": "Linux 6.1", "python": "3.11.9"}
NOW = {"date": "2026-02-02", "machine": BOX}


def made(test: str | None, name: str, value: float, date: str = "2026-02-02") -> dict[str, Any]:
    figure = {"name": name, "value": value, "unit": "ms", "target": None, "met": None}
    return figure if test is None else {**figure, "test": test, "date": date, "load_average": 1.0}


def values(body: dict[str, Any]) -> dict[tuple[str | None, str], float]:
    return {(f.get("test"), f["name"]): f["value"] for f in body["figures"]}


def before(**more: Any) -> dict[str, Any]:
    old = [made("a", "x", 1.0, "2026-01-01"), made("a", "y", 2.0, "2026-01-01"), made("b", "x", 3.0, "2026-01-01")]
    return {"date": "2026-01-01", "machine": BOX, "isa": "v4", "figures": old, **more}


def test_a_test_that_ran_takes_the_place_of_its_own_figures_and_of_no_others() -> None:
    body = record.merged(before(), NOW, [made("a", "x", 9.0), made("a", "new", 8.0)], {"a"})
    assert values(body) == {("b", "x"): 3.0, ("a", "x"): 9.0, ("a", "new"): 8.0}
    assert body["date"] == "2026-02-02" and body["isa"] == "v4" and body["machine"] == BOX
    (kept,) = (f for f in body["figures"] if f["test"] == "b")
    assert kept["date"] == "2026-01-01" and "machine" not in kept


def test_a_test_that_failed_half_way_drops_nothing_that_it_did_not_measure_again() -> None:
    body = record.merged(before(), NOW, [made("a", "x", 9.0)], set())
    assert values(body) == {("a", "x"): 9.0, ("a", "y"): 2.0, ("b", "x"): 3.0}


def test_figures_from_before_they_named_their_tests_stay_until_they_are_measured_again() -> None:
    old = before(figures=[made(None, "x", 1.0), made(None, "y", 2.0)], load_average=0.5)
    body = record.merged(old, NOW, [made("a", "x", 9.0)], {"a"})
    assert values(body) == {("a", "x"): 9.0, (None, "y"): 2.0}
    assert body["figures"][0]["date"] == "2026-01-01" and body["figures"][0]["load_average"] == 0.5


def test_figures_of_another_machine_say_so(tmp_path: Path) -> None:
    other = {**BOX, "system": "Linux 5.4"}
    body = record.merged(before(machine=other), NOW, [made("a", "x", 9.0)], {"a"})
    assert [f.get("machine") for f in body["figures"]] == [other, None]
    record.write(tmp_path / "results" / "box.json", body)
    assert record.read(tmp_path / "results" / "box.json") == body and record.read(tmp_path / "none.json") is None
    table = (tmp_path / "results" / "box.md").read_text(encoding="utf-8")
    assert "2026-01-01 on another machine (1)" in table and "(1) system Linux 5.4 instead of Linux 6.1" in table
    back = record.merged(body, {**NOW, "machine": other}, [made("c", "z", 1.0)], {"c"})
    assert [f.get("machine") for f in back["figures"]] == [None, BOX, None]


@pytest.mark.parametrize("figures", [[], [made("a", "x", 1.0)]])
def test_the_first_recording_needs_no_file(figures: list[dict[str, Any]]) -> None:
    assert record.merged(None, NOW, figures, {"a"}) == {**NOW, "figures": figures}
