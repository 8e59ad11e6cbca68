"""The bytes and multiply-adds of each op of a Program, and which calls a tick makes.

Counted from the graphs after the passes of any target; a fused op has the work of all that it was made of. Weights
count in the form in which an engine stores them. Activations are left out: between two ops they stay in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from tmlc.errors import UsageError
from tmlc.ir.ops import OpSpec, spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.types import TensorType
from tmlc.report.plan.precision import BITS

#: Arguments of ops that are weights of products.
PRODUCTS = ("weight", "gate_up", "down")
#: Routers that take logits.
_ROUTERS = {"sink_router", "topk_router"}
#: Whose `weight` is taps, kept in float32.
_CONVOLUTIONS = {"short_conv", "short_conv_state", "dynamic_conv", "dynamic_conv_state"}


@dataclass(frozen=True)
class OpWork:
    """What one op of a method needs, for all calls alike.

    Attributes:
        op: name of the canonical or fused op.
        rows: rows that a call with n positions makes of it: `rows · n`.
        weight_bytes: read whole by every call, and for the first time in it.
        again_bytes: of weights that another op of the same call has read: steps of a flow head share theirs.
        macs: multiply-adds of a row.
        experts, chosen, expert_bytes: of an op over experts: how many there are to choose from and how many a row goes
            to; the bytes of one. Experts that every row goes to are in `weight_bytes`.
        position_bytes, position_macs: of attention: bytes of keys and values, and multiply-adds of a row, for each
            position that is attended to.
        window: positions that are attended to at most; 0 for all that the context keeps.
        reduces: do several devices have to add their parts of its result up?
        cols: columns of the result.
        computes: does an engine launch something for it (views and reshapes are free)?
    """

    op: str
    rows: int = 1
    weight_bytes: float = 0.0
    again_bytes: float = 0.0
    macs: float = 0.0
    experts: int = 0
    chosen: int = 0
    expert_bytes: float = 0.0
    position_bytes: float = 0.0
    position_macs: float = 0.0
    window: int = 0
    reduces: bool = False
    cols: int = 0
    computes: bool = True

    def touched(self, rows: float, spread: float = 1.0) -> float:
        """Experts that `rows` rows are expected to go to, when a share `spread` of them is in use, each as likely as
        any other."""
        if not self.experts:
            return 0.0
        used = max(float(self.chosen), self.experts * spread)
        return used * (1.0 - (1.0 - self.chosen / used) ** rows)

    def attended(self, context: int) -> float:
        """Positions of a session's cache that a row reads."""
        return min(self.window, context) if self.window else context


@dataclass(frozen=True)
class MethodCall:
    """One call of a tick: `n` positions of each session."""

    method: str
    n: int


def method_work(program: Program, precision: str) -> dict[str, list[OpWork]]:
    """The ops of each method. `precision` is how the weights of products are stored (a key of `BITS`)."""
    if precision not in BITS:
        raise UsageError(f"no precision {precision!r}", where="--precision", fix=f"use one of {', '.join(BITS)}")
    return {name: list(_ops(method, precision)) for name, method in program.methods.items()}


def _ops(method: Method, precision: str) -> Iterator[OpWork]:
    seen: set[fx.Node] = set()
    for node in method.calls():
        spec, given = _call(node)
        result = node.meta["type"]
        first = result if isinstance(result, TensorType) else (result[0] if result else None)
        facts: dict[str, Any] = {
            "op": spec.name,
            "rows": first.numel(1) // max(1, int(first.shape[-1])) if first is not None and first.shape else 1,
            "cols": int(first.shape[-1]) if first is not None and first.shape else 0,
            "computes": not spec.view,
            "reduces": isinstance(given.get("addend"), fx.Node) and _has_product(given),
        }
        needs = _needs(given, _bits(node, precision))
        if (weight := given.get("weight")) in seen:
            needs["again_bytes"], needs["weight_bytes"] = needs["weight_bytes"], 0.0
        elif isinstance(weight, fx.Node):
            seen.add(weight)
        yield OpWork(**facts, **needs)


def _call(node: fx.Node) -> tuple[OpSpec, dict[str, Any]]:
    """The op of a call, and its arguments by name; `weight` is that of a product only."""
    spec = spec_of(node.target)
    assert spec is not None
    given = dict(zip(spec.args, node.args, strict=True))
    if spec.name in _CONVOLUTIONS:
        given["kernel"] = given.pop("weight")
    return spec, given


def _has_product(given: dict[str, Any]) -> bool:
    return any(isinstance(given.get(name), fx.Node) for name in PRODUCTS)


def _bits(call: fx.Node, precision: str) -> dict[str, float]:
    """Of a weight of a product as stored, by argument. Routers' are float32 in every precision; a router's product
    stands in it, in the experts that it has become part of, or is a linear before it."""
    spec, given = _call(call)
    readers = {found.name for reader in call.users if (found := spec_of(reader.target)) is not None}
    routes = "router" in spec.name or "gate_up" in given or (spec.name == "linear" and readers & _ROUTERS)
    return dict.fromkeys(PRODUCTS, BITS[precision]) | ({"weight": BITS["fp32"]} if routes else {})


