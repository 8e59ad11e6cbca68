"""state.insert: the stateless program becomes a streaming one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field
from torch import fx

from tmlc.errors import PipelineError
from tmlc.ir.ops.kv import int8_columns
from tmlc.ir.program import Fact, Method, Program, StateSpec, call, replace, type_of
from tmlc.passes.match import arg, named_args, weight_of
from tmlc.pipeline.pass_base import Pass, PassConfig, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: Caches and sinks are whole blocks of this many positions (docs/plan-format.md).
BLOCK = 16
_STATELESS = ("attention", "rope", "short_conv", "dynamic_conv", "dmel", "overlap_add")


@register_pass("state.insert")
class InsertState(Pass):
    """Rewrites attention, rotary positions, short convolution, audio framing and overlap-add into ops that continue
    from a state, and declares the states: a call then costs its new positions only, in memory that is bounded for ever.

    Sliding layers keep a ring of their window. Global layers follow the policy: `ring_with_sinks` keeps the first
    `sinks` positions and a ring of the last `context - sinks`; `end` keeps all `context` positions and then stops the
    session. `kv_dtype` is what keys and values are kept as: `int8` is codes with a scale for each position and kv head,
    half the bytes of `bf16`. Settings that are left out come from the model's own runtime defaults
    (`program.meta["context"]`).
    """

    class Config(PassConfig):
        context: int | None = Field(default=None, gt=0)
        policy: Literal["ring_with_sinks", "end"] | None = None
        sinks: int | None = Field(default=None, ge=0)
        max_append: int | None = Field(default=None, gt=0)
        kv_dtype: Literal["f32", "bf16", "f16", "int8"] = "f32"

    provides = frozenset({Fact.STATEFUL})
    config: Config

    @property
    def lossy(self) -> bool:
        return self.config.kv_dtype != "f32"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        bounds = self._bounds(program, result.notes)
        for method in program.methods.values():
            todo = [node for name in _STATELESS for node in method.calls(name)]
            if not todo:
                continue
            if method.calls("attention"):
                method.max_n = bounds.max_append
            _Rewriter(program, method, bounds, self.config.kv_dtype, result).run()
        program.meta["context"] = {
            "limit": bounds.context, "policy": bounds.policy, "sinks": bounds.sinks, "max_append": bounds.max_append
        }  # fmt: skip
        return result

    def _bounds(self, program: Program, notes: list[str]) -> _Bounds:
        model = program.meta.get("context", {})
        chosen: dict[str, Any] = {
            "context": self.config.context if self.config.context is not None else model.get("limit"),
            "policy": self.config.policy if self.config.policy is not None else model.get("policy"),
            "sinks": self.config.sinks if self.config.sinks is not None else model.get("sinks"),
            "max_append": self.config.max_append if self.config.max_append is not None else model.get("max_append"),
        }
        absent = [name for name, value in chosen.items() if value is None]
        if absent:
            raise PipelineError(
                f"state.insert does not know {', '.join(absent)}",
                where="state.insert",
                fix="the model has no default for it: set it in the pipeline",
            )
        bounds = _Bounds(**chosen)
        if bounds.policy == "end":
            bounds.sinks = 0
        if bounds.sinks % BLOCK:
            rounded = _blocks(bounds.sinks)
            notes.append(f"sinks {bounds.sinks} rounded up to {rounded}")
            bounds.sinks = rounded
        if bounds.policy == "ring_with_sinks" and bounds.sinks >= bounds.context:
            raise PipelineError(
                f"a context of {bounds.context} positions has no room beside {bounds.sinks} sinks",
                where="state.insert",
                fix="set a larger context, or fewer sinks",
            )
        return bounds


@dataclass
class _Bounds:
    context: int
    policy: str
    sinks: int
    max_append: int


@dataclass
class _Rewriter:
    """Rewrites one method."""

    program: Program
    method: Method
    bounds: _Bounds
    kv_dtype: str
    result: PassResult
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        rewrite = {
            "attention": self._attention,
            "rope": self._rope,
            "short_conv": self._short_conv,
            "dynamic_conv": self._dynamic_conv,
            "dmel": self._dmel,
            "overlap_add": self._overlap_add,
        }
        positions: fx.Node | None = None
        for node in self.method.calls():
            name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
            if name not in rewrite:
                continue
            index = self.counts.get(name, 0)
            self.counts[name] = index + 1
            if name in ("attention", "rope"):
                positions = positions or self._one_row_each(arg(node, "q" if name == "attention" else "x"))
            with self.method.graph.inserting_before(node):
                stateful = rewrite[name](node, index)
            replace(node, stateful)
            self.result.matches += 1
        if positions is not None:
            limit = self.bounds.context if self.bounds.policy == "end" else 0
            with self.method.graph.inserting_before(self.method.output_node):
                call(self.method.graph, "advance", (self._position(), positions, limit))

    def _one_row_each(self, q: fx.Node) -> fx.Node:
        """A value with one row for each new position; an input, where there is one, keeps no buffer alive."""
        return next((node for node in self.method.inputs if type_of(node).rows == type_of(q).rows), q)

    def _state(self, place: str, what: str, kind: str, shape: tuple[int, ...], dtype: str = "f32") -> fx.Node:
        """A new state `<method>.<place>.<what>` and its placeholder."""
        name, number = f"{self.method.name}.{place}.{what}", 2
        while name in self.program.states:
            name, number = f"{self.method.name}.{place}.{what}.{number}", number + 1
        return self.program.add_state_input(self.method, StateSpec(name, kind, shape, dtype, self.method.name))

    def _position(self) -> fx.Node:
        spec = StateSpec(f"{self.method.name}.position", "position", (1, 1), "i64", self.method.name)
        return self.program.add_state_input(self.method, spec)

    def _cannot(self, node: fx.Node, reason: str) -> PipelineError:
        where = f"{self.method.name}/{node.name}"
        return PipelineError(f"state.insert: {reason}", where=where, fix="change the model's configuration")

    def _attention(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        window, sinks = args["window"], args["sinks"]
        if sinks % BLOCK:
            raise self._cannot(node, f"it keeps {sinks} sinks, which is not a multiple of {BLOCK}")
        if window == 0 and self.bounds.policy == "ring_with_sinks":
            window, sinks = self.bounds.context - self.bounds.sinks, self.bounds.sinks
        if window == 0:
            kind, capacity = "kv_linear", _blocks(self.bounds.context)
        else:
            kind, capacity = "kv_ring", sinks + _blocks(window - 1 + self.bounds.max_append)
        place, _ = _place(weight_of(args["rel_table"]), index)
        widths = {what: int(type_of(args[what]).cols) for what in "kv"}
        dtype = self.kv_dtype
        if dtype == "int8":  # bytes: codes, and a scale for each head
            dtype, groups = "u8", int(args["num_kv_heads"])
            widths = {what: groups * int8_columns(width // groups) for what, width in widths.items()}
        caches = [self._state(place, f"{what}_cache", kind, (capacity, widths[what]), dtype) for what in "kv"]
        head = (args["q"], args["k"], args["v"], self._position(), *caches, args["rel"], args["rel_table"])
        tail = (
            args["num_heads"],
            args["num_kv_heads"],
            args["scale"],
            window,
            sinks,
            args["log_floor"],
            args["log_alpha"],
            args["sink_logits"],
            args["softcap"],
        )
        return call(self.method.graph, "attention_state", (*head, *tail))

    def _rope(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        return call(self.method.graph, "rope_state", (args.pop("x"), self._position(), *args.values()))

    def _short_conv(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        weight = type_of(args["weight"])
        if weight.cols < 2:
            raise self._cannot(node, "a convolution of one tap has no history")
        place, module = _place(weight_of(args["weight"]), index)
        what = f"{module}_tail" if module else "tail"
        tail = self._state(place, what, "conv_tail", (weight.cols - 1, type_of(args["x"]).cols))
        return call(self.method.graph, "short_conv_state", (args["x"], args["weight"], tail, args["residual"]))

    def _dynamic_conv(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        taps, channels = type_of(args["weight"]).shape
        if taps < 2:
            raise self._cannot(node, "a convolution of one tap has no history")
        place, module = _place(weight_of(args["weight"]), index)
        tail = self._state(place, f"{module}_tail" if module else "tail", "conv_tail", (taps - 1, channels))
        head = (args["x"], args["weight"], args["taps"], tail)
        return call(self.method.graph, "dynamic_conv_state", (*head, args["residual"]))

    def _dmel(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        kept = type_of(args["window"]).cols - type_of(args["pcm"]).cols
        tail = self._state(str(index), "audio_window", "audio_window", (1, kept))
        numbers = (args["lo"], args["hi"], args["levels"])
        return call(self.method.graph, "dmel_state", (args["pcm"], args["window"], args["filters"], tail, *numbers))

    def _overlap_add(self, node: fx.Node, index: int) -> fx.Node:
        args = named_args(node)
        kept = type_of(args["frames"]).cols - args["hop"]
        overlap = self._state(str(index), "overlap", "overlap", (1, kept))
        return call(self.method.graph, "overlap_add_state", (args["frames"], args["window"], overlap, args["hop"]))


def _blocks(positions: int) -> int:
    """Rounded up to whole blocks."""
    return -(-positions // BLOCK) * BLOCK


def _place(weight: str | None, index: int) -> tuple[str, str]:
    """(layer number, module name) that a weight's name tells: `model.layers.3.self_attn.k_sconv.conv1d.weight` → 3,
    k_sconv. Without a number in the name, the op's index in its method."""
    parts = (weight or "").split(".")
    numbers = [part for part in parts if re.fullmatch(r"\d+", part)]
    names = [part for part in parts if part not in ("weight", "static_weight", "conv1d", "") and part not in numbers]
    return numbers[0] if numbers else str(index), names[-1] if names else ""
