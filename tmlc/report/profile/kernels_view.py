"""Kernel calls, ceilings and memory of a profile as tables for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.tables import grid, megabytes, table

if TYPE_CHECKING:
    from rich.console import RenderableType

TOP = 12


def kernel_tables(view: dict[str, Any]) -> list[RenderableType]:
    """The calls that take most, what the machine can do at best, and what timing them costs; or why not."""
    kernels, ceilings, cost = view["kernels"], view["ceilings"], view["profiling_cost"]
    lines: list[tuple[str, str]] = []
    if ceilings is not None:
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in ceilings["multiply"].items())
        lines.append(
            ("ceilings", f"{ceilings['threads']} thread(s) read {ceilings['read_gb_s']:.1f} GB/s; GFLOP/s: {rates}")
        )
    if cost is not None:
        low, high = cost["interval"]
        change = f"{cost['ratio'] - 1:+.1%} ({low - 1:+.1%} … {high - 1:+.1%})"
        lines.append(("timing kernels", f"changes a step by {change}; {_timed(kernels)}"))
    lines += [
        (name, f"not measured: {view['not_measured'][part]}")
        for name, part in (("ceilings", "ceilings"), ("kernels", "kernels"), ("timing kernels", "profiling_cost"))
        if view[part] is None
    ]
    if view["memory_map"] is not None:
        largest = sorted(view["memory_map"], key=lambda entry: -entry["bytes"])[:3]
        lines.append(("largest", ", ".join(f"{entry['name']} {megabytes(entry['bytes'])}" for entry in largest)))
    return [*([_calls(kernels)] if kernels is not None else []), grid(lines)]


def _timed(kernels: dict[str, Any] | None) -> str:
    """Which ticks were timed, in words."""
    if kernels is None:
        return "no timed tick counts"
    disturbed = f", {kernels['disturbed']} of them disturbed" if kernels["disturbed"] else ""
    return f"{kernels['ticks']} timed ticks count, of one in {kernels['every']}{disturbed}"


def _calls(kernels: dict[str, Any]) -> Any:
    calls = sorted(kernels["calls"], key=lambda call: -call["share"])
    rest = f"top {TOP} of {len(calls)}, all: --json" if len(calls) > TOP else f"{len(calls)}"
    rows = table(
        f"kernels ({rest})", "call", "layer", "kernel", "runs a tick", "a run", "share", "GB/s", "GFLOP/s", "bound"
    )
    for call in calls[:TOP]:
        rows.add_row(
            f"{call['method']} {call['index']}",
            "" if call["layer"] is None else str(call["layer"]),
            call["op"],
            f"{call['runs'] / max(kernels['ticks'], 1):.1f}",
            f"{1000 * call['ms']:.1f} µs",
            f"{call['share']:.1%}",
            _rate(call["gb_s"], call["of_bandwidth"]),
            _rate(call["gflop_s"], call["of_multiply"]),
            call["bound"] or "",
        )
    return rows


def _rate(rate: float | None, of: float | None) -> str:
    """A rate, and the fraction of its ceiling."""
    if not rate:
        return ""
    return f"{rate:.1f}" if of is None else f"{rate:.1f} ({of:.0%})"
