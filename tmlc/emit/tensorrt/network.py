"""One method of a program as a TensorRT network: its bindings, its values, and the walk over its calls."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from tmlc.emit.packing import check_finite
from tmlc.emit.tensorrt.graph import Graph, Tensor
from tmlc.emit.tensorrt.library import Library, Tell, make_logger, make_network
from tmlc.errors import REPORT, EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.quantize import SCHEMES, Codes, quantise
from tmlc.ir.types import QUANTISED
from tmlc.ir.weights import TensorSource
from tmlc.package.manifest import MethodInfo, Signature

ROWS, END = "position.rows", "position.end"
CHANGE = "Compile for --target cpu, or change the model."
CONSTANT = {
    "embedding": ("table",),
    "bag_embedding": ("table",),
    "rms_norm": ("weight",),
    "add_rms_norm": ("weight",),
    "linear": ("weight", "bias"),
    "linear_add": ("weight", "bias", "scale"),
    "linear_conv_state": ("weight", "bias", "scale", "taps"),
    "scale_by": ("s",),
    "add_row": ("rows",),
    "short_conv_state": ("weight",),
    "dynamic_conv_state": ("weight",),
    "l2_clip": ("scale",),
    "mix_blocks": ("queries",),
    "rope_state": ("inv_freq",),
    "attention_state": ("rel_table",),
    "router": ("weight", "bias", "scale"),
    "sink_router": ("bias", "scale"),
    "topk_router": ("bias",),
    "moe": ("gate_up", "down", "gate_up_bias", "down_bias"),
    "moe_add": ("gate_up", "down", "gate_up_bias", "down_bias"),
    "moe_conv_state": ("gate_up", "down", "gate_up_bias", "down_bias", "taps"),
    "dmel_state": ("window", "filters"),
    "overlap_add_state": ("window",),
    "head_sample": ("weight", "bias"),
}
"""Operands that an engine holds: a network has them as constants."""
SCALE = ".scale"  # the part of a cache of codes that holds its scales
SCRATCH_BYTES = 512 * 2**20  # of gathered experts: a call that would gather more is cut by the runtime


@dataclass(frozen=True)
class Binding:
    """One input or output of a network.

    Attributes:
        name, dtype: as in the network.
        kind: "input" and "output" (argument `index` of the method), "noise" (random numbers that the host makes),
            "position" (absolute positions of the new rows, and of the last one), "state" and "next" (a state as it is,
            and as it will be; a cache's are one memory).
        shape: every dimension as (a, b), meaning a·n + b.
        detail: of noise, {"op", "key", "temperature"}; of states, {"state", "cache"}.
    """

    name: str
    dtype: str
    kind: str
    shape: tuple[tuple[int, int], ...]
    index: int = -1
    detail: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As it stands in the plan."""
        dims = [list(pair) for pair in self.shape]
        place = {"index": self.index} if self.kind in ("input", "output") else {}
        return {"name": self.name, "kind": self.kind, "dtype": self.dtype, "shape": dims, **place, **self.detail}


@dataclass
class MethodNetwork:
    """What the emitter makes of a method, before anything is built.

    Attributes:
        network, builder, graph: TensorRT's objects, and what holds the constants.
        bindings: inputs and outputs of the network.
        signature: the method as the manifest has it.
        limits: for each argument, what its whole numbers must stay below (0: nothing is known).
        most: positions that one run takes; the runtime cuts longer calls.
        rings: (capacity, sinks) of caches where a call must not pass from the last index to the first of the ring.
        position: the state that counts positions, or "".
        context: positions after which the session ends (0: never).
    """

    name: str
    builder: Any
    network: Any
    graph: Graph
    bindings: list[Binding]
    signature: MethodInfo
    limits: list[int]
    most: int
    rings: list[tuple[int, int]]
    position: str
    context: int

    def layers(self) -> dict[str, int]:
        """How many layers of each kind there are."""
        kind = self.graph.trt.ILayer.type.__get__
        kinds = (kind(self.network.get_layer(k)) for k in range(self.network.num_layers))
        return dict(sorted(Counter(str(k).rpartition(".")[2].lower() for k in kinds).items()))

    def release(self) -> None:
        """Lets go of the constants, once the engine has them. The network is of no use after this."""
        self.graph.constants.clear()

    def shapes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """The inputs whose shape depends on n."""
        inputs = (b for b in self.bindings if b.kind not in ("output", "next"))
        return {b.name: b.shape for b in inputs if any(a for a, _ in b.shape)}


@dataclass(frozen=True)
class Quantised:
    """A weight of codes: values [..., K] = scale · (code - zero), in groups along the last axis."""

    codes: Codes
    shape: tuple[int, ...]


class MethodWriter:
    """Writes the network of one method."""

    def __init__(self, library: Library, program: Program, method: Method, source: TensorSource) -> None:
        self.program, self.method, self.source = program, method, source
        builder = library.api.Builder(make_logger(library))
        self.graph = Graph(library, builder, make_network(library, builder), method.name)
        self.values: dict[tuple[fx.Node, int], Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.bindings: list[Binding] = []
        self.limits: list[int] = []
        self.rings: set[tuple[int, int]] = set()
        self.most = method.max_n
        self.position, self.context = "", 0
        self.node: fx.Node = method.output_node
        self._evaluated: dict[str, torch.Tensor] = {}
        self._counted: dict[str, Tensor] = {}

    def write(self) -> MethodNetwork:
        """The whole network. Raises EmitError at the first call that cannot be lowered."""
        from tmlc.emit.tensorrt.lowering import LOWERINGS, REFUSED

        inputs: list[Signature] = []
        for node in self.method.inputs:
            inputs.append(self._argument(node, len(inputs)))
        for node in self.method.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            self.node = node
            spec, (reason, fix) = spec_of(node.target), refusal(self.method, node, self.program, LOWERINGS, REFUSED)
            if reason or spec is None:
                raise self.fail(reason, fix)
            self.graph.begin(node.name, f"{spec.name}, {node.meta.get('source', self.method.name)}")
            try:
                results = LOWERINGS[spec.name](Call(self, node, dict(zip(spec.args, node.args, strict=True))))
            except RuntimeError as error:  # a shape that TensorRT could not give a tensor
                said = self.graph.builder.logger.errors
                raise self.fail(" ".join(str(said[0] if said else error).split())[:300], REPORT) from error
            for index, tensor in enumerate(results if isinstance(results, tuple) else (results,)):
                if tensor is not None:
                    self.values[node, index] = tensor
        outputs = self._outputs()
        signature = MethodInfo(self.method.name, tuple(inputs), tuple(outputs), self.method.max_n)
        g = self.graph
        return MethodNetwork(
            self.method.name, g.builder, g.network, g, self.bindings, signature, self.limits, self.most,
            sorted(self.rings), self.position, self.context,
        )  # fmt: skip

    def fail(self, reason: str, fix: str = "") -> EmitError:
        """The error of the call that is being lowered."""
        spec = spec_of(self.node.target) if self.node.op == "call_function" else None
        what = f"op {spec.name if spec else self.node.name} cannot be lowered to TensorRT: {reason}"
        place = f"method {self.method.name}, {self.node.meta.get('source', self.node.name)}"
        return EmitError(what, where=place, fix=fix or CHANGE)

    # Arguments and results.

    def _argument(self, node: fx.Node, index: int) -> Signature:
        kind, name = type_of(node), role(node)[1]
        rows, cols = _pair(kind.shape[0]), int(kind.shape[1])
        self.graph.begin(f"in_{index}", f"argument {name} of {self.method.name}")
        if _is_key(node):
            self.limits.append(0)
            return Signature(name, "i64", rows, cols)
        dtype = "i32" if kind.dtype == "i64" else kind.dtype
        self.limits.append(_limit(node) if dtype == "i32" else 0)
        if node.users:  # TensorRT refuses an input that nothing reads
            binding = self.bind(f"in.{index}", dtype, "input", (rows, (0, cols)), index)
            self.values[node, 0] = binding
        return Signature(name, dtype, rows, cols)

    def _outputs(self) -> list[Signature]:
        names = self.program.meta.get("outputs", {}).get(self.method.name, [])
        signatures = []
        for index, node in enumerate(self.method.outputs):
            self.graph.begin(f"out_{index}", f"result {index} of {self.method.name}")
            kind = type_of(node)
            rows, cols = _pair(kind.shape[0]), int(kind.shape[1])
            dtype = "i32" if kind.dtype == "i64" else kind.dtype
            self.graph.output(self.value(node), f"out.{index}")
            self.bindings.append(Binding(f"out.{index}", dtype, "output", (rows, (0, cols)), index))
            name = names[index] if index < len(names) else f"out{index}"
            signatures.append(Signature(name, dtype, rows, cols))
        return signatures

    def bind(self, name: str, dtype: str, kind: str, shape: tuple[tuple[int, int], ...], index: int = -1,
             detail: dict[str, Any] | None = None) -> Tensor:  # fmt: skip
        """A new input of the network."""
        self.bindings.append(Binding(name, dtype, kind, shape, index, detail or {}))
        return self.graph.input(name, dtype, [-1 if a else b for a, b in shape])

    def value(self, node: fx.Node) -> Tensor:
        """The tensor of an activation or an argument."""
        if node.target is operator.getitem:
            return self.values[node.args[0], int(node.args[1])]  # type: ignore[index, arg-type]
        return self.values[node, 0]

    # Positions.

    def positions(self, state: str, end: bool = False) -> tuple[Tensor, Tensor | None]:
        """int32 [n, 1], the absolute position of each new row, and with `end` [1, 1], that of the last one. The runtime
        counts."""
        if self.position not in ("", state):
            raise self.fail(f"it counts {state} beside {self.position}")
        if not self.position:
            self.position = state
        if ROWS not in self._counted:
            self._counted[ROWS] = self.bind(ROWS, "i32", "position", ((1, 0), (0, 1)))
        if end and END not in self._counted:
            self._counted[END] = self.bind(END, "i32", "position", ((0, 1), (0, 1)))
        return self._counted[ROWS], self._counted.get(END)

    # Weights.

    def evaluated(self, name: str) -> torch.Tensor:
        """A weight's numbers. Raises CheckpointError when they are not finite."""
        if name not in self._evaluated:
            tensor = self.program.weights.evaluate(name, self.source)
            check_finite(tensor, name)
            self._evaluated = {name: tensor}  # the last one only: a constant keeps its own copy
        return self._evaluated[name]

    def quantised(self, name: str) -> Quantised:
        """The codes of a quantised weight."""
        entry = self.program.weights[name]
        floats = self.evaluated(entry.srcs[0])
        flat = floats.reshape(-1, floats.shape[-1])
        return Quantised(quantise(flat, SCHEMES[entry.dtype]), tuple(floats.shape))


@dataclass(frozen=True)
class Call:
    """A call that is being lowered: its arguments by name."""

    writer: MethodWriter
    node: fx.Node
    args: dict[str, Any]

    @property
    def g(self) -> Graph:
        return self.writer.graph

    def x(self, name: str) -> Tensor:
        """An activation; a float32 weight, two-dimensional, where the model adds one to activations."""
        node = self.args[name]
        if self.is_weight(name):
            return self.floats(name, (-1, int(node.meta["type"].cols)))
        return self.writer.value(node)

    def has(self, name: str) -> bool:
        return self.args.get(name) is not None

    def is_weight(self, name: str) -> bool:
        return bool(self.args[name].meta.get("role", ("",))[0] == "weight")

    def weight_name(self, name: str) -> str:
        """The weight behind an operand that is one."""
        return role(self.args[name])[1]

    def numpy(self, name: str) -> np.ndarray:
        """A weight as float32, for what the compiler computes with it."""
        return self.writer.evaluated(self.weight_name(name)).float().numpy()

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight as a float32 constant of this shape."""
        weight = self.weight_name(name)
        key = ("floats", weight, shape)
        return self.g.once(key, lambda: self.g.floats(self.numpy(name).reshape(shape)))

    def heavy(self, name: str) -> tuple[Tensor, str]:
        """A weight that a product reads, in the type that the program gives it, and that type."""
        weight = self.weight_name(name)
        entry = self.writer.program.weights[weight]
        return self.g.once(("heavy", weight), lambda: self._stored(weight, entry.dtype)), entry.dtype

    def _stored(self, weight: str, dtype: str) -> Tensor:
        tensor = self.writer.evaluated(weight).contiguous()
        if dtype == "bf16":
            return self.g.constant(tensor.view(torch.int16).numpy().view(np.uint16), "bf16")
        return self.g.constant(tensor.numpy(), dtype)

    def codes(self, name: str) -> Quantised | None:
        """The codes of an operand, or None where it has none."""
        weight = self.weight_name(name)
        if self.writer.program.weights[weight].dtype not in QUANTISED:
            return None
        return self.writer.quantised(weight)

    def state(self, name: str, dtype: str, shape: tuple[int, ...], cache: bool = False, part: str = "") -> Tensor:
        """A state as it is when the call begins; `part` names another tensor that belongs to it."""
        state = role(self.args[name])[1] + part
        if state not in self.writer.states:
            dims = tuple((0, size) for size in shape)
            detail = {"state": state, "cache": cache}
            made = self.writer.bind(f"state.{state}", dtype, "state", dims, detail=detail)
            self.writer.states[state] = made
        return self.writer.states[state]

    def keep(self, name: str, tensor: Tensor, dtype: str, cache: bool = False, part: str = "") -> None:
        """What a state becomes. A cache's tensor is an output already."""
        state = role(self.args[name])[1] + part
        binding = f"next.{state}"
        dims = tuple((0, int(size)) for size in tensor.shape)
        self.writer.bindings.append(Binding(binding, dtype, "next", dims, -1, {"state": state, "cache": cache}))
        if not cache:
            self.g.output(tensor, binding)


Lower = Callable[[Call], Any]


def _pair(size: Any) -> tuple[int, int]:
    return (size.a, size.b) if isinstance(size, Dim) else (0, int(size))


def _is_key(node: fx.Node) -> bool:
    """True for the keys of random numbers, which the host works with."""
    readers = [(spec_of(user.target), user) for user in node.users]
    return any(spec and "key" in spec.args and user.args[spec.args.index("key")] is node for spec, user in readers)


def _limit(node: fx.Node) -> int:
    """Ids must be rows of every table that is looked up with them."""
    sizes = []
    for user in node.users:
        spec = spec_of(user.target)
        args: dict[str, Any] = dict(zip(spec.args, user.args, strict=True)) if spec is not None else {}
        if spec is not None and spec.name == "embedding":
            sizes.append(int(args["table"].meta["type"].shape[0]))
        if spec is not None and spec.name == "bag_embedding":
            sizes.append(int(args["per_bin"]))
    return min(sizes, default=0)


def refusal(
    method: Method, node: fx.Node, program: Program, lowerings: dict[str, Lower], refused: dict[str, str]
) -> tuple[str, str]:
    """(why a call cannot be lowered, what to do), both empty where it can: known before anything is built."""
    spec = spec_of(node.target)
    if spec is None:
        return f"{node.target} is not a canonical op", CHANGE
    if spec.name not in lowerings:
        return refused.get(
            spec.name, "TensorRT has no lowering for it"
        ), "Use the pipeline of the target: --preset tensorrt."
    args: dict[str, Any] = dict(zip(spec.args, node.args, strict=True))
    if "key" in args and args["key"] not in method.inputs:
        return "its key is computed, and only an argument of the method can be one", CHANGE
    for name in CONSTANT.get(spec.name, ()):
        if args.get(name) is None:
            continue
        kind, weight = args[name].meta.get("role", ("", ""))
        if kind != "weight":
            return f"its operand {name} is computed, and the engine holds it as a constant", CHANGE
        if program.weights[weight].dtype in QUANTISED and name not in ("weight", "gate_up", "down"):
            return f"its operand {name} has codes, and only linear and moe take these", "Exclude it from quantisation."
    return "", ""


def networks(
    library: Library, program: Program, source: TensorSource, tell: Tell | None = None
) -> dict[str, MethodNetwork]:
    """The networks of all methods. Nothing is built: they can be looked at and evaluated without a GPU."""
    made = {}
    for number, (name, method) in enumerate(program.methods.items()):
        made[name] = MethodWriter(library, program, method, source).write()
        if tell is not None:
            tell("writing networks", number + 1, len(program.methods))
    return made
