"""The worst layers of a quantised model, from the notes that the quantize passes leave in their records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tmlc.package.fields import is_text
from tmlc.report.tables import table

if TYPE_CHECKING:
    from rich.console import RenderableType

WORST = 8
#: As `tmlc.passes.quantize.groups` writes it.
_LAYER = re.compile(
    r"(?P<layer>.+): (?P<scheme>\w+) relative error (?P<error>[\d.]+)"
    r"(, effect (?P<effect>\S+) nats)?(, spared: (?P<spared>.+))?"
)


def read_layer(note: object) -> dict[str, str | None] | None:
    """What a note says of one layer: layer, scheme, error, effect, spared; None when it is no such note."""
    found = _LAYER.fullmatch(note) if isinstance(note, str) and is_text(note) else None
    return None if found is None else found.groupdict()


def layer_tables(records: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    """For each record of a quantize pass that measured its layers: the worst of them, in the record's order."""
    made: list[RenderableType] = []
    for record in records:
        notes = record.get("notes")
        if not str(record.get("pass")).startswith("quantize.") or not isinstance(notes, list):
            continue
        layers = [found for note in notes if (found := read_layer(note))]
        if not layers:
            continue
        shown = f"worst {WORST} of {len(layers)}, all: --json" if len(layers) > WORST else f"{len(layers)}"
        effects = any(layer["effect"] for layer in layers)
        columns = ["layer", "codes", "relative error", *(["effect, nats"] if effects else []), "spared"]
        rows = table(f"{record['pass']}: layers ({shown})", *columns)
        for layer in layers[:WORST]:
            shown_of = ("layer", "scheme", "error", *(("effect",) if effects else ()), "spared")
            rows.add_row(*(layer[name] or "" for name in shown_of))
        made.append(rows)
    return made
