"""Flattens a CPU plan (`plan.json`, see docs/plan-format.md) into the words that the kernel library
takes.

A plan may come from a stranger: every key, type and size is checked here, so that what is wrong is named
in the file's own terms; the library then checks the words again, for every n, before it runs anything.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tmlc.errors import PackageError, PlanError, shown_entry
from tmlc.runtimes.core.backend import DTYPES, MethodSpec, TensorSpec

MAGIC = 0x544D4C43504C414E
VERSION = 2
SPACES = ("arena", "slot", "weight", "input", "output")
DTYPE_NAMES = tuple(DTYPES)
MAX_ROWS = 2**24
MAX_COLS = 2**31
MAX_BYTES = 2**46
MAX_ENTRIES = 2**20
FIX = "get the package again from its source, or compile it again with this version of tmlc"


class WeightEntry(Protocol):
    """Where a named tensor lies in the weight buffer (`tmlc.package` gives these)."""

    @property
    def dtype(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlanWords:
    """A plan ready for the kernel library.

    Attributes:
        words: int64, the flat form of docs/plan-format.md.
        methods: signatures in the order of the plan, which is the library's numbering of methods.
        arena_bytes, slot_bytes: shared workspace, and state of one session.
    """

    words: np.ndarray
    methods: tuple[MethodSpec, ...]
    arena_bytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    space: int
    dtype: int
    offset: int
    a: int
    b: int
    cols: int
    stride: int


def _error(what: str, where: str) -> PlanError:
    return PlanError(what, where=f"plan.json, {where}", fix=FIX)


def _object(value: Any, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error("expected an object", where)
    if missing := [k for k in keys if k not in value]:
        raise _error(f"key {missing[0]!r} is missing", where)
    if unknown := [k for k in value if k not in keys and k not in optional]:
        raise _error(f"unknown key {shown_entry(unknown[0])}", where)
    return value


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _error(f"expected a whole number from {low} to {high}, not {shown_entry(value)}", where)
    return value


def _list(value: Any, where: str, most: int = MAX_ENTRIES) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _error(f"expected a list of at most {most}", where)
    return value


def plan_words(plan: Any, weights: Mapping[str, WeightEntry], opcodes: Mapping[str, int]) -> PlanWords:
    """Flattens a parsed plan.

    Args:
        plan: the content of the JSON file.
        weights: the package's tensors by name.
        opcodes: the kernel library's number of each operation.

    Raises:
        PlanError: a key, type, size or operation that a plan cannot have.
        PackageError: a weight that the package does not have, or has in another dtype or too short.
    """
    plan = _object(plan, "top level", ("version", "arena_bytes", "slot_bytes", "tensors", "methods"))
    if plan["version"] != VERSION or type(plan["version"]) is not int:
        raise _error(f"version {shown_entry(plan['version'])} is not {VERSION}", "top level")
    arena = _integer(plan["arena_bytes"], "arena_bytes", 0, MAX_BYTES)
    slot = _integer(plan["slot_bytes"], "slot_bytes", 0, MAX_BYTES)
    tensors = [_tensor(entry, f"tensor {i}", weights) for i, entry in enumerate(_list(plan["tensors"], "tensors"))]
    methods = _list(plan["methods"], "methods", 4096)
    words: list[int] = [MAGIC, VERSION, arena, slot, len(tensors), len(methods)]
    for t in tensors:
        words += (t.space, t.dtype, t.offset, t.a, t.b, t.cols, t.stride)
    specs: list[MethodSpec] = []
    for index, entry in enumerate(methods):
        spec = _method(entry, f"method {index}", tensors, opcodes, words)
        if any(spec.name == other.name for other in specs):
            raise _error(f"method {spec.name!r} is given twice", f"method {index}")
        specs.append(spec)
    return PlanWords(np.array(words, np.int64), tuple(specs), arena, slot)


def _tensor(value: Any, where: str, weights: Mapping[str, WeightEntry]) -> _Tensor:
    entry = _object(value, where, ("space", "dtype", "rows", "cols", "stride"), ("offset", "name"))
    space, dtype = entry["space"], entry["dtype"]
    if space not in SPACES:
        raise _error(f"unknown space {shown_entry(space)}", where)
    if dtype not in DTYPE_NAMES:
        raise _error(f"unknown dtype {shown_entry(dtype)}", where)
    rows = _list(entry["rows"], f"{where}: rows", 2)
    if len(rows) != 2:
        raise _error("rows must be [a, b], meaning a·n + b", where)
    a, b = (_integer(v, f"{where}: rows", 0, MAX_ROWS) for v in rows)
    cols = _integer(entry["cols"], f"{where}: cols", 1, MAX_COLS)
    stride = _integer(entry["stride"], f"{where}: stride", cols, MAX_COLS)
    offset = _integer(entry.get("offset", 0 if space == "weight" else None), f"{where}: offset", 0, MAX_BYTES)
    if (space == "weight") != ("name" in entry):
        raise _error("a weight needs a name, and nothing else has one", where)
    if space == "weight":
        elements = (b - 1) * stride + cols if b else 0
        offset += _weight(entry["name"], dtype, offset, a, elements, where, weights)
    return _Tensor(SPACES.index(space), DTYPE_NAMES.index(dtype), offset, a, b, cols, stride)


def _weight(
    name: Any, dtype: str, offset: int, a: int, elements: int, where: str, weights: Mapping[str, WeightEntry]
) -> int:
    """The place of a named weight in the buffer, once it is known to hold what the plan reads from it."""
    if not isinstance(name, str) or name not in weights:
        raise PackageError(f"the plan's weight {shown_entry(name)} is not in the package", where=where, fix=FIX)
    held = weights[name]
    if held.dtype != dtype:
        raise PackageError(f"weight {name} is {held.dtype}, the plan wants {dtype}", where=where, fix=FIX)
    if a:
        raise _error(f"weight {name} has a number of rows that depends on n", where)
    if offset + elements * DTYPES[dtype].itemsize > held.nbytes:
        raise PackageError(f"the plan reads past the end of weight {name}", where=where, fix=FIX)
    return held.offset


def _method(value: Any, where: str, tensors: list[_Tensor], opcodes: Mapping[str, int], words: list[int]) -> MethodSpec:
    """Appends one method to `words` and returns its signature."""
    entry = _object(value, where, ("name", "max_n", "inputs", "outputs", "code"))
    name = entry["name"]
    if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
        raise _error("a method's name must be a short text", where)
    where = f"method {name}"
    max_n = _integer(entry["max_n"], f"{where}: max_n", 1, MAX_ROWS)
    inputs = _arguments(entry["inputs"], f"{where}: inputs", "input", tensors)
    outputs = _arguments(entry["outputs"], f"{where}: outputs", "output", tensors)
    code = _list(entry["code"], f"{where}: code")
    words += (max_n, len(inputs), len(outputs), len(code), *inputs, *outputs)
    last = len(tensors) - 1
    for index, call_value in enumerate(code):
        at = f"{where}: call {index}"
        call = _object(call_value, at, ("op", "t", "i", "f"))
        op = call["op"]
        if not isinstance(op, str) or op not in opcodes:
            raise PlanError(
                f"unknown operation {shown_entry(op)}",
                where=f"plan.json, {at}",
                fix="install the version of tmlc that made the package, or compile it again with this one",
            )
        t = [_integer(v, f"{at}: t", 0, last) for v in _list(call["t"], f"{at}: t", 64)]
        i = [_integer(v, f"{at}: i", -(2**62), 2**62) for v in _list(call["i"], f"{at}: i", 256)]
        f = [_float_bits(v, f"{at}: f") for v in _list(call["f"], f"{at}: f", 256)]
        words += (opcodes[op], len(t), len(i), len(f), *t, *i, *f)
    return MethodSpec(name, max_n, _specs(inputs, tensors), _specs(outputs, tensors))


def _arguments(value: Any, where: str, space: str, tensors: list[_Tensor]) -> list[int]:
    """Tensor numbers of a method's arguments; argument k must be a dense tensor of `space` number k."""
    numbers = [_integer(v, where, 0, len(tensors) - 1) for v in _list(value, where, 64)]
    for k, number in enumerate(numbers):
        tensor = tensors[number]
        if SPACES[tensor.space] != space or tensor.offset != k:
            raise _error(f"tensor {number} is not {space} {k}", where)
        if tensor.stride != tensor.cols:
            raise _error(f"tensor {number} must be dense (stride = cols)", where)
    return numbers


def _specs(numbers: list[int], tensors: list[_Tensor]) -> tuple[TensorSpec, ...]:
    picked = (tensors[n] for n in numbers)
    return tuple(TensorSpec(DTYPE_NAMES[t.dtype], t.a, t.b, t.cols) for t in picked)


def _float_bits(value: Any, where: str) -> int:
    if type(value) not in (int, float) or not -1e300 < value < 1e300 or not math.isfinite(value):
        raise _error(f"expected a number, not {shown_entry(value)}", where)
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
