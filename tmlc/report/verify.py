"""Replays the golden calls of a package on this machine and compares every output (`tmlc verify`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import PackageError
from tmlc.package.golden import GoldenCall, read_golden
from tmlc.package.reader import open_package
from tmlc.report.tables import grid, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tmlc.runtimes.core.engine import Engine


def replay(engine: Engine, package: Path, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the recorded calls in order, each sequence on a fresh session's states, and compare.

    Floats must lie within the manifest's tolerance for the method (absolute), whole numbers must be equal.

    Raises:
        PackageError: the package has no golden data, or it names a method that the engine has not.
    """
    with open_package(package, verify=False) as opened:
        calls = read_golden(opened)
    if not calls:
        raise PackageError("the package holds no golden data", where=str(package), fix="compile the checkpoint again")
    model, slots = engine.model, engine.slots
    rows: dict[str, dict[str, Any]] = {}
    slot, sequence = slots.take(), calls[0].sequence
    try:
        for number, call in enumerate(calls):
            if call.sequence != sequence:
                slots.give_back(slot)
                slot, sequence = slots.take(), call.sequence
            if call.method not in model.backend.methods:
                raise PackageError(
                    f"golden data for a method that the engine has not: {call.method}",
                    where=str(package),
                    fix="compile the checkpoint again",
                )
            with engine.device():
                found = model.backend.call(call.method, [(call.n, slots.handle(slot))], call.inputs)
                _compare(rows, call, found, tolerance(engine.manifest.tolerances, call.method))
            report("replaying", number + 1, len(calls))
    finally:
        slots.give_back(slot)
    methods = list(rows.values())
    return {
        "package": str(package),
        "digest": engine.digest,
        "target": engine.target,
        "calls": len(calls),
        "methods": methods,
        "passed": all(row["passed"] for row in methods),
    }


def tolerance(tolerances: dict[str, float], method: str) -> float:
    """The absolute tolerance of a method's float outputs: its own entry, else `default`, else none at all
    (0).
    """
    return tolerances.get(method, tolerances.get("default", 0.0))


def _compare(rows: dict[str, dict[str, Any]], call: GoldenCall, found: Any, allowed: float) -> None:
    row = rows.setdefault(
        call.method,
        {
            "method": call.method,
            "calls": 0,
            "values": 0,
            "max_error": 0.0,
            "tolerance": allowed,
            "different": 0,
            "passed": True,
        },
    )
    row["calls"] += 1
    if len(found) != len(call.outputs):
        row["passed"] = False
    for expected, got in zip(call.outputs, found, strict=False):
        got = np.asarray(got)
        row["values"] += expected.size
        if got.shape != expected.shape:
            row["passed"] = False
        elif expected.dtype.kind == "f":
            error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
            worst = float(error.max(initial=0.0)) if np.isfinite(got).all() else float("inf")
            row["max_error"] = max(row["max_error"], worst if worst != float("inf") else 1e308)
            row["different"] += int((~(error <= allowed)).sum())
        else:
            row["different"] += int((got.astype(np.int64) != expected.astype(np.int64)).sum())
    row["passed"] = row["passed"] and row["different"] == 0


def verify_tables(view: dict[str, Any]) -> list[RenderableType]:
    """The comparison for a person."""
    head = grid(
        [
            ("package", view["package"]),
            ("target", view["target"]),
            ("digest", f"sha256 {view['digest'][:16]}…"),
        ]
    )
    methods = table("replayed", "method", "calls", "values", "max error", "tolerance", "different", "")
    for row in view["methods"]:
        methods.add_row(
            row["method"],
            str(row["calls"]),
            str(row["values"]),
            f"{row['max_error']:.3g}",
            f"{row['tolerance']:g}",
            str(row["different"]),
            "ok" if row["passed"] else "MISMATCH",
        )
    return [head, methods]
