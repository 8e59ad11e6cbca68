"""What `tmlc tune` found, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.tables import grid, table

if TYPE_CHECKING:
    from rich.console import RenderableType

SIZES = ("block_m", "block_k", "warps", "stages")


def tune_tables(view: dict[str, Any]) -> list[RenderableType]:
    """Every shape with its candidates; `view` is what `tmlc tune --json` prints."""
    made: list[RenderableType] = []
    for one in view["shapes"]:
        s = one["shape"]
        title = f"{s['op']} {s['dtype']} [{s['m']}, {s['k']}] sm{s['sm']}: {', '.join(one['samples'])}"
        rows = table(title, "rows × inputs, warps, stages", "registers", "spills", "shared", "time", "")
        for number, c in enumerate(one["candidates"]):
            blocks = f"{c['block_m']} × {c['block_k']}, {c['warps']}, {c['stages']}"
            relative = "–" if c["relative"] is None else f"{c['relative']:.3f}"
            chosen = one["chosen"] is not None and all(c[key] == one["chosen"][key] for key in SIZES)
            word = c["refused"] or ("chosen" if chosen else "" if number else "now")
            rows.add_row(blocks, str(c["registers"]), str(c["spill_bytes"]), str(c["shared"]), relative, word)
        made.append(rows)
    lines = [("target", view["target"]), ("device", view["device"] or "none: nothing was timed")]
    return [*made, grid(lines)]
