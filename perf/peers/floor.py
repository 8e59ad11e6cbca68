"""What a micro-turn cannot avoid, from tmlc's own package and the routing that really happens: bytes and multiply-adds.

Weights count in the form in which they are stored (scales and zero points with them); of the experts only those that
the positions were sent to; the cache counts up to the last position that is attended to. Activations and tables that
stay in a cache are left out, and of arithmetic everything but the products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import worker

from tmlc.package import open_package
from tmlc.report.call_work import call_work

PRODUCT = {"bf16": "bf16", "int8": "int8", "int4": "int8"}
"""What the weights of a precision are multiplied as (`tmlc.kernels.cpu.PRODUCTS`); caches are bf16 throughout."""


@dataclass(frozen=True)
class Work:
    """What all calls of one op need in an append of `worker.APPENDED` positions, or in one decoded position."""

    op: str
    bytes: float
    multiply_adds: float
    product: str


@dataclass(frozen=True)
class Floor:
    """The work of an append and of a decoded position, op by op; the bytes of all of it."""

    append_work: list[Work]
    decode_work: list[Work]

    def to_json(self) -> dict[str, Any]:
        totals = {"append": self.append_work, "decode": self.decode_work}
        body: dict[str, Any] = {part: sum(work.bytes for work in works) for part, works in totals.items()}
        return body | {f"{part}_work": [asdict(work) for work in works] for part, works in totals.items()}


def floor_of(package: Path, precision: str, routing: dict[str, float]) -> Floor:
    """The floor of one package for routing {append, decode}: experts that a call touches."""
    with open_package(package) as opened:
        plan = opened.json(opened.manifest.targets["cpu"].plan)
    end = worker.CACHED + worker.APPENDED
    counter = _Counter(plan, precision)
    return Floor(
        append_work=counter.work(routing["append"], worker.APPENDED, end),
        decode_work=counter.work(routing["decode"], 1, end + (worker.DECODED + 1) / 2),
    )


class _Counter:
    """Adds up the calls of a plan."""

    def __init__(self, plan: dict[str, Any], precision: str) -> None:
        self.tensors = plan["tensors"]
        self.code = {method["name"]: method["code"] for method in plan["methods"]}
        self.precision = precision

    def work(self, touched: float, n: int, attended: float) -> list[Work]:
        """One call with n positions that sees `attended` positions at its end, and the logits of the last one. Every
        row counts as if it saw as much as the last."""
        sums: dict[str, list[float]] = {}
        calls = [(call, n) for call in self.code["decode"]] + [(call, 1) for call in self.code["unembed"]]
        for call, rows in calls:
            work = call_work(self.tensors, call, rows, touched, attended, rows * attended)
            item = sums.setdefault(call["op"], [0.0, 0.0])
            # Of a table, only the rows of the tokens are read.
            item[0] += work.caches + (work.weights if call["op"] != "embedding" else 0.0)
            item[1] += work.multiply_adds if call["op"] in ("linear", "attention", "moe") else 0.0
        kinds = {op: "bf16" if op == "attention" else PRODUCT[self.precision] for op in sums}
        return [Work(op, read, products, kinds[op]) for op, (read, products) in sums.items() if read or products]
