"""One entry for each canonical op: the kernel that runs it on the CPU, and how its arguments become
operands."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import fx

from tmlc.ir.replaced import REPLACED, TRITON_ONLY

if TYPE_CHECKING:
    from tmlc.emit.cpu import Value, _MethodEmitter

BLOCK = 16

# Ops that never reach an engine, and what takes their place.
REFUSED = REPLACED | TRITON_ONLY


@dataclass(frozen=True)
class Call:
    """One node that is being lowered: its arguments by name, and where its outputs go."""

    emitter: "_MethodEmitter"
    node: fx.Node
    args: dict[str, Any]
    outputs: "list[Value]"

    def x(self, name: str) -> "Value":
        """An activation; a weight where the model adds one to activations."""
        node = self.args[name]
        if node.meta.get("role", ("",))[0] == "weight":
            return self.weight(name)
        return self.emitter.value(node)

    def weight(self, name: str, form: str = "plain") -> "Value":
        return self.emitter.weight(self.args[name], form)

    def optional(self, name: str) -> "list[Value]":
        return [] if self.args.get(name) is None else [self.x(name)]

    def state(self, name: str) -> "Value":
        """A state in the shape in which the program has it."""
        kind = self.args[name].meta["type"]
        rows, cols = (int(size) for size in kind.shape)
        return self.emitter.state(self.args[name], kind.dtype, rows, cols)

    def emit(
        self, op: str, t: "list[Value]", i: list[int] | None = None, f: list[float] | None = None
    ) -> None:
        self.emitter.call(op, [*self.outputs, *t], i or [], f or [])


@dataclass(frozen=True)
class Lowering:
    """The kernel's name in the library, and what writes the call."""

    kernel: str
    lower: Callable[[Call], None]


def _elementwise(kernel: str, operands: list[str], numbers: tuple[str, ...] = ()) -> Lowering:
    def lower(c: Call) -> None:
        c.emit(kernel, [c.x(name) for name in operands], f=[c.args[name] for name in numbers])

    return Lowering(kernel, lower)


def _rms_norm(c: Call) -> None:
    c.emit("rms_norm", [c.x("x"), c.weight("weight")], f=[c.args["eps"]])


def _add_rms_norm(c: Call) -> None:
    c.emit("add_rms_norm", [c.x("x"), c.x("residual"), c.weight("weight")], f=[c.args["eps"]])


def _embedding(c: Call) -> None:
    c.emit("embedding", [c.x("ids"), c.weight("table")])


def _bag_embedding(c: Call) -> None:
    c.emit("bag_embedding", [c.x("levels"), c.weight("table")], [c.args["per_bin"]])


def _linear(c: Call) -> None:
    c.emit("linear", [c.x("x"), c.weight("weight", "k16"), *c.optional("bias")])


def _epilogue(c: Call) -> tuple[list["Value"], int]:
    """The operands of an epilogue and the flags that say which there are (docs/plan-format.md, "Epilogues")."""
    t: list[Value] = []
    flags = 0
    if c.args.get("scale") is not None:
        t, flags = [*t, c.weight("scale")], flags | 4
    if c.args.get("taps") is not None:
        t, flags = [*t, c.weight("taps", "taps"), c.state("tail")], flags | 8
    if c.args.get("addend") is not None:
        t, flags = [*t, c.x("addend")], flags | 16
    return t, flags


def _linear_epilogue(c: Call) -> None:
    bias = c.optional("bias")
    after, flags = _epilogue(c)
    i = [flags | (1 if bias else 0), c.args.get("start", 0), int(c.args.get("residual", False))]
    t = [c.x("x"), c.weight("weight", "k16"), *bias, *after]
    c.emit("linear", t, i, [c.args.get("level", 1.0)])


def _scale_by(c: Call) -> None:
    c.emit("scale_by", [c.x("x"), c.weight("s")])


def _add_row(c: Call) -> None:
    c.emit("add_row", [c.x("x"), c.weight("rows")], [c.args["index"]])


def _short_conv(c: Call) -> None:
    t = [c.x("x"), c.weight("weight", "taps"), c.state("tail")]
    c.emit("short_conv", t, [int(c.args["residual"])])


def _dynamic_conv(c: Call) -> None:
    t = [c.x("x"), c.weight("weight"), c.x("taps"), c.state("tail")]
    c.emit("dynamic_conv", t, [int(c.args["residual"])])


