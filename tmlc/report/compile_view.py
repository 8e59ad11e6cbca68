"""What a compilation did, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.layers import layer_tables
from tmlc.report.tables import grid, megabytes, table

if TYPE_CHECKING:
    from rich.console import RenderableType


def compile_tables(view: dict[str, Any]) -> list[RenderableType]:
    """The report of `tmlc compile` for a person; `view` is `CompileReport.to_json()`."""
    passes = table("passes", "pass", "matches", "near misses", "ops", "ms")
    for record in view["passes"]:
        ops = f"{record['ops_before']} → {record['ops_after']}"
        missed = str(len(record["near_misses"]))
        passes.add_row(record["pass"], str(record["matches"]), missed, ops, f"{record['ms']:.0f}")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in view["seconds"].items())
    lines = [
        ("model", f"{view['model']} ({view['kind']}) for {view['target']}, {view['precision']}"),
        ("took", stages),
    ]
    lines += [("note", str(text)) for text in view.get("notes", ())]
    if view["out"] is not None:
        lines += [
            ("weights", megabytes(view["weight_bytes"])),
            ("a session", megabytes(view["session_bytes"])),
            ("arena", f"{megabytes(view['arena_bytes'])}, scratch {megabytes(view['scratch_bytes'])}"),
            ("wrote", f"{view['out']} ({megabytes(view['package_bytes'])}, sha256 {view['digest'][:16]}…)"),
        ]
    if "cache" in view:
        cache = view["cache"]
        lines.append(("cache", cache["outcome"] + (f" ({cache['reason']})" if cache["reason"] else "")))
    near = [(record["pass"], miss) for record in view["passes"] for miss in record["near_misses"]]
    rest = [grid([(f"near miss in {name}", str(miss)) for name, miss in near])] if near else []
    return [passes, *layer_tables(view["passes"]), *rest, grid(lines)]


def coverage_tables(view: dict[str, Any]) -> list[RenderableType]:
    """Which ops the target runs and which it refuses, with the place in the model, the reason and what to do."""
    rows, target = view["coverage"], view["target"]
    refused = table("refused", "op", "target", "source", "reason", "what to do", "method", "calls")
    for row in (row for row in rows if row["kernel"] is None):
        place = row["source"] or "not noted"
        refused.add_row(row["op"], target, place, row["reason"], row["fix"], row["method"], str(row["count"]))
    lowered = table("lowered", "op", "runs as", "calls", "methods")
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op and row["kernel"] is not None]
        if mine:
            methods = ", ".join(dict.fromkeys(row["method"] for row in mine))
            lowered.add_row(op, mine[0]["kernel"], str(sum(row["count"] for row in mine)), methods)
    missed = sum(row["count"] for row in rows if row["kernel"] is None)
    calls = sum(row["count"] for row in rows)
    verdict = f"{missed} of {calls} calls are refused" if missed else f"all {calls} calls lower"
    tables = [lowered, *([refused] if missed else [])]
    return [*tables, grid([("dry run", f"{verdict}; no package was written")])]


def lookup_tables(lookup: dict[str, Any]) -> list[RenderableType]:
    """What the cache said of a compilation; `lookup` is `tmlc.cache.Lookup.to_json()`."""
    head = grid(
        [
            ("checkpoint", lookup["checkpoint"]),
            ("written to", lookup["out"]),
            ("cache", lookup["outcome"]),
            ("why", lookup["reason"] or "every part of the key was the same"),
        ]
    )
    if not lookup["changed"]:
        return [head]
    changed = table("changed", "part of the key", "then", "now")
    for part, then, now in lookup["changed"]:
        changed.add_row(part, _short(then), _short(now))
    return [head, changed]


def _short(value: str) -> str:
    """A digest by its beginning; everything else as it is."""
    return f"{value[:12]}…" if len(value) == 64 and set(value) <= set("0123456789abcdef") else value
