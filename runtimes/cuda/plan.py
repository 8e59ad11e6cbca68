"""Reads the plan of a Triton engine (`plan.json` and an architecture's `code.json`, see docs/triton.md).

Every number is checked before anything uses it: that a launch fits its variant, that every pointer with the bytes
behind it lies inside what it points into, in every bucket. What the machine code itself does cannot be checked: a
package with machine code is to be trusted like a program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmlc.errors import PackageError, PlanError, shown_entry
from tmlc.package.safetensors_io import TensorEntry
from tmlc.runtimes.core.backend import DTYPES, MethodSpec, TensorSpec

VERSION = 1
FOLDER = "engines/triton"
SPACES = ("weight", "arena", "state", "input", "output", "scratch", "slots", "counts", "between")
ALIGN = 256  # of every buffer, and of every argument inside the staging buffers
MAX_BYTES = 2**46
MAX_SHARED = 232448  # bytes of shared memory that any architecture gives a program
FIX = "get the package again from its source, or compile it again with this version of tmlc"

_POINTERS = ("*fp64", "*fp32", "*fp16", "*bf16", "*i64", "*i32", "*u8")
_INTEGERS = {"i32": 31, "i64": 63}


def code_name(sm: int) -> str:
    """The file of a package with an architecture's launches."""
    return f"{FOLDER}/sm{sm}/code.json"


@dataclass(frozen=True, slots=True)
class VariantInfo:
    """One compiled kernel: its file, and what a launch of it takes."""

    name: str
    file: str
    sha256: str
    entry: str
    num_warps: int
    shared: int
    hidden_params: int
    signature: tuple[str, ...]
    kernel: str
    constexprs: dict[str, Any]
    num_stages: int


@dataclass(frozen=True, slots=True)
class PointerArg:
    """`offset` bytes into a space, behind which a launch touches `nbytes` bytes (of each session's slot in a state)."""

    space: str
    which: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LaunchInfo:
    """One kernel call of a bucket."""

    variant: int
    grid: tuple[int, int, int]
    args: tuple[PointerArg | int | float, ...]


@dataclass(frozen=True, slots=True)
class BucketInfo:
    """A bucket's launches, and where its arguments lie in the staging buffers (docs/triton.md, "A call").

    Attributes:
        inputs, outputs: byte offset of each argument; `counts` of the counts (the slots are at 0).
        in_bytes, out_bytes: what one copy to the device, and one back, carries.
    """

    batch: int
    n: int
    counts: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    in_bytes: int
    out_bytes: int
    launches: tuple[LaunchInfo, ...]


@dataclass(frozen=True, slots=True)
class PositionInfo:
    """A counter of positions in the slot; `limit` > 0: the most that a session may append."""

    offset: int
    limit: int


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """One method: signature, buckets in the order of the plan, counters, and for ids the rows of their table."""

    spec: MethodSpec
    buckets: tuple[BucketInfo, ...]
    positions: tuple[PositionInfo, ...]
    id_limits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """An engine for one architecture, checked."""

    architecture: int
    driver: int
    slot_bytes: int
    arena_bytes: int
    scratch_bytes: int
    weights: tuple[str, ...]
    variants: tuple[VariantInfo, ...]
    methods: dict[str, MethodPlan]

    @property
    def in_bytes(self) -> int:
        return max((b.in_bytes for m in self.methods.values() for b in m.buckets), default=0)

    @property
    def out_bytes(self) -> int:
        return max((b.out_bytes for m in self.methods.values() for b in m.buckets), default=0)


def plan_error(what: str, where: str) -> PlanError:
    return PlanError(what, where=where, fix=FIX)


