"""TensorRT as a target of the compiler: networks, engines and the plan that the runtime reads (docs/tensorrt.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from tmlc.emit.targets import Coverage, Emitted, Progress, Target
from tmlc.emit.tensorrt.library import Library, build_engine, open_library
from tmlc.emit.tensorrt.lowering import LOWERINGS, REFUSED
from tmlc.emit.tensorrt.network import SCALE, Binding, MethodNetwork, networks, refusal
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Program, StateSpec
from tmlc.ir.types import ITEM_BYTES
from tmlc.ir.weights import TensorSource
from tmlc.package.manifest import StateInfo

FOLDER = "engines/tensorrt"
PLAN = f"{FOLDER}/plan.json"
PLAN_VERSION = 1
FEATURE = "tensorrt.plan.v1"
ALIGN = 256  # what TensorRT asks of the address of a binding
BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)  # most positions of each optimization profile


class TensorRTTarget(Target):
    """Engines for one architecture of NVIDIA's GPUs, built here, whether or not there is such a GPU."""

    family = "tensorrt"
    precisions = ("fp16", "bf16", "fp32", "int8", "int4")
    caches = ("fp16", "bf16", "fp32", "int8")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.library = open_library(name)

    def coverage(self, program: Program) -> list[Coverage]:
        found: dict[tuple[str, str, str], list[tuple[fx.Node, str]]] = {}
        for method in program.methods.values():
            for node in method.graph.nodes:
                spec = spec_of(node.target) if node.op == "call_function" else None
                if spec is not None:
                    reason, fix = refusal(method, node, program, LOWERINGS, REFUSED)
                    found.setdefault((method.name, spec.name, reason), []).append((node, fix))
        return [
            Coverage(method, op, len(calls), None if reason else self.library.name, reason,
                     next((str(node.meta["source"]) for node, _ in calls if node.meta.get("source")), ""), calls[0][1])
            for (method, op, reason), calls in found.items()
        ]  # fmt: skip

    def emit(self, program: Program, source: TensorSource, tell: Progress) -> Emitted:
        tell("writing networks", 0, len(program.methods))
        made = networks(self.library, program, source, tell)
        states, slot_bytes, regions = slot_layout(program, list(made.values()))
        files: dict[str, Any] = {}
        plan = plan_of(self.library, list(made.values()), slot_bytes, regions)
        for number, net in enumerate(made.values()):
            profiles = profiles_of(net.most)
            files[engine_name(number, net.name)] = build_engine(
                self.library, net.builder, net.network, net.shapes(), profiles, net.name, net.graph.sources, tell
            )
            net.release()
        return Emitted(
            plan=PLAN,
            layout="tensorrt",
            files={PLAN: plan, **files},
            weights=(),
            methods=tuple(net.signature for net in made.values()),
            states=states,
            slot_bytes=slot_bytes,
            arena_bytes=0,  # what a GPU needs beside the engines is known when they are loaded there
            scratch_bytes=0,
            features=(FEATURE, *(["states.kv.int8"] if any(s.name.endswith(SCALE) for s in states) else [])),
            producer={self.library.name: self.library.version, "architecture": self.library.architecture},
        )


def engine_name(number: int, method: str) -> str:
    """The member of the package that holds a method's engine."""
    return f"{FOLDER}/{number}-{method}.engine"


def plan_of(
    library: Library, nets: list[MethodNetwork], slot_bytes: int, regions: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """The content of `plan.json`."""
    return {
        "version": PLAN_VERSION,
        "library": {"name": library.name, "version": library.version},
        "architecture": library.architecture,
        "slot_bytes": slot_bytes,
        "methods": [
            _method_entry(net, engine_name(number, net.name), profiles_of(net.most), regions[net.name])
            for number, net in enumerate(nets)
        ],
    }


def profiles_of(most: int) -> list[tuple[int, int, int]]:
    """(least, usual, most) positions of each optimization profile: 1, 2..4, 5..16, … up to `most`."""
    ends = [end for end in BUCKETS if end < most] + [most]
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [(start, end, end) for start, end in zip(starts, ends, strict=True)]


def slot_layout(
    program: Program, nets: list[MethodNetwork]
) -> tuple[tuple[StateInfo, ...], int, dict[str, tuple[int, int]]]:
    """The states in a slot, its bytes, and for each method the run of bytes that a call writes anew as a whole.

    A cache is written in place; any other state is an input and an output at two addresses, and what comes out is
    copied over what went in. These states of a method lie side by side, so that this is one copy.
    """
    bound = {b.detail["state"]: b for net in nets for b in net.bindings if b.kind == "state"}
    caches = {name for name, b in bound.items() if b.detail["cache"]}
    parts = {spec.name: _parts(spec, bound) for spec in program.states.values()}
    places: dict[str, int] = {}
    regions: dict[str, tuple[int, int]] = {}
    offset = 0

    def place(state: str) -> None:
        nonlocal offset
        for name, dtype, shape in parts[state]:
            places[name] = offset
            offset = _up(offset + math.prod(shape) * ITEM_BYTES[dtype])

    for method in program.methods:
        mine = [spec for spec in program.states.values() if spec.method == method]
        for spec in mine:
            if spec.kind == "position":
                place(spec.name)
        begin = offset
        for spec in mine:
            if spec.kind != "position" and spec.name not in caches:
                place(spec.name)
        regions[method] = (begin, offset - begin)
        for spec in mine:
            if spec.name in caches:
                place(spec.name)
    states = tuple(
        StateInfo(
            name, str(spec.kind), spec.method, dtype, shape, places[name], math.prod(shape) * ITEM_BYTES[dtype]
        )
        for spec in program.states.values()
        for name, dtype, shape in parts[spec.name]
    )  # fmt: skip
    return states, offset, regions


def _parts(spec: StateSpec, bound: Mapping[str, Binding]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of what a state is kept as: one tensor, but for a cache of codes, whose scales lie apart.
    TensorRT's codes are signed; for the package, which only counts their bytes, they are u8."""
    scale = spec.name + SCALE
    if scale not in bound:
        return [(spec.name, spec.dtype, tuple(int(size) for size in spec.shape))]
    shapes = [tuple(size for _, size in bound[name].shape) for name in (spec.name, scale)]
    return [(spec.name, "u8", shapes[0]), (scale, "f32", shapes[1])]


def _up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _method_entry(
    net: MethodNetwork, member: str, profiles: list[tuple[int, int, int]], region: tuple[int, int]
) -> dict[str, Any]:
    return {
        "name": net.name,
        "max_n": net.signature.max_n,
        "engine": member,
        "inputs": [_argument(s) for s in net.signature.inputs],
        "outputs": [_argument(s) for s in net.signature.outputs],
        "limits": net.limits,
        "profiles": [list(profile) for profile in profiles],
        "bindings": [binding.entry() for binding in net.bindings],
        "position": net.position,
        "context": net.context,
        "rings": [list(ring) for ring in net.rings],
        "rewritten": list(region),
        "layers": net.layers(),
    }


def _argument(signature: Any) -> dict[str, Any]:
    return {"dtype": signature.dtype, "rows": list(signature.rows), "cols": signature.cols}


TARGET = TensorRTTarget
