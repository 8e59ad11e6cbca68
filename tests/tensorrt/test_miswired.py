"""The check of networks is worth something: one wire wrong, and the streamed logits are not the CPU engine's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tmlc.emit.tensorrt import lower_attention, lower_blocks, lower_dense, lower_moe, lowering
from tmlc.emit.tensorrt.graph import Graph
from tmlc.emit.tensorrt.network import Call
from tmlc.ir.run import ProgramRunner

from ..emit.conftest import Builder, decoder
from ..emit.test_decoders import latent
from .stand_in import open_program
from .test_ops import STREAM, check

Wrong = Callable[[pytest.MonkeyPatch], None]


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = lower_attention._visible

    def wrong(c: Call, rows: Any, end: Any, capacity: int, window: int, sinks: int) -> Any:
        return right(c, rows, end, capacity, window - 1, sinks)

    patch.setattr(lower_attention, "_visible", wrong)


def mask_sees_the_future(patch: pytest.MonkeyPatch) -> None:
    right = Graph.greater
    patch.setattr(Graph, "greater", lambda g, a, b: right(g, a, g.plus(b, -1) if a.dtype == g.trt.int32 else b))


def bias_of_the_next_distance(patch: pytest.MonkeyPatch) -> None:
    right = lower_attention._bias
    patch.setattr(lower_attention, "_bias", lambda c, d, tau: right(c, c.g.plus(d, 1), tau))


def write_index_of_a_ring_without_sinks(patch: pytest.MonkeyPatch) -> None:
    right = lower_attention.write_index
    patch.setattr(lower_attention, "write_index", lambda g, f, c, s, ring: right(g, f, c, 0, ring))


def swapped_caches(patch: pytest.MonkeyPatch) -> None:
    right = Graph.attention
    patch.setattr(Graph, "attention", lambda g, q, k, v, mask: right(g, q, v, k, mask))


def swapped_states(patch: pytest.MonkeyPatch) -> None:
    """The new tail is the old one: what is read and what is written are one binding apart."""
    right = lower_dense._last_rows

    def wrong(g: Graph, padded: Any, size: Any, count: int, channels: int) -> Any:
        return right(g, padded, g.sub(size, g.sizes([1, 0])), count, channels)

    patch.setattr(lower_dense, "_last_rows", wrong)


def softmax_over_the_wrong_axis(patch: pytest.MonkeyPatch) -> None:
    right = Graph.softmax
    patch.setattr(Graph, "softmax", lambda g, x, axis: right(g, x, 0))


def experts_by_rank(patch: pytest.MonkeyPatch) -> None:
    """Weights of the worst chosen expert go to the best."""
    right = lower_moe._sink_router

    def wrong(c: Call, logits: Any) -> Any:
        weights, experts = right(c, logits)
        first, rest = c.g.columns(experts, 1, 0, 1), c.g.columns(experts, 1, 1, int(experts.shape[1]) - 1)
        return weights, c.g.concat([rest, first], 1)

    patch.setattr(lower_moe, "_sink_router", wrong)


def taps_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    right = Call.numpy

    def wrong(c: Call, name: str) -> np.ndarray:
        made = right(c, name)
        return np.ascontiguousarray(made[..., ::-1]) if c.node.name.startswith("short_conv") else made

    patch.setattr(Call, "numpy", wrong)


def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    right = lower_moe._gate
    patch.setattr(lower_moe, "_gate", lambda c, gate, up: right(c, up, gate))


MISWIRED = [
    mask_off_by_one, mask_sees_the_future, bias_of_the_next_distance, write_index_of_a_ring_without_sinks,
    swapped_caches, swapped_states, softmax_over_the_wrong_axis, experts_by_rank,
    taps_in_the_wrong_order, gate_and_up_swapped,
]  # fmt: skip


def test_without_a_fault_the_check_passes(library) -> None:
    check(decoder(), library, STREAM)


@pytest.mark.parametrize("wrong", MISWIRED)
def test_a_wrong_wire_is_caught(library, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check(decoder(), library, STREAM)


def test_rotary_pairs_the_wrong_way_are_caught(library, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_blocks._rope

    def wrong(c: Call) -> Any:
        return right(Call(c.writer, c.node, c.args | {"interleaved": not c.args["interleaved"]}))

    monkeypatch.setitem(lowering.LOWERINGS, "rope_state", wrong)
    with pytest.raises((AssertionError, ValueError)):
        check(latent(), library, STREAM[:7])


def test_a_binding_of_another_layers_state_is_caught(library) -> None:
    """Two convolutions of one shape, whose states the plan would mix up."""
    b = Builder().method("m")
    x = b.input("x", 6)
    one = b.op("short_conv_state", x, b.weight("a", 6, 3), b.state("one", "conv_tail", 2, 6), True)
    b.output(b.op("short_conv_state", one, b.weight("b", 6, 3), b.state("two", "conv_tail", 2, 6), True))
    check(b, library, STREAM)
    backend, _ = open_program(b.program, b.source, library)
    plan = backend._loaded["m"].plan
    kept = {binding.name: binding for binding in plan.bindings}
    swapped = {"next.one": kept["next.two"].offset, "next.two": kept["next.one"].offset}
    mixed = tuple(replace(k, offset=swapped.get(k.name, k.offset)) for k in plan.bindings)
    backend._loaded["m"].plan = replace(plan, bindings=mixed)
    slot, reference = backend.slots(1).handle(0), ProgramRunner(b.program, b.source).session()
    worst = 0.0
    for n in STREAM:
        given = np.random.default_rng(n).standard_normal((n, 6)).astype(np.float32)
        (found,) = backend.call("m", [(n, slot)], [given])
        worst = max(worst, float(np.abs(found - reference.call("m", torch.from_numpy(given))[0].numpy()).max()))
    assert worst > 0.1