def _l2_clip(c: Call) -> None:
    c.emit("l2_clip", [c.x("x"), *c.optional("scale")], [c.args["num_heads"]], [c.args["threshold"]])


def _mix_blocks(c: Call) -> None:
    c.emit("mix_blocks", [c.x("x"), c.weight("queries")], f=[c.args["eps"]])


def _attention(c: Call) -> None:
    heads, groups = int(c.args["num_heads"]), int(c.args["num_kv_heads"])
    cache = c.args["k_cache"].meta["type"]
    capacity, width = (int(size) for size in cache.shape)
    if capacity % BLOCK or int(c.args["sinks"]) % BLOCK:
        what = f"a cache of {capacity} positions with {c.args['sinks']} sinks is not made of blocks of {BLOCK}"
        raise c.emitter.fail(c.node, what, "Let state.insert make the caches: it rounds them up.")
    values = c.args["v_cache"].meta["type"]
    k_cache = c.emitter.state(c.args["k_cache"], cache.dtype, groups * capacity // BLOCK, width // groups * BLOCK)
    v_width = int(values.shape[1]) // groups
    v_rows, v_cols = (capacity // BLOCK, v_width * BLOCK) if values.dtype == "u8" else (capacity, v_width)
    v_cache = c.emitter.state(c.args["v_cache"], values.dtype, groups * v_rows, v_cols)
    t = [c.x("q"), c.x("k"), c.x("v"), c.state("position"), k_cache, v_cache]
    bias, sink_logits = c.optional("rel") + c.optional("rel_table"), c.optional("sink_logits")
    flags = (1 if bias else 0) + (2 if sink_logits else 0)
    i = [heads, groups, c.args["window"], c.args["sinks"], capacity, flags]
    f = [c.args["scale"], c.args["log_floor"], c.args["log_alpha"], c.args["softcap"]]
    c.emit("attention", [*t, *bias, *sink_logits], i, f)


def _rope(c: Call) -> None:
    i = [c.args["num_heads"], c.args["offset"], int(c.args["interleaved"])]
    c.emit("rope", [c.x("x"), c.state("position"), c.weight("inv_freq")], i, [c.args["scaling"]])


def _head_columns(c: Call) -> None:
    c.emit("head_columns", [c.x("x")], [c.args["num_heads"], c.args["start"], c.args["stop"]])


def _concat_heads(c: Call) -> None:
    c.emit("concat_heads", [c.x("a"), c.x("b")], [c.args["num_heads"], c.args["shared"]])


def _advance(c: Call) -> None:
    c.emit("advance", [c.state("position")], [c.args["limit"]])


def _sink_router(c: Call) -> None:
    t = [c.x("logits"), c.weight("bias"), c.weight("scale")]
    c.emit("sink_router", t, [c.args["top_k"], c.args["n_shared"]], [c.args["route_scale"]])


def _router(c: Call) -> None:
    t = [c.x("x"), c.weight("weight", "k16"), c.weight("bias"), c.weight("scale")]
    c.emit("router", t, [c.args["top_k"], c.args["n_shared"]], [c.args["route_scale"]])


def _topk_router(c: Call) -> None:
    i = [c.args["scores"], c.args["top_k"], int(c.args["normalise"]), c.args["groups"], c.args["top_groups"]]
    c.emit("topk_router", [c.x("logits"), *c.optional("bias")], i, [c.args["scale"]])


def _moe(c: Call) -> None:
    experts, _, f = (int(size) for size in c.args["down"].meta["type"].shape)
    t = [c.x("x"), c.x("weights"), c.x("experts")]
    t += [c.weight("gate_up", "k16.gate_up"), c.weight("down", "k16.experts")]
    biases = c.optional("gate_up_bias") + c.optional("down_bias")
    alpha, limit, grouped_from = c.args["alpha"], c.args["limit"], c.args["grouped_from"]
    caps = [c.args["gate_cap"], c.args["up_cap"]] if c.args["gate_cap"] else []
    after, after_flags = _epilogue(c)
    flags = (1 if biases else 0) + (2 if caps else 0)
    if after or grouped_from:
        i = [experts, f, flags | after_flags, grouped_from, 0, int(c.args.get("residual", False))]
        numbers = [alpha, limit, c.args["gate_cap"], c.args["up_cap"], c.args.get("level", 1.0)]
        c.emit("moe", [*t, *biases, *after], i, numbers)
    elif biases or alpha or caps:
        c.emit("moe", [*t, *biases], [experts, f, flags], [alpha, limit, *caps])
    else:
        c.emit("moe", t, [experts, f])


def _dmel(c: Call) -> None:
    t = [c.x("pcm"), c.weight("window"), c.weight("filters"), c.state("tail")]
    c.emit("dmel", t, [c.args["levels"]], [c.args["lo"], c.args["hi"]])


def _patchify(c: Call) -> None:
    folds = list(c.args["folds"])
    i = [c.args["frames"], c.args["height"], c.args["patch"], len(folds) // 2, *folds]
    if prod(folds[0::2]) != c.args["frames"]:
        what = f"folds {folds} do not make clips of {c.args['frames']} frames"
        raise c.emitter.fail(c.node, what, "Change the model: the product of the folds of time is a clip.")
    c.emit("patchify", [c.x("video")], i, [*c.args["mean"], *c.args["std"]])


def _philox_normal(c: Call) -> None:
    c.emit("philox_normal", [c.x("key")])


def _head_sample(c: Call) -> None:
    t = [c.x("x"), c.weight("weight", "k16"), c.x("key"), c.x("temperature"), *c.optional("bias")]
    c.emit("head_sample", t, [c.args["entries"]], [c.args["alpha"], c.args["cap"]])


def _overlap_add(c: Call) -> None:
    c.emit("overlap_add", [c.x("frames"), c.weight("window"), c.state("overlap")])


LOWERINGS: dict[str, Lowering] = {
    "embedding": Lowering("embedding", _embedding),
    "bag_embedding": Lowering("bag_embedding", _bag_embedding),
    "rms_norm": Lowering("rms_norm", _rms_norm),
    "add_rms_norm": Lowering("add_rms_norm", _add_rms_norm),
    "linear": Lowering("linear", _linear),
    "add": _elementwise("add", ["a", "b"]),
    "mul": _elementwise("mul", ["a", "b"]),
    "add_scaled": _elementwise("add_scaled", ["a", "b"], ("alpha",)),
    "scale": _elementwise("scale", ["x"], ("alpha",)),
    "scale_by": Lowering("scale_by", _scale_by),
    "add_row": Lowering("add_row", _add_row),
    "silu": _elementwise("silu", ["x"]),
    "gelu": _elementwise("gelu", ["x"]),
    "swiglu": _elementwise("swiglu", ["gate", "up"]),
    "clamp": _elementwise("clamp", ["x"], ("lo", "hi")),
    "modulate": _elementwise("modulate", ["x", "scale", "shift"]),
    "short_conv_state": Lowering("short_conv", _short_conv),
    "dynamic_conv_state": Lowering("dynamic_conv", _dynamic_conv),
    "sigmoid": _elementwise("sigmoid", ["x"]),
    "softcap": _elementwise("softcap", ["x"], ("cap",)),
    "l2_clip": Lowering("l2_clip", _l2_clip),
    "concat_columns": _elementwise("concat_columns", ["a", "b"]),
    "mix_blocks": Lowering("mix_blocks", _mix_blocks),
    "attention_state": Lowering("attention", _attention),
    "rope_state": Lowering("rope", _rope),
    "head_columns": Lowering("head_columns", _head_columns),
    "concat_heads": Lowering("concat_heads", _concat_heads),
    "advance": Lowering("advance", _advance),
    "sink_router": Lowering("sink_router", _sink_router),
    "router": Lowering("router", _router),
    "topk_router": Lowering("topk_router", _topk_router),
    "moe": Lowering("moe", _moe),
    "linear_add": Lowering("linear", _linear_epilogue),
    "linear_conv_state": Lowering("linear", _linear_epilogue),
    "moe_add": Lowering("moe", _moe),
    "moe_conv_state": Lowering("moe", _moe),
    "dmel_state": Lowering("dmel", _dmel),
    "patchify": Lowering("patchify", _patchify),
    "philox_normal": Lowering("philox_normal", _philox_normal),
    "sample": _elementwise("sample", ["logits", "key", "temperature"]),
    "overlap_add_state": Lowering("overlap_add", _overlap_add),
    "head_sample": Lowering("head_sample", _head_sample),
}

# Views cost nothing: another entry of the tensor table over the same bytes.
VIEWS = {"columns": "(view)", "reshape": "(view)"}


def kernel_names() -> dict[str, str]:
    """The kernel behind each op that the CPU can run."""
    return {op: lowering.kernel for op, lowering in LOWERINGS.items()} | VIEWS
