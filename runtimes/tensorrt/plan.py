"""Reads `engines/tensorrt/plan.json`: which engine runs which method, and what its bindings are (docs/tensorrt.md).

A plan may come from a stranger. Every field is checked for type and range here, and against the others: what a binding
reads or writes lies inside the slot and is what the engine's own binding says (`check_engine`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmlc.errors import PackageError
from tmlc.package.fields import AGAIN, Fields
from tmlc.package.manifest import StateInfo
from tmlc.runtimes.core.backend import DTYPES, MethodSpec, TensorSpec

VERSION = 1
LIBRARIES = ("tensorrt_rtx", "tensorrt")
KINDS = ("input", "output", "noise", "position", "state", "next")
ITEM = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i64": 8, "u8": 1, "i8": 1}
STORED = {"i8": "u8"}  # what a state of that type is in the manifest
NOISE = ("normal", "gumbel")
ROWS, END = "position.rows", "position.end"
MAX_DIM, MAX_BYTES, MAX_N = 2**31, 2**40, 2**24
ALIGN = 256

Dim = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Binding:
    """One input or output of an engine; every dimension of `shape` is (a, b), meaning a·n + b.

    Attributes:
        kind: see KINDS.
        index: argument of the method, for inputs and outputs.
        op, key, temperature: of noise: what numbers, and which arguments are its keys and its temperature (-1: none).
        offset: of states, where it lies in the slot.
        cache: of states, that the engine writes where it reads.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[Dim, ...]
    index: int = -1
    op: str = ""
    key: int = -1
    temperature: int = -1
    offset: int = 0
    cache: bool = False

    def at(self, n: int) -> tuple[int, ...]:
        """The shape in a run with n positions."""
        return tuple(a * n + b for a, b in self.shape)

    def nbytes(self, n: int) -> int:
        return math.prod(self.at(n)) * ITEM[self.dtype]


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """One method: its signature, its engine and how to run it.

    Attributes:
        engine: the member of the package that holds the serialised engine.
        limits: for each argument, what its numbers must stay below (0: anything goes).
        profiles: (least, usual, most) positions of each optimization profile, joined without a gap.
        position: offset of the count of positions in the slot, or -1.
        context: positions after which a session is full (0: never).
        rings: (capacity, sinks) of caches whose last index is followed by the first one behind the sinks.
        rewritten: (offset, bytes) of the states that a run writes beside their place, and that are copied there.
    """

    spec: MethodSpec
    engine: str
    limits: tuple[int, ...]
    profiles: tuple[tuple[int, int, int], ...]
    bindings: tuple[Binding, ...]
    position: int
    context: int
    rings: tuple[tuple[int, int], ...]
    rewritten: tuple[int, int]

    @property
    def most(self) -> int:
        """Positions that one run takes."""
        return self.profiles[-1][2]

    def profile(self, n: int) -> int:
        """The number of the profile for n positions."""
        return next(index for index, (_, _, most) in enumerate(self.profiles) if n <= most)

    def pieces(self, position: int, n: int) -> list[int]:
        """How n new positions from `position` on are cut into runs: none longer than `most`, none over a ring's end."""
        cut = []
        while n:
            size = min(n, self.most)
            for capacity, sinks in self.rings:
                index = position if position < capacity else sinks + (position - sinks) % (capacity - sinks)
                size = min(size, capacity - index)
            cut.append(size)
            position, n = position + size, n - size
        return cut


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole plan: what it was built with and for, and its methods by name."""

    library: str
    version: str
    architecture: str
    slot_bytes: int
    methods: dict[str, MethodPlan]


def read_plan(value: Any, states: Mapping[str, StateInfo]) -> Plan:
    """The plan in parsed JSON; `states` are the manifest's.

    Raises:
        PackageError: a field is missing, of the wrong type or out of range, or does not fit the others.
    """
    f = Fields(value, "plan.json")
    if f.integer("version") != VERSION:
        raise PackageError(f"plan version {value['version']} is not {VERSION}", where="plan.json", fix=AGAIN)
    made_with = f.nested("library")
    library, version = made_with.text("name", LIBRARIES), made_with.text("version")
    made_with.done()
    architecture = f.text("architecture")
    if not re.fullmatch(r"sm[1-9]\d{1,2}", architecture):
        raise f.fail("architecture", "expected a name like sm89")
    slot_bytes = f.integer("slot_bytes", 0, MAX_BYTES)
    methods = f.items("methods", lambda entry: _method(entry, states, slot_bytes))
    f.done()
    by_name = {method.spec.name: method for method in methods}
    if len(by_name) != len(methods):
        raise f.fail("methods", "a method is given twice")
    return Plan(library, version, architecture, slot_bytes, by_name)


def _method(f: Fields, states: Mapping[str, StateInfo], slot_bytes: int) -> MethodPlan:
    name = f.text("name")
    if not 0 < len(name) <= 200:
        raise f.fail("name", "expected a short text")
    max_n = f.integer("max_n", 1, MAX_N)
    spec = MethodSpec(name, max_n, f.items("inputs", _argument), f.items("outputs", _argument))
    engine, limits = f.text("engine"), f.ints("limits", len(spec.inputs))
    profiles = _profiles(f, max_n)
    bindings = f.items("bindings", lambda entry: _binding(entry, spec, states, slot_bytes))
    if len({b.name for b in bindings}) != len(bindings):
        raise f.fail("bindings", "a binding is given twice")
    if {b.index for b in bindings if b.kind == "output"} != set(range(len(spec.outputs))):
        raise f.fail("bindings", "they do not give every result")
    position, context = -1, f.integer("context")
    if counter := f.text("position"):
        state = states.get(counter)
        if state is None or state.dtype != "i64" or state.bytes != 8 or state.offset + 8 > slot_bytes:
            raise f.fail("position", "it is no count in the slot")
        position = state.offset
    rings = []
    for ring in f.sequence("rings"):
        if not _pair(ring) or not 0 <= ring[1] < ring[0] <= MAX_DIM:
            raise f.fail("rings", "expected pairs of capacity and sinks")
        rings.append((ring[0], ring[1]))
    if position < 0 and (context or rings or any(b.kind == "position" for b in bindings)):
        raise f.fail("position", "it is needed")
    if not all(type(count) is int for count in f.mapping("layers").values()):
        raise f.fail("layers", "expected counts")
    begin, size = f.ints("rewritten", 2)
    if begin % ALIGN or begin + size > slot_bytes:
        raise f.fail("rewritten", "it does not lie in the slot")
    fresh = {b.offset for b in bindings if b.kind == "next" and not b.cache}
    for b in bindings:
        inside = begin <= b.offset and b.offset + b.nbytes(1) <= begin + size
        if b.kind in ("state", "next") and not b.cache and (b.offset not in fresh or not inside):
            raise f.fail("rewritten", f"state {b.name[:60]} is not written whole")
    f.done()
    made = (profiles, bindings, position, context, tuple(rings), (begin, size))
    return MethodPlan(spec, engine, limits, *made)


def _argument(f: Fields) -> TensorSpec:
    a, b = f.ints("rows", 2)
    out = TensorSpec(f.text("dtype", tuple(DTYPES)), a, b, f.integer("cols", 1, MAX_DIM))
    if max(a, b) > MAX_N or a + b == 0:
        raise f.fail("rows", "out of range")
    f.done()
    return out


def _profiles(f: Fields, max_n: int) -> tuple[tuple[int, int, int], ...]:
    profiles: list[tuple[int, int, int]] = []
    for value in f.sequence("profiles"):
        if not isinstance(value, list) or len(value) != 3 or any(type(v) is not int for v in value):
            raise f.fail("profiles", "expected three whole numbers each")
        least, usual, most = value
        if least != (profiles[-1][2] + 1 if profiles else 1) or not least <= usual <= most <= max_n:
            raise f.fail("profiles", "they do not join from one position on")
        profiles.append((least, usual, most))
    if not 0 < len(profiles) <= 64:
        raise f.fail("profiles", "expected at least one")
    return tuple(profiles)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 <= v <= MAX_DIM for v in value)


def _binding(f: Fields, spec: MethodSpec, states: Mapping[str, StateInfo], slot_bytes: int) -> Binding:
    name, kind, dtype = f.text("name"), f.text("kind", KINDS), f.text("dtype", tuple(ITEM))
    dims = f.sequence("shape")
    if not 0 < len(dims) <= 8 or not all(map(_pair, dims)) or any(a + b == 0 for a, b in dims):
        raise f.fail("shape", "expected pairs of whole numbers")
    shape = tuple((a, b) for a, b in dims)
    rest: dict[str, Any] = {}
    if kind in ("input", "output"):
        arguments = spec.inputs if kind == "input" else spec.outputs
        index = f.integer("index", 0, max(len(arguments) - 1, 0))
        if index >= len(arguments):
            raise f.fail("index", "the method has no such argument")
        of = arguments[index]
        if (dtype, shape) != (of.dtype, ((of.a, of.b), (0, of.cols))):
            raise f.fail("shape", f"it is not the argument's {of}")
        rest["index"] = index
    elif kind == "noise":
        rest["op"] = f.text("op", NOISE)
        key, warm = f.integer("key"), f.integer("temperature", -1)
        if key >= len(spec.inputs) or spec.inputs[key] != TensorSpec("i64", 1, 0, 3):
            raise f.fail("key", "the method has no such key")
        if warm >= len(spec.inputs) or (warm >= 0 and spec.inputs[warm] != TensorSpec("f32", 1, 0, 1)):
            raise f.fail("temperature", "the method has no such argument")
        if dtype != "f32" or len(shape) != 2 or shape[0] != (1, 0) or shape[1][0]:
            raise f.fail("shape", "expected a row of float32 for each position")
        rest |= {"key": key, "temperature": warm}
    elif kind == "position":
        if (name, dtype, shape) not in ((ROWS, "i32", ((1, 0), (0, 1))), (END, "i32", ((0, 1), (0, 1)))):
            raise f.fail("name", "no such position")
    else:
        rest |= _state(f, dtype, shape, states, slot_bytes)
    f.done()
    return Binding(name, kind, dtype, shape, **rest)


def _state(
    f: Fields, dtype: str, shape: tuple[Dim, ...], states: Mapping[str, StateInfo], slot_bytes: int
) -> dict[str, Any]:
    state, cache = states.get(f.text("state")), f.any("cache")
    if type(cache) is not bool:
        raise f.fail("cache", "expected true or false")
    if state is None:
        raise f.fail("state", "the package has no such state")
    size = math.prod(b for _, b in shape) * ITEM[dtype]
    if any(a for a, _ in shape) or STORED.get(dtype, dtype) != state.dtype or size != state.bytes:
        raise f.fail("shape", "it does not fit the state")
    if state.offset % ALIGN or state.offset + size > slot_bytes:
        raise f.fail("state", "it lies outside the slot")
    return {"offset": state.offset, "cache": cache}
