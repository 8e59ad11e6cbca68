"""Small programs written by hand, with every value at a place of its own in the arena."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Fact, Method, Program, StateSpec, call, items
from tmlc.ir.types import TensorType
from tmlc.ir.weights import WeightMap

N = Dim(1)


class Builder:
    """Writes one method after the other; weights get fixed random values."""

    def __init__(self) -> None:
        self.program = Program({}, WeightMap(), meta={"kind": "tokens", "name": "hand"})
        self.source: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(1)

    def method(self, name: str, max_n: int = 8) -> "Builder":
        self.graph, self.name = fx.Graph(), name
        self.program.methods[name] = Method(name, self.graph, max_n)
        return self

    def input(self, name: str, cols: int, dtype: str = "f32", rows: Dim | int = N) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta.update(role=("input", name), type=TensorType(dtype, (rows, cols)))
        return node

    def weight(self, name: str, *shape: int, dtype: str = "f32") -> fx.Node:
        if name not in self.source:
            value = torch.randn(shape, generator=self.random) / max(shape[-1], 1) ** 0.5
            self.source[name] = value.to({"bf16": torch.bfloat16, "f16": torch.float16}.get(dtype, torch.float32))
            self.program.weights.source(name, dtype, shape)
        return self.program.add_weight_input(self.name, name)

    def state(self, name: str, kind: str, *shape: int, dtype: str = "f32") -> fx.Node:
        return self.program.add_state_input(self.name, StateSpec(name, kind, shape, dtype, self.name))

    def op(self, name: str, *args: object) -> fx.Node:
        return call(self.graph, name, args)

    def two(self, name: str, *args: object) -> tuple[fx.Node, ...]:
        return items(self.op(name, *args))

    def output(self, *nodes: fx.Node) -> None:
        self.graph.output(nodes)
        place_all(self.program.methods[self.name])


def place_all(method: Method) -> None:
    at = 0
    for node in method.graph.nodes:
        spec = spec_of(node.target) if node.op == "call_function" else None
        if spec is None or spec.view:
            continue
        types = node.meta["type"]
        places = []
        for kind in (types,) if isinstance(types, TensorType) else types:
            places.append((at, kind.nbytes(method.max_n)))
            at += -(-places[-1][1] // 64) * 64
        node.meta["arena"] = places[0] if isinstance(types, TensorType) else places


def decoder(dtype: str = "f32", kv: str | None = None) -> Builder:
    """A backbone layer in miniature: merged projection, ring attention, convolution, experts, a head."""
    b = Builder().method("decode")
    x = b.input("x", 24)
    normed = b.op("rms_norm", x, b.weight("norm", 24), 1e-6)
    merged = b.op("linear", normed, b.weight("qkvr", 22, 24, dtype=dtype), None)
    q, k = b.op("columns", merged, 0, 8), b.op("columns", merged, 8, 12)
    v, rel = b.op("columns", merged, 12, 16), b.op("columns", merged, 16, 22)
    k = b.op("short_conv_state", k, b.weight("conv", 4, 1, 3), b.state("tail", "conv_tail", 2, 4), True)
    position = b.state("position", "position", 1, 1, dtype="i64")
    caches = [b.state(f"{c}_cache", "kv_ring", 48, 8 if kv == "u8" else 4, dtype=kv or dtype) for c in "kv"]
    heads = b.op(
        "attention_state",
        q,
        k,
        v,
        position,
        *caches,
        rel,
        b.weight("table", 3, 10),
        2,
        1,
        0.5,
        20,
        16,
        9.0,
        0.2,
    )
    out = b.op("linear", heads, b.weight("o", 24, 8, dtype=dtype), b.weight("o_bias", 24))
    total, normed = b.two("add_rms_norm", out, x, b.weight("norm2", 24), 1e-6)
    weights, experts = b.two(
        "router", normed, b.weight("gate", 6, 24), b.weight("bias", 5), b.weight("scale", 1), 2, 1, 1.5
    )
    mixed = b.op(
        "moe",
        normed,
        weights,
        experts,
        b.weight("up", 6, 20, 24, dtype=dtype),
        b.weight("down", 6, 24, 10, dtype=dtype),
    )
    hidden = b.op("add", total, mixed)
    b.op("advance", position, hidden, 0)
    b.output(hidden)
    b.program.facts = frozenset({Fact.STATEFUL, Fact.MEMORY_PLANNED})
    return b


@pytest.fixture
def build() -> Callable[[], Builder]:
    return Builder
