"""Random numbers and the choice of tokens.

TensorRT has no 32-bit logic (XOR takes booleans only) and no float64, so the counter-based numbers of
docs/plan-format.md are made on the host from the keys and bound as inputs: they have the bits of every other engine.
"""

from __future__ import annotations

from tmlc.emit.tensorrt.graph import Tensor
from tmlc.emit.tensorrt.lower_dense import linear, softcap
from tmlc.emit.tensorrt.network import Call, Lower


def _noise(c: Call, op: str, cols: int, temperature: int) -> Tensor:
    """float32 [n, cols] of random numbers for the keys that are an argument of the method."""
    key = c.args["key"]
    inputs = c.writer.method.inputs
    name = f"noise.{sum(b.kind == 'noise' for b in c.writer.bindings)}"
    detail = {"op": op, "key": inputs.index(key), "temperature": temperature}
    return c.writer.bind(name, "f32", "noise", ((1, 0), (0, cols)), detail=detail)


def _philox_normal(c: Call) -> Tensor:
    return _noise(c, "normal", int(c.args["size"]), -1)


def _sample(c: Call, logits: Tensor) -> Tensor:
    """int32 [n, 1]: arg-max of logits/T + noise, of the logits where T = 0."""
    g, temperature = c.g, c.x("temperature")
    inputs = c.writer.method.inputs
    known = inputs.index(c.args["temperature"]) if c.args["temperature"] in inputs else -1
    noise = _noise(c, "gumbel", int(logits.shape[1]), known)
    zero = g.number(0.0, temperature)
    warm = g.greater(temperature, zero)
    divisor = g.select(warm, temperature, g.number(1.0, temperature))
    scores = g.select(warm, g.add(g.div(logits, divisor), noise), logits)
    return g.topk(scores, 1, 1)[1]


def _head_sample(c: Call) -> Tensor:
    g, x, alpha = c.g, c.x("x"), float(c.args["alpha"])
    logits = linear(c, x if alpha == 1 else g.times(x, alpha))
    if c.args["cap"] > 0:
        logits = softcap(g, logits, c.args["cap"])
    entries = int(c.args["entries"])
    return _sample(c, logits if entries == int(logits.shape[1]) else g.columns(logits, 1, 0, entries))


LOWERINGS: dict[str, Lower] = {
    "philox_normal": _philox_normal,
    "sample": lambda c: _sample(c, c.x("logits")),
    "head_sample": _head_sample,
}
