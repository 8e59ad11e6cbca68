"""Holds one result of `make perf` against another: `python perf/check.py BEFORE.json AFTER.json [--over 10%]`.

Ratios, not seconds. A figure in `×` is a ratio already. A time is divided by how all times of the two results changed
together (their median), so that a slower machine is no regression and one figure that grew more than the others is.
Exit code 1 when a figure grew by more than `--over`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

TIMES = {"s", "ms", "µs", "us", "ns"}


def figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of a result by name."""
    return {f["name"]: f for f in json.loads(path.read_text(encoding="utf-8"))["figures"]}


def regressions(before: dict[str, Any], after: dict[str, Any], over: float) -> tuple[float, list[tuple[str, float]]]:
    """By what all times changed together, and the figures that grew by more than `over` beyond that, with the part."""
    common = [name for name in before if name in after and before[name]["value"] > 0 and after[name]["value"] > 0]
    ratios = {name: after[name]["value"] / before[name]["value"] for name in common}
    times = {name: ratio for name, ratio in ratios.items() if before[name]["unit"] in TIMES}
    machine = statistics.median(times.values()) if times else 1.0
    grown = {name: ratio / machine - 1 for name, ratio in times.items()}
    grown |= {name: ratio - 1 for name, ratio in ratios.items() if before[name]["unit"] == "×"}
    return machine, sorted(((n, by) for n, by in grown.items() if by > over), key=lambda item: -item[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--over", type=lambda text: float(text.rstrip("%")) / 100, default=0.1, metavar="10%")
    given = parser.parse_args()
    machine, found = regressions(figures(given.before), figures(given.after), given.over)
    print(f"all times together: × {machine:.3f}")
    for name, by in found:
        print(f"{name}: grew by {by:.1%} beyond that")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