class _Reader:
    """One JSON object that is read strictly: every key known, every value of its type."""

    def __init__(self, value: Any, where: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise plan_error(f"expected an object, not {shown_entry(value)}", where)
        if odd := sorted(set(value) ^ set(keys)):
            what = "is missing" if odd[0] in keys else "is not known"
            raise plan_error(f"key {odd[0]!r} {what}", where)
        self.value, self.where = value, where

    def integer(self, key: str, low: int = 0, high: int = MAX_BYTES) -> int:
        return integer(self.value[key], f"{self.where}: {key}", low, high)

    def text(self, key: str) -> str:
        value = self.value[key]
        if not isinstance(value, str) or not value or len(value) > 300 or not value.isprintable():
            raise plan_error(f"{key} is not a short text", self.where)
        return value

    def items(self, key: str, most: int = 1 << 22) -> list[Any]:
        return items(self.value[key], f"{self.where}: {key}", most)


def integer(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise plan_error(f"expected a whole number from {low} to {high}, not {shown_entry(value)}", where)
    return value


def items(value: Any, where: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise plan_error(f"expected a list of at most {most}, not {shown_entry(value)}", where)
    return value


def up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def architectures(plan: Any) -> list[int]:
    """The compute capabilities (90 for sm90) that a package has machine code for."""
    if not isinstance(plan, dict) or not isinstance(plan.get("architectures"), list):
        raise plan_error("it lists no architectures", "plan.json")
    found = []
    for name in plan["architectures"]:
        if not (isinstance(name, str) and name.startswith("sm") and name[2:].isdigit() and len(name) < 8):
            raise plan_error(f"unknown architecture {shown_entry(name)}", "plan.json")
        found.append(int(name[2:]))
    return found


def read_plan(plan: Any, code: Any, sm: int, tensors: Mapping[str, TensorEntry]) -> Plan:
    """The engine for architecture `sm`.

    Args:
        plan, code: the parsed `plan.json` and the architecture's `code.json`.
        tensors: where the package's weights lie.

    Raises:
        PlanError: a key, type, size or range that a plan cannot have.
        PackageError: a weight that the package does not have.
    """
    keys = ("version", "architectures", "slot_bytes", "arena_bytes", "scratch_bytes", "weights", "methods")
    top = _Reader(plan, "plan.json", keys)
    chained = ("chains",) if isinstance(code, dict) and "chains" in code else ()  # chains.py reads them
    body = _Reader(code, f"sm{sm}/code.json", ("version", "driver", "variants", "code", *chained))
    for reader in (top, body):
        if reader.integer("version", 0, 2**31) != VERSION:
            raise plan_error(f"version {reader.value['version']} is not {VERSION}", reader.where)
    weights = tuple(_weight(name, tensors) for name in top.items("weights"))
    variants = tuple(_variant(v, f"{body.where}, variant {i}") for i, v in enumerate(body.items("variants")))
    sizes = {space: top.integer(f"{space}_bytes") for space in ("slot", "arena", "scratch")}
    fixed = {"state": sizes["slot"], "arena": sizes["arena"], "scratch": sizes["scratch"]}
    places = _Places(fixed, [tensors[name].nbytes for name in weights], variants)
    methods: dict[str, MethodPlan] = {}
    listed = top.items("methods", 4096)
    if not isinstance(code["code"], dict) or len(code["code"]) != len(listed):
        raise plan_error("its methods are not those of plan.json", body.where)
    for index, value in enumerate(listed):
        read = _method(value, f"plan.json, method {index}", code["code"], places, sizes["slot"])
        if read.spec.name in methods:
            raise plan_error(f"method {read.spec.name!r} is given twice", "plan.json")
        methods[read.spec.name] = read
    driver = body.integer("driver", 0, 10**6)
    return Plan(sm, driver, sizes["slot"], sizes["arena"], sizes["scratch"], weights, variants, methods)


def _weight(name: Any, tensors: Mapping[str, TensorEntry]) -> str:
    if not isinstance(name, str) or name not in tensors:
        raise PackageError(f"the plan's weight {shown_entry(name)} is not in the package", where="plan.json", fix=FIX)
    return name


def _variant(value: Any, where: str) -> VariantInfo:
    keys = ("name", "file", "kernel", "constexprs", "signature", "num_stages", "entry", "num_warps", "shared",
            "registers", "spill_bytes", "hidden_params", "sha256")  # fmt: skip
    r = _Reader(value, where, keys)
    signature = tuple(r.items("signature", 256))
    known = (*_POINTERS, *_INTEGERS, "fp32")
    for kind in signature:
        if not isinstance(kind, str) or kind.removesuffix(":16") not in known:
            raise plan_error(f"unknown type of an argument {shown_entry(kind)}", where)
    warps = r.integer("num_warps", 1, 32)
    if warps & (warps - 1) or not isinstance(value["constexprs"], dict):
        raise plan_error("num_warps or constexprs are not those of a kernel", where)
    r.integer("registers", 0, 255), r.integer("spill_bytes", 0, 2**20)
    return VariantInfo(
        r.text("name"), r.text("file"), r.text("sha256"), r.text("entry"), warps, r.integer("shared", 0, MAX_SHARED),
        r.integer("hidden_params", 0, 8), signature, r.text("kernel"), value["constexprs"],
        r.integer("num_stages", 1, 16),
    )  # fmt: skip


@dataclass(frozen=True)
class _Places:
    """How large everything is that a pointer may point into."""

    fixed: dict[str, int]
    weights: list[int]
    variants: tuple[VariantInfo, ...]


def _method(value: Any, where: str, code: dict[str, Any], places: _Places, slot_bytes: int) -> MethodPlan:
    r = _Reader(value, where, ("name", "max_n", "inputs", "outputs", "buckets", "positions", "ids"))
    name = r.text("name")
    where = f"method {name}"
    inputs = tuple(_argument(a, f"{where}: inputs") for a in r.items("inputs", 64))
    outputs = tuple(_argument(a, f"{where}: outputs") for a in r.items("outputs", 64))
    spec = MethodSpec(name, r.integer("max_n", 1, 2**24), inputs, outputs)
    own = code.get(name)
    listed = r.items("buckets", 4096)
    if not isinstance(own, dict) or len(own) != len(listed) or not listed:
        raise plan_error("code.json has other buckets than plan.json, or there are none", where)
    buckets = []
    for pair in listed:
        sizes = [integer(v, f"{where}: buckets", 1, 2**20) for v in items(pair, where, 2)]
        if len(sizes) != 2 or f"b{sizes[0]}n{sizes[1]}" not in own:
            raise plan_error(f"bucket {shown_entry(sizes)} has no code", where)
        buckets.append(_bucket(sizes[0], sizes[1], own[f"b{sizes[0]}n{sizes[1]}"], spec, places))
    if not any((b.batch, b.n) == (1, 1) for b in buckets):
        raise plan_error("there is no bucket for one position of one session", where)
    positions = tuple(_position(p, f"{where}: positions", slot_bytes) for p in r.items("positions", 64))
    limits = tuple(integer(v, f"{where}: ids", 0, 2**31 - 1) for v in r.items("ids", 64))
    if len(limits) != len(inputs):
        raise plan_error("ids must name a limit for each input", where)
    return MethodPlan(spec, tuple(buckets), positions, limits)


def _argument(value: Any, where: str) -> TensorSpec:
    r = _Reader(value, where, ("dtype", "rows", "cols"))
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise plan_error(f"unknown dtype {shown_entry(value['dtype'])}", where)
    rows = [integer(v, where, 0, 2**24) for v in r.items("rows", 2)]
    if len(rows) != 2:
        raise plan_error("rows must be [a, b], meaning a·n + b", where)
    return TensorSpec(value["dtype"], rows[0], rows[1], r.integer("cols", 1, 2**31))


def _position(value: Any, where: str, slot_bytes: int) -> PositionInfo:
    r = _Reader(value, where, ("offset", "limit"))
    offset = r.integer("offset")
    if offset % 8 or offset + 8 > slot_bytes:
        raise plan_error(f"a counter at {offset} is outside the slot", where)
    return PositionInfo(offset, r.integer("limit", 0, 2**53))


def argument_bytes(spec: TensorSpec, batch: int, n: int) -> int:
    """Bytes of an argument of a bucket, padding included."""
    return batch * spec.rows(n) * spec.cols * DTYPES[spec.dtype].itemsize


def _bucket(batch: int, n: int, value: Any, spec: MethodSpec, places: _Places) -> BucketInfo:
    where = f"method {spec.name}, bucket b{batch}n{n}"
    counts = up(8 * batch)
    at, inputs = counts + up(4 * batch), []
    for argument in spec.inputs:
        inputs.append(at)
        at += up(argument_bytes(argument, batch, n))
    end, outputs = 0, []
    for argument in spec.outputs:
        outputs.append(end)
        end += up(argument_bytes(argument, batch, n))
    if max(at, end) > MAX_BYTES:
        raise plan_error("its arguments are absurdly large", where)
    sizes = {
        **{(space, 0): size for space, size in places.fixed.items()},
        **{("weight", i): size for i, size in enumerate(places.weights)},
        **{("input", i): argument_bytes(a, batch, n) for i, a in enumerate(spec.inputs)},
        **{("output", i): argument_bytes(a, batch, n) for i, a in enumerate(spec.outputs)},
        ("slots", 0): 8 * batch,
        ("counts", 0): 4 * batch,
    }
    launches = tuple(
        read_launch(launch, f"{where}, launch {i}", sizes, places.variants)
        for i, launch in enumerate(items(value, where, 1 << 20))
    )
    return BucketInfo(batch, n, counts, tuple(inputs), tuple(outputs), at, end, launches)


def read_launch(
    value: Any, where: str, sizes: dict[tuple[str, int], int], variants: tuple[VariantInfo, ...]
) -> LaunchInfo:
    """A launch whose pointers stay inside `sizes`, bytes by (space, number)."""
    parts = items(value, where, 3)
    if len(parts) != 3:
        raise plan_error("a launch is a variant, a grid and arguments", where)
    number = integer(parts[0], where, 0, len(variants) - 1)
    grid = [integer(v, f"{where}: grid", 1, high) for v, high in zip(
        items(parts[1], where, 3), (2**31 - 1, 65535, 65535), strict=False)]  # fmt: skip
    args = items(parts[2], where, 256)
    signature = variants[number].signature
    if len(grid) != 3 or len(args) != len(signature):
        raise plan_error(f"the launch does not fit {variants[number].name}", where)
    read = tuple(_value(arg, kind, where, sizes) for arg, kind in zip(args, signature, strict=True))
    return LaunchInfo(number, (grid[0], grid[1], grid[2]), read)


def _value(arg: Any, kind: str, where: str, sizes: dict[tuple[str, int], int]) -> PointerArg | int | float:
    base, aligned = kind.removesuffix(":16"), kind.endswith(":16")
    if base in _INTEGERS:
        most = 2 ** _INTEGERS[base]
        value = integer(arg, where, -most, most - 1)
        if aligned and value % 16:
            raise plan_error(f"{value} is not the multiple of 16 that the kernel was compiled for", where)
        return value
    if base == "fp32":
        if type(arg) is not float or not math.isfinite(arg):
            raise plan_error(f"expected a number, not {shown_entry(arg)}", where)
        return arg
    parts = items(arg, where, 4)
    if len(parts) != 4:
        raise plan_error("a pointer is a space, a number, an offset and a size", where)
    space = SPACES[integer(parts[0], where, 0, len(SPACES) - 1)]
    which, offset, nbytes = (integer(v, where, 0, MAX_BYTES) for v in parts[1:])
    if (space, which) not in sizes:
        raise plan_error(f"there is no {space} {which}", where)
    if offset + nbytes > sizes[space, which]:
        size = sizes[space, which]
        raise plan_error(f"a pointer to {space} {which} ends at {offset + nbytes} of {size} bytes", where)
    if aligned and offset % 16:
        raise plan_error(f"a pointer to {space} at {offset} is not aligned as the kernel was compiled for", where)
    return PointerArg(space, which, offset, nbytes)
