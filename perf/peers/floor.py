"""The bytes that a micro-turn cannot avoid reading, from tmlc's own package and the routing that really happens.

Weights count in the form in which they are stored (scales and zero points with them); of the experts only those that
the positions were sent to; the cache counts up to the last position that is attended to. Activations and tables that
stay in a cache are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import worker

from tmlc.package import open_package
from tmlc.runtimes.core.backend import DTYPES


@dataclass(frozen=True)
class Floor:
    """Bytes of one append of `worker.APPENDED` positions, and of one decoded position."""

    append: float
    decode: float


def floor_of(package: Path, routing: dict[str, float], context: int) -> Floor:
    """The floor of one package for routing {experts, append, decode}."""
    with open_package(package) as opened:
        plan = opened.json(opened.manifest.targets["cpu"].plan)
    tensors = plan["tensors"]

    def stored(tensor: dict[str, Any], rows: float) -> float:
        return rows * tensor["stride"] * DTYPES[tensor["dtype"]].itemsize

    def method(name: str, touched: float, attended: float) -> float:
        total = 0.0
        for call in next(m for m in plan["methods"] if m["name"] == name)["code"]:
            share = touched / routing["experts"] if call["op"] == "moe" else 1.0
            for tensor in (tensors[t] for t in call["t"]):
                rows = tensor["rows"][1]
                if tensor["space"] == "weight":
                    total += share * stored(tensor, rows)
                elif tensor["space"] == "slot" and call["op"] == "attention" and rows == context:
                    total += stored(tensor, attended)
        return total

    end = worker.CACHED + worker.APPENDED
    head = method("unembed", 0, 0)
    return Floor(
        append=method("decode", routing["append"], end) + head,
        decode=method("decode", routing["decode"], end + (worker.DECODED + 1) / 2) + head,
    )
