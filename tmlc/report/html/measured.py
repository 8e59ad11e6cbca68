"""The sections about kernels: the roofline, and tables by kernel, by layer and of single calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmlc.report.html.grouping import Group, by_kernel, by_layer
from tmlc.report.html.parts import Cell, facts, paragraph, percent, section, table
from tmlc.report.html.roofline import roofline
from tmlc.report.html.stages import Part, look_of
from tmlc.report.html.svg import both, figure
from tmlc.report.tables import megabytes, milliseconds

MOST_CALLS = 200
"""Single calls that the report lists; STEM.json has all."""
LAYERS_OPEN = 24


def roofline_section(view: Mapping[str, Any], parts: list[Part]) -> str:
    kernels, ceilings = view["kernels"], view["ceilings"]
    if not kernels or not ceilings or not kernels["calls"]:
        return ""
    rates = ", ".join(f"{figure(rate)} GFLOP/s in {name}" for name, rate in ceilings["multiply"].items())
    without = [g for g in by_kernel(kernels["calls"]) if not g.operations]
    note = ""
    if without:
        share = sum(g.share for g in without)
        note = paragraph(
            f"Not drawn: kernels without products ({', '.join(sorted({g.name for g in without}))}); they take "
            f"{share:.1%} of the kernels' time."
        )
    lead = (
        f"A mark is a kernel of a stage, its area the share of the time. {ceilings['threads']} thread(s) of this "
        f"machine read {figure(ceilings['read_gb_s'])} GB/s and multiply {rates}. Near the slope only fewer bytes "
        "help; near a roof, only fewer or cheaper products; far below both, the kernel itself. Bytes that come from "
        "a cache can lie above the slope."
    )
    has = any(g.operations and g.bytes for g in by_kernel(kernels["calls"]))
    plot = both(lambda size: roofline(view, parts, size)) if has else ""
    return section("roofline", "Roofline", lead, plot, note)


def kernel_section(view: Mapping[str, Any], parts: list[Part]) -> str:
    kernels = view["kernels"]
    if not kernels or not kernels["calls"]:
        return ""
    ceiling = view["ceilings"]["read_gb_s"] if view["ceilings"] else None
    ticks = max(kernels["ticks"], 1)
    calls = [c for c in kernels["calls"] if c["runs"]]
    lead = f"Timed in {kernels['ticks']:,} ticks, 1 in {kernels['every']}. Times are of a mean tick; bytes as planned."
    cost = view["profiling_cost"]
    figures = ""
    if cost:
        low, high = cost["interval"]
        figures = facts(
            [("what timing them costs", f"{cost['ratio'] - 1:+.2%}", f"of p50, {low - 1:+.2%} … {high - 1:+.2%}")]
        )
    head = (
        "stage",
        "kernel",
        "share",
        "ms a tick",
        "runs a tick",
        "GB/s",
        "of bandwidth",
        "GFLOP/s",
        "of products",
        "bound by",
    )
    rows = [_row(g, parts, ticks, ceiling) for g in by_kernel(calls)]
    layers = by_layer(calls)
    layer_rows = [_row(g, parts, ticks, ceiling) for g in layers]
    layer_table = table(("stage", "layer", *head[2:]), layer_rows, "Time by layer", True)
    if len(layers) > LAYERS_OPEN:
        layer_table = f"<details><summary>{len(layers)} layers of stages</summary>{layer_table}</details>"
    return section(
        "kernels", "Kernels and layers", lead, figures, table(head, rows, "Time by kernel", True),
        "<h3>By layer</h3>", layer_table, _single(calls, parts, ticks),
    )  # fmt: skip


def _row(g: Group, parts: list[Part], ticks: int, ceiling: float | None) -> list[Cell | str]:
    ms = g.ms / ticks
    return [
        Cell(g.method, chip=look_of(parts, g.method)),
        g.name,
        percent(g.share),
        Cell(f"{ms:.3f}", ms),
        Cell(f"{g.runs / ticks:.4g}", g.runs / ticks),
        Cell(figure(g.gb_s) if g.bytes else "–", g.gb_s),
        percent(g.of_bandwidth(ceiling)),
        Cell(figure(g.gflop_s) if g.operations else "–", g.gflop_s),
        percent(g.of_multiply),
        g.bound,
    ]


def _single(calls: list[Mapping[str, Any]], parts: list[Part], ticks: int) -> str:
    """The slowest single calls, folded in."""
    ordered = sorted(calls, key=lambda c: (-c["share"], c["method"], c["index"]))
    head = ("stage", "call", "kernel", "layer", "share", "a run", "bytes a run", "GB/s", "bound by", "weights")
    rows = [
        [
            Cell(c["method"], chip=look_of(parts, c["method"])),
            Cell(str(c["index"]), c["index"]),
            c["op"],
            "–" if c["layer"] is None else str(c["layer"]),
            percent(c["share"]),
            Cell(milliseconds(c["ms"]) if c["ms"] >= 0.1 else f"{1000 * c['ms']:.1f} µs", c["ms"]),
            Cell("–" if c["bytes"] is None else megabytes(c["bytes"]), c["bytes"]),
            Cell("–" if c["gb_s"] is None else figure(c["gb_s"]), c["gb_s"]),
            c["bound"] or "–",
            Cell(", ".join(c["weights"]), long=True),
        ]
        for c in ordered[:MOST_CALLS]
    ]
    rest = len(ordered) - len(rows)
    more = f" ({rest} shorter ones only in the JSON file)" if rest else ""
    return (
        f"<details><summary>{len(rows)} single calls, the longest first{more}</summary>"
        f"{table(head, rows, 'Single calls', True)}</details>"
    )
