"""The memory map: what the engine reserves, each tensor in proportion, layer beside layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmlc.report.html.svg import Canvas, Scale, Size, shorten, text_width
from tmlc.report.tables import megabytes

KINDS = {"weights": "c1", "states": "c2", "arena": "c3", "scratch": "c4"}
TITLES = {"weights": "weights", "states": "states, a session", "arena": "arena", "scratch": "scratch"}
ROWS = 14


def memory_map(entries: list[Mapping[str, Any]], size: Size) -> str:
    """Above, everything on one scale; below, the weights by layer, and states, arena and scratch in their rows."""
    font, wide = size.font, size.wide
    rows = _rows(entries)
    row = 25.0 if wide else 40.0
    left, right = (170.0 if wide else 0.0), size.width - (100.0 if wide else 4.0)
    strip, tall = 4.0, 26.0
    top = strip + tall + 18
    bottom = top + row * len(rows)
    total = sum(e["bytes"] for e in entries)
    made = Canvas(size, bottom + 4, f"Memory map: {megabytes(total)} in {len(entries)} tensors")
    whole = Scale(0.0, max(total, 1), 0.0, size.width)
    made.rect(0, strip, size.width, tall, "frame")
    at = 0.0
    for what, look in KINDS.items():
        nbytes = sum(e["bytes"] for e in entries if e["what"] == what)
        made.rect(whole(at), strip, whole(at + nbytes) - whole(at), tall, f"mark {look}", f"{what} {megabytes(nbytes)}")
        at += nbytes
    scale = Scale(0.0, max(nbytes for _, _, nbytes, _ in rows) or 1, left, right)
    made.frame(left, top, right, bottom)
    y = top
    for label, look, nbytes, members in rows:
        told = megabytes(nbytes)
        if wide:
            made.text(left - 8, y + row / 2 + font * 0.35, shorten(label, font, left - 10), "", "end")
            made.text(right + 8, y + row / 2 + font * 0.35, told)
            bar = y + 4
        else:
            made.text(0, y + font + 1, shorten(label, font, size.width - text_width(told, font) - 10), "halo")
            made.text(size.width, y + font + 1, told, "halo", "end")
            bar = y + font + 7
        at = 0.0
        for name, part in members:
            width = scale(at + part) - scale(at)
            if width >= 0.05:
                made.rect(scale(at), bar, width, row - (bar - y) - 4, f"mark cell {look}", f"{name}: {megabytes(part)}")
            at += part
        y += row
    return made.svg()


def _rows(entries: list[Mapping[str, Any]]) -> list[tuple[str, str, int, list[tuple[str, int]]]]:
    """Label, colour, bytes and tensors of each row: the weights of each layer (several together when there are many
    layers), those of none, and the other kinds.
    """
    weights = [e for e in entries if e["what"] == "weights"]
    layers = sorted({e["layer"] for e in weights if e["layer"] is not None})
    together = max(1, -(-len(layers) // ROWS))
    rows = []
    for k in range(0, len(layers), together):
        chosen = layers[k : k + together]
        label = f"layer {chosen[0]}" if len(chosen) == 1 else f"layers {chosen[0]}–{chosen[-1]}"
        rows.append((label, "c1", [e for e in weights if e["layer"] in chosen]))
    if none := [e for e in weights if e["layer"] is None]:
        rows.append(("weights of no layer" if layers else "weights", "c1", none))
    rows += [(TITLES[w], KINDS[w], [e for e in entries if e["what"] == w]) for w in ("states", "arena", "scratch")]
    made = []
    for label, look, members in rows:
        ordered = sorted(members, key=lambda e: -e["bytes"])
        cells = [(str(e["name"]), int(e["bytes"])) for e in ordered[:40]]
        if rest := sum(e["bytes"] for e in ordered[40:]):
            cells.append((f"{len(ordered) - 40} smaller ones", rest))
        if members:
            made.append((label, look, sum(n for _, n in cells), cells))
    return made
