"""`perf/check.py`: a slower machine is no regression, a figure that grew more than the others is."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("perf_check", Path(__file__).parents[2] / "perf" / "check.py")
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)


def result(factor=1.0, **changed):
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}
    made = {k: {"value": v * factor * changed.get(k, 1.0), "unit": "ms"} for k, v in values.items()}
    return {**made, "ratio": {"value": changed.get("ratio", 1.5), "unit": "×"}}


def test_a_machine_that_is_slower_as_a_whole_is_no_regression():
    machine, found = check.regressions(result(), result(factor=2.0), 0.1)
    assert machine == 2.0 and found == []


def test_what_grew_beyond_the_others_is_named():
    _, found = check.regressions(result(), result(factor=2.0, b=1.2, ratio=1.8), 0.1)
    assert {name for name, _ in found} == {"b", "ratio"}