def _needs(given: dict[str, Any], bits: dict[str, float]) -> dict[str, Any]:
    """Bytes and multiply-adds of one op, from its arguments by name; `bits` of the weights of its products. An op that
    passes made of several has the needs of all of them."""
    needs: dict[str, Any] = {"weight_bytes": 0.0, "macs": 0.0}
    if isinstance(given.get("gate_up"), fx.Node):
        needs = _expert_needs(given, bits["gate_up"])
    if isinstance(given.get("k_cache"), fx.Node):
        needs |= _attention_needs(given)
    if isinstance(given.get("weight"), fx.Node) and len(type_of(given["weight"]).shape) == 2:
        rows, cols = type_of(given["weight"]).shape
        count = int(given.get("entries", rows)) * int(cols)  # a head leaves out what pads its vocabulary
        needs["macs"] += float(count)
        needs["weight_bytes"] += count * bits["weight"] / 8
        given = given | {"weight": None}
    counted = ("table", "gate_up", "down", "gate_up_bias", "down_bias")
    others = (node for name, node in given.items() if name not in counted and isinstance(node, fx.Node))
    small = sum(type_of(node).nbytes() for node in others if node.op == "placeholder" and role(node)[0] == "weight")
    needs["weight_bytes"] += small
    return needs


def _expert_needs(given: dict[str, Any], bits: float) -> dict[str, Any]:
    gate_up, down = (type_of(given[name]) for name in ("gate_up", "down"))
    biases = [type_of(given[name]) for name in ("gate_up_bias", "down_bias") if isinstance(given[name], fx.Node)]
    shared = _shared(given)
    # Experts that choose themselves say how many a row goes to; others are given them, the shared ones too.
    taken = int(given["top_k"]) + shared if "top_k" in given else int(type_of(given["weights"]).shape[-1])
    stacked = int(gate_up.shape[0])
    one = (gate_up.numel() + down.numel()) // stacked
    bytes_of_one = one * bits / 8 + sum(bias.nbytes() for bias in biases) / stacked
    return {
        "experts": stacked - shared,
        "chosen": taken - shared,
        "expert_bytes": bytes_of_one,
        "weight_bytes": shared * bytes_of_one,
        "macs": float(one * taken),
    }


def _shared(given: dict[str, Any]) -> int:
    """How many of the last experts every row goes to: the op itself says it, or what chose its experts."""
    if "n_shared" in given:
        return int(given["n_shared"])
    chose = given["experts"].args[0] if given["experts"].args else None
    if not isinstance(chose, fx.Node) or spec_of(chose.target) is None:
        return 0
    said = _call(chose)[1]
    return int(said.get("n_shared", said.get("count", 0)))


def _attention_needs(given: dict[str, Any]) -> dict[str, Any]:
    keys, values = type_of(given["k_cache"]), type_of(given["v_cache"])
    groups = int(given["num_heads"]) // int(given["num_kv_heads"])
    return {
        "position_bytes": float(keys.nbytes() // int(keys.shape[0]) + values.nbytes() // int(values.shape[0])),
        "position_macs": float(groups * (int(keys.shape[-1]) + int(values.shape[-1]))),
        "window": int(given["window"] or 0),
    }


def tick_calls(program: Program, video: bool) -> list[MethodCall]:
    """The calls of one tick in which the model hears, speaks and writes all it can, with a clip or without
    (runtimes/core/tick.py)."""
    tick, methods = program.meta["tick"], program.methods
    if program.meta["kind"] != "interaction":
        step = [MethodCall(method, 1) for method in ("next_token", "embed_text", "decode")]
        return step * int(tick["text_out"])
    audio, text_in, text_out, spoken = (int(tick[key]) for key in ("audio_in", "text_in", "text_out", "audio_out"))
    seen = int(tick["video_positions"]) if video else 0
    calls = [MethodCall("embed_audio", audio), MethodCall("embed_text", text_in)]
    calls += [MethodCall("embed_video", 1)] if seen else []
    calls.append(MethodCall("decode", audio + text_in + seen))
    for output in range(text_out):
        if output:
            calls += [MethodCall("embed_text", 1), MethodCall("decode", 1)]
        calls.append(MethodCall("next_token", 1))
    calls.append(MethodCall("embed_text", 2))
    for j in range(spoken):
        calls += [MethodCall("embed_speech", 1), MethodCall("decode", 1 if j else 3)]
        calls += [MethodCall("speak", 1), MethodCall("vocode", 1)]
    if not spoken:
        calls.append(MethodCall("decode", 2))
    return [call for call in calls if call.n and call.method in methods]


def weight_bytes(work: dict[str, list[OpWork]], program: Program, precision: str) -> float:
    """Bytes of all weights of the program, each once: products as `precision` stores them, the rest as they are."""
    products: dict[str, float] = {}
    for method in program.methods.values():
        for node in method.calls():
            given, bits = _call(node)[1], _bits(node, precision)
            for name, argument in ((name, given.get(name)) for name in PRODUCTS):
                if isinstance(argument, fx.Node) and argument.op == "placeholder" and len(type_of(argument).shape) >= 2:
                    products[role(argument)[1]] = bits[name]
    total = 0.0
    for name in program.used_weights():
        kind = program.weights[name].type
        total += kind.numel() * products[name] / 8 if name in products else kind.nbytes()
    return total


def session_bytes(program: Program) -> int:
    """Bytes of the states of one session."""
    return sum(spec.nbytes for spec in program.states.values())


def key_heads(program: Program) -> int:
    """How many ways attention's keys can be split: the fewest key heads of any layer, 1 without attention."""
    calls = (_call(node)[1] for method in program.methods.values() for node in method.calls())
    heads = [int(given["num_kv_heads"]) for given in calls if "num_kv_heads" in given]
    return min(heads, default=1)
