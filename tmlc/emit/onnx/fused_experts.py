"""Experts through ONNX Runtime's own MoE and QMoE operators (flavour `contrib`).

These operators choose the experts themselves: softmax over all router logits, then the K largest. Given logits that are
the logarithms of the weights of the experts that were chosen, and far below for all others, they choose the same ones
and weigh them by their part of the sum; the sum is multiplied back afterwards. That needs weights of one sign in each
row, as every router makes them.
"""

from __future__ import annotations

import operator

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.graph import CONTRIB
from tmlc.ir.ops import spec_of
from tmlc.ir.quantize import SCHEMES
from tmlc.ir.types import QUANTISED

ROUTERS = ("router", "sink_router", "topk_router")
NEVER = -1e4  # e^-1e4 is 0 in float32, and no weight has such a logarithm


def suits(c: Call) -> bool:
    """Can these experts run in the operators? A soft cap, weights that no router made, or codes that end inside a group
    cannot."""
    node = c.args["weights"]
    source = node.args[0] if node.target is operator.getitem else node
    spec = spec_of(source.target)
    if not c.context.contrib or c.args["gate_cap"] > 0 or spec is None or spec.name not in ROUTERS:
        return False
    kinds = [c.type(name).dtype for name in ("gate_up", "down")]
    if not any(kind in QUANTISED for kind in kinds):
        return True
    if len(set(kinds)) != 1:
        return False
    group = SCHEMES[kinds[0]].group
    return all(int(c.type(name).shape[2]) % group == 0 for name in ("gate_up", "down"))


def fused_moe(c: Call) -> str:
    """The op `moe` as one operator."""
    g, columns = c.g, int(c.type("experts").shape[1])
    count, _, f = (int(size) for size in c.type("down").shape)
    weights = c.x("weights")
    unlikely = g.op("Expand", g.f32(NEVER), g.concat([c.rows("x"), g.ints(count)], 0))
    chosen = g.op("Log", g.op("Abs", weights))
    logits = g.op("ScatterElements", unlikely, c.x("experts"), chosen, axis=1)
    biases: list[str | None] = [None, None]
    if c.has("gate_up_bias"):
        apart = g.transpose(g.reshape(c.weight("gate_up_bias"), count, 2, f), 0, 2, 1)
        biases = [g.reshape(apart, count, 2 * f), c.weight("down_bias")]
    alpha = c.args["alpha"]
    attributes = {
        "k": columns,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # rows of gate and up in turn
        "normalize_routing_weights": 0,
        "activation_alpha": alpha if alpha else 1.0,
        "activation_beta": 1.0 if alpha else 0.0,
        **({"swiglu_limit": c.args["limit"]} if alpha else {}),
    }
    if c.type("down").dtype in QUANTISED:
        y = _coded(c, logits, biases, attributes)
    else:
        up, down = (_floats(c, name, form) for name, form in (("gate_up", "plain.mixed"), ("down", "plain")))
        y = g.op("MoE", c.x("x"), logits, up, biases[0], down, biases[1], domain=CONTRIB, **attributes)
    return g.op("Mul", y, g.sum(weights, 1, keep=True))


def _floats(c: Call, name: str, form: str) -> str:
    _, (value,) = c.stored(name, form)
    return value if c.type(name).dtype == "f32" else c.g.cast(value, "f32")


def _coded(c: Call, logits: str, biases: list[str | None], attributes: dict[str, object]) -> str:
    """Int4 with zero points in sixteenths is int8 with whole ones: scale·(code - zero/16) = scale/16·(16·code - zero).
    The codes are widened when the graph is loaded."""
    g, scheme = c.g, SCHEMES[c.type("down").dtype]
    codes, scales, zeros = [], [], []
    for name, mixed in (("gate_up", ".mixed"), ("down", "")):
        _, parts = c.stored(name, ("u8" if scheme.bits == 8 else "u4.halves") + mixed)
        scale = g.cast(parts[1], "f32")
        if scheme.bits == 8:
            codes.append(parts[0])
            scales.append(scale)
            continue
        low = g.op("BitShift", parts[0], g.constant(4, "u8"), direction="LEFT")
        high = g.op("BitwiseAnd", parts[0], g.constant(0xF0, "u8"))
        codes.append(g.concat([low, high], 2))
        scales.append(g.op("Mul", scale, g.f32(1 / 16)))
        zeros.append(parts[2])
    given = [c.x("x"), logits, codes[0], scales[0], biases[0], codes[1], scales[1], biases[1]]
    if zeros:
        given += [None, None, None, zeros[0], zeros[1]]
    return g.op(
        "QMoE", *given, domain=CONTRIB, expert_weight_bits=8, block_size=scheme.group,
        **attributes,  # type: ignore[arg-type]
    )  # fmt: skip
