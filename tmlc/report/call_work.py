"""The bytes and multiply-adds of one kernel call of a CPU plan (docs/plan-format.md): what a profile and `perf/peers`
hold its time against.

Weights count as they are stored, scales and zero points with them; of experts those that rows were sent to, of a table
of embeddings the rows that were looked up, of a cache the positions that were seen. Of arithmetic only the products
count: `linear`, `router`, `moe`, `head_sample` and the scores and sums of `attention`. `tmlc plan` counts the same
before there is a plan (tmlc/report/plan/work.py); a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmlc.runtimes.core.backend import DTYPES

Tensor = Mapping[str, Any]
PRODUCTS = {"f32": "fp32", "bf16": "bf16", "u8": "int8"}
"""How weights or caches of a dtype are multiplied; codes of 4 bits as bytes."""


@dataclass(frozen=True)
class CallWork:
    """What one run of a call needs; means of several runs where the counts it was made from are means.

    Attributes:
        weights: bytes of weights that are read.
        caches: bytes of keys and values that are read.
        states: bytes of states that are read or written beside that.
        activations: bytes of operands that are read or written: they may be in a processor's cache.
        multiply_adds: of its products.
        product: what these multiply (a value of `PRODUCTS`); empty without products.
    """

    weights: float = 0.0
    caches: float = 0.0
    states: float = 0.0
    activations: float = 0.0
    multiply_adds: float = 0.0
    product: str = ""

    @property
    def bytes(self) -> float:
        return self.weights + self.caches + self.states + self.activations


def call_work(
    tensors: Sequence[Tensor], call: Mapping[str, Any], n: float, experts: float, keys: float, row_keys: float
) -> CallWork:
    """The work of one run.

    Args:
        tensors, call: the plan's table, and one entry of a method's `code`.
        n: positions of the run.
        experts: different experts that its rows went to, of a `moe`.
        keys, row_keys: cached positions that any row saw, and that each row saw, added up, of an `attention`.
    """
    used = [tensors[t] for t in call["t"]]
    weights = caches = states = activations = 0.0
    for k, tensor in enumerate(used):
        whole = _rows(tensor, n) * tensor["cols"] * DTYPES[tensor["dtype"]].itemsize
        if tensor["space"] == "weight":
            weights += whole * _part_read(call, used, k, n, experts)
        elif tensor["space"] != "slot":
            activations += whole
        elif call["op"] == "attention" and tensor["rows"][1] > 1:
            a_position = whole / call["i"][4]
            caches += a_position * keys
            states += a_position * n
        else:
            states += 2 * whole
    macs, product = _products(call, used, n, row_keys)
    return CallWork(weights, caches, states, activations, macs, product if macs else "")


def _rows(tensor: Tensor, n: float) -> float:
    a, b = tensor["rows"]
    return float(a * n + b)


def _part_read(call: Mapping[str, Any], used: Sequence[Tensor], k: int, n: float, experts: float) -> float:
    """The part of a weight that a run reads."""
    op, ints = call["op"], call["i"]
    if op == "moe":
        biases = len(ints) > 2 and bool(ints[2] & 1)
        return experts / ints[0] if k in (4, 5) or (biases and k in (6, 7)) else 1.0
    if op in ("embedding", "bag_embedding"):
        looked_up = _rows(used[0], n) if op == "embedding" else _rows(used[1], n) * used[1]["cols"]
        return float(looked_up / _rows(used[k], n))
    if op == "head_sample" and k == 2:  # blocks of 16 entries, without those that pad the vocabulary
        return -(-ints[0] // 16) / _rows(used[k], n)
    if op == "add_row":
        return float(_rows(used[0], n) > 0) / _rows(used[k], n)
    return 1.0


def _products(call: Mapping[str, Any], used: Sequence[Tensor], n: float, row_keys: float) -> tuple[float, str]:
    """Multiply-adds, and what is multiplied."""
    op, ints = call["op"], call["i"]
    if op == "linear":
        return _rows(used[0], n) * used[0]["cols"] * used[1]["cols"], PRODUCTS[used[2]["dtype"]]
    if op == "router":
        return _rows(used[2], n) * used[2]["cols"] * (used[4]["cols"] + ints[1]), PRODUCTS[used[3]["dtype"]]
    if op == "moe":
        one = 3 * ints[1] * used[1]["cols"]
        return _rows(used[1], n) * used[2]["cols"] * one, PRODUCTS[used[4]["dtype"]]
    if op == "head_sample":
        return _rows(used[0], n) * used[1]["cols"] * ints[0], PRODUCTS[used[2]["dtype"]]
    if op == "attention":
        heads, kv_heads = ints[:2]
        per_key = used[1]["cols"] + heads * used[3]["cols"] // kv_heads
        return row_keys * per_key, PRODUCTS[used[5]["dtype"]]
    return 0.0, ""
