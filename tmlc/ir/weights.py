"""Weights as data: each says how it is made of checkpoint tensors, and is made only when it is asked for.

Passes add entries (shapes and dtypes are inferred at once); the packer evaluates one output tensor at a time,
so that compiling needs memory for the largest weight and not for the model. Engine layouts (packing) are the
emitters'.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from tmlc.errors import CheckpointError, IRError
from tmlc.ir.dequantize import Dequantize, dequantize_into, dequantized_type
from tmlc.ir.quantize import SCHEMES, dequantised
from tmlc.ir.types import QUANTISED, TensorType, dtype_name

__all__ = ["WEIGHT_OPS", "TensorSource", "WeightEntry", "WeightMap"]


_FIX_CHECKPOINT = "the checkpoint is not the one that the program was made of: compile the one that is there now"
#: What each weight op is made of, for who gave it something else.
_TAKES = {
    "constant": "no sources, and the arguments dtype, shape and data",
    "concat": "sources of one dtype that differ along the argument axis only",
    "stack": "sources of one dtype and shape, and no arguments",
    "transpose": "one source and the argument axes, each of its axes once",
    "slice": "one source and the arguments axis, start and stop, with 0 <= start < stop <= the size of the axis",
    "reshape": "one source and the argument shape, with as many elements as the source",
    "cast": "one source and the argument dtype",
    "quantize": "one source, a matrix of f32 or bf16 or a stack of them, and the argument scheme",
    "dequantize": "the sources and arguments that docs/ir.md lists",
}
_EXACT = {("bf16", "f32"), ("i32", "i64"), ("u8", "i32"), ("u8", "i64")}  # casts that change no value


class TensorSource(Protocol):
    """Where checkpoint tensors come from: a Checkpoint, a state_dict, or any mapping."""

    def get(self, name: str, /) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class WeightEntry:
    """One weight: `dst` = `op`(`srcs`, `args`), of the given type.

    `source` has one src, the name of a checkpoint tensor; `constant` has none: its values are in its args (as windows
    and filters that a checkpoint's config implies); the srcs of every other op are earlier entries.
    Args: constant {dtype, shape, data: little-endian values, deflated, base64}, concat {axis}, stack {} (a new
        first axis), transpose {axes}, slice {axis, start, stop}, reshape {shape}, cast {dtype}, quantize {scheme} (a
        quantised dtype; its value is float32, rounded to the codes), dequantize: those of `Dequantize`; its srcs are
        codes, scales, then zero points and global scale where the arguments name them.
    """

    dst: str
    op: str
    srcs: tuple[str, ...]
    args: dict[str, Any]
    dtype: str
    shape: tuple[int, ...]

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)


class WeightMap:
    """An ordered set of entries, earlier ones before those made of them."""

    def __init__(self, entries: Iterable[WeightEntry] = ()) -> None:
        self._entries: dict[str, WeightEntry] = {}
        for entry in entries:
            self._entries[entry.dst] = entry

    def __getitem__(self, name: str) -> WeightEntry:
        if name not in self._entries:
            raise IRError(f"no weight {name!r} in the program", fix="add it to program.weights first")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightMap) and list(self._entries.values()) == list(other._entries.values())

    __hash__ = None  # type: ignore[assignment]

    def items(self) -> ItemsView[str, WeightEntry]:
        return self._entries.items()

    def copy(self) -> WeightMap:
        return WeightMap(self._entries.values())

    def add(self, dst: str, op: str, srcs: Sequence[str], args: dict[str, Any]) -> str:
        """Adds an entry made of existing ones and returns its name. IRError if it exists or does not fit."""
        self._check_new(dst)
        types = [self[src].type for src in srcs]
        made = infer_weight(dst, op, types, args)
        self._entries[dst] = WeightEntry(dst, op, tuple(srcs), dict(args), made.dtype, made.shape)
        return dst

    def source(self, dst: str, dtype: str, shape: Sequence[int], tensor: str | None = None) -> str:
        """A checkpoint tensor (named like `dst` unless told)."""
        self._check_new(dst)
        made = TensorType(dtype, tuple(int(size) for size in shape))
        self._entries[dst] = WeightEntry(dst, "source", (tensor or dst,), {}, made.dtype, made.shape)
        return dst

    def _check_new(self, dst: str) -> None:
        if dst in self._entries:
            raise IRError(f"weight {dst!r} exists already", fix="give it a name that is not in program.weights")

    def constant(self, dst: str, values: torch.Tensor) -> str:
        """Values that no checkpoint holds; they are part of the map, so keep them small."""
        plain = values.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        made = TensorType.of(plain)
        deflated = base64.b64encode(zlib.compress(data, 9)).decode("ascii")
        return self.add(dst, "constant", [], {"dtype": made.dtype, "shape": list(plain.shape), "data": deflated})

    def concat(self, dst: str, srcs: Sequence[str], axis: int = 0) -> str:
        return self.add(dst, "concat", srcs, {"axis": axis})

    def stack(self, dst: str, srcs: Sequence[str]) -> str:
        """A new first axis over the srcs."""
        return self.add(dst, "stack", srcs, {})

    def transpose(self, dst: str, src: str, axes: Sequence[int]) -> str:
        return self.add(dst, "transpose", [src], {"axes": list(axes)})

    def slice(self, dst: str, src: str, axis: int, start: int, stop: int) -> str:
        return self.add(dst, "slice", [src], {"axis": axis, "start": start, "stop": stop})

    def reshape(self, dst: str, src: str, shape: Sequence[int]) -> str:
        return self.add(dst, "reshape", [src], {"shape": list(shape)})

    def cast(self, dst: str, src: str, dtype: str) -> str:
        return self.add(dst, "cast", [src], {"dtype": dtype})

    def quantize(self, dst: str, src: str, scheme: str) -> str:
        """Codes and scales in groups along the last axis; nothing further can be made of them."""
        return self.add(dst, "quantize", [src], {"scheme": scheme})

    def dequantize(self, dst: str, srcs: Sequence[str], args: dict[str, Any]) -> str:
        """Numbers of stored codes and scales; `args` are those of `Dequantize` that differ from its defaults."""
        return self.add(dst, "dequantize", srcs, args)

    def needed(self, names: Iterable[str]) -> list[str]:
        """The entries that the named ones are made of, and themselves, in map order."""
        keep, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name not in keep:
                keep.add(name)
                entry = self[name]
                todo += entry.srcs if entry.op != "source" else ()
        return [name for name in self._entries if name in keep]

    def prune(self, names: Iterable[str]) -> None:
        """Drops every entry that the named ones do not need."""
        self._entries = {name: self._entries[name] for name in self.needed(names)}

    def tensors(self, names: Iterable[str]) -> list[str]:
        """The checkpoint tensors that the named entries read, in map order."""
        entries = (self._entries[name] for name in self.needed(names))
        return list(dict.fromkeys(entry.srcs[0] for entry in entries if entry.op == "source"))

    def evaluate(self, name: str, source: TensorSource) -> torch.Tensor:
        """The weight's value, of its entry's dtype and shape; a plain `source` entry as it is stored.

        Memory: the result, and at most one intermediate beside it. Raises CheckpointError for a checkpoint
        tensor that is missing or not as declared.
        """
        entry = self[name]
        if entry.op == "source":
            return self._stored(entry, source)
        out = torch.empty(entry.shape, dtype=entry.type.torch_dtype)
        self._fill(entry, source, out)
        return out

    def _stored(self, entry: WeightEntry, source: TensorSource) -> torch.Tensor:
        tensor = source.get(entry.srcs[0])
        if tensor is None:
            raise CheckpointError("tensor is missing from the checkpoint", where=entry.srcs[0], fix=_FIX_CHECKPOINT)
        if tuple(tensor.shape) != entry.shape or dtype_name(tensor.dtype) != entry.dtype:
            found = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            what = f"tensor is {found}, the program needs {entry.type}"
            raise CheckpointError(what, where=entry.srcs[0], fix=_FIX_CHECKPOINT)
        return tensor

    def _fill(self, entry: WeightEntry, source: TensorSource, out: torch.Tensor) -> None:
        """Writes the entry's value into `out` (same shape, perhaps a view), converted to its dtype."""
        if entry.op == "source":
            out.copy_(self._stored(entry, source))
        elif entry.op == "constant":
            out.copy_(_values(entry))
        elif entry.op == "reshape" and out.is_contiguous():
            self._fill(self[entry.srcs[0]], source, out.view(self[entry.srcs[0]].shape))
        elif entry.op == "concat":
            at = 0
            for src in entry.srcs:
                part, axis = self[src], entry.args["axis"]
                self._fill(part, source, out.narrow(axis, at, part.shape[axis]))
                at += part.shape[axis]
        elif entry.op == "stack":
            for i, src in enumerate(entry.srcs):
                self._fill(self[src], source, out[i])
        elif entry.op == "transpose":
            back = sorted(range(out.dim()), key=entry.args["axes"].__getitem__)
            self._fill(self[entry.srcs[0]], source, out.permute(back))
        elif entry.op == "quantize":
            dequantised(self.evaluate(entry.srcs[0], source), SCHEMES[entry.dtype], out)
        elif entry.op == "cast":
            exact = (self[entry.srcs[0]].dtype, entry.dtype) in _EXACT  # then it does not matter that it is left out
            if exact or out.dtype == entry.type.torch_dtype:
                self._fill(self[entry.srcs[0]], source, out)
            else:  # cast twice: the first one rounds, so it has to be done
                out.copy_(self.evaluate(entry.dst, source))
        elif entry.op == "dequantize":
            stored = [self[src] for src in entry.srcs]
            names = [part.srcs[0] if part.op == "source" else part.dst for part in stored]
            tensors = [self.evaluate(part.dst, source) for part in stored]
            dequantize_into(Dequantize(**_tuples(entry.args)), tensors, names, out)
        else:
            value = self.evaluate(entry.srcs[0], source)
            if entry.op == "slice":
                value = value.narrow(entry.args["axis"], entry.args["start"], entry.args["stop"] - entry.args["start"])
            out.copy_(value.reshape(entry.shape))


def _tuples(args: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}


def infer_weight(dst: str, op: str, types: Sequence[TensorType], args: dict[str, Any]) -> TensorType:
    """The type of `op` of values of the given types. IRError (naming `dst`) if they do not fit."""
    try:
        if op not in WEIGHT_OPS:
            raise IRError(f"unknown weight op {op!r}", fix=f"use one of source, {', '.join(WEIGHT_OPS)}")
        if not types and op != "constant":
            raise _misfit(op, f"{op} needs sources")
        if any(t.dtype in QUANTISED for t in types):
            fix = "quantise last: rewrite the weight before its codes are made"
            raise IRError(f"{op} of a quantised weight", fix=fix)
        return WEIGHT_OPS[op](list(types), **args)
    except TypeError:
        raise _misfit(op, f"wrong arguments for {op}: {args}", dst) from None
    except IRError as error:
        raise IRError(error.what, where=dst, fix=error.fix) from None


def _misfit(op: str, what: str, where: str = "") -> IRError:
    """The error of sources or arguments that a weight op does not take."""
    return IRError(what, where=where, fix=f"{op} takes {_TAKES[op]}")


def _values(entry: WeightEntry) -> torch.Tensor:
    """What a constant holds. IRError when its data does not fit its type."""
    dtype = entry.type.torch_dtype
    size = prod(entry.shape) * dtype.itemsize
    try:
        unpack = zlib.decompressobj()
        data = unpack.decompress(base64.b64decode(entry.args["data"], validate=True), size + 1)
    except (ValueError, zlib.error):
        data = b""
    if len(data) != size:
        fix = "make the constant with WeightMap.constant, which packs its values as docs/ir.md says"
        raise IRError(f"the data of the constant is not {size} bytes", where=entry.dst, fix=fix)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.shape)


def _constant(types: list[TensorType], dtype: str, shape: Sequence[int], data: str) -> TensorType:
    if types or not isinstance(data, str) or min(shape, default=1) < 1:
        raise _misfit("constant", "a constant has a dtype, a shape, data and no sources")
    return TensorType(dtype, tuple(shape))


def _one(types: list[TensorType], op: str) -> TensorType:
    if len(types) != 1:
        raise _misfit(op, f"{op} takes one source, not {len(types)}")
    return types[0]


def _axis(t: TensorType, axis: int, op: str) -> None:
    if not 0 <= axis < len(t.shape):
        raise _misfit(op, f"axis {axis} is not one of {t}")


def _concat(types: list[TensorType], axis: int) -> TensorType:
    first = types[0]
    _axis(first, axis, "concat")
    rest = [t.shape[:axis] + t.shape[axis + 1 :] for t in types]
    if any(len(t.shape) != len(first.shape) or t.dtype != first.dtype for t in types) or len(set(rest)) != 1:
        raise _misfit("concat", f"cannot concatenate {', '.join(map(str, types))} along axis {axis}")
    total = sum(t.shape[axis] for t in types)
    return TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _stack(types: list[TensorType]) -> TensorType:
    if len(set(types)) != 1:
        raise _misfit("stack", f"cannot stack {', '.join(map(str, types))}")
    return TensorType(types[0].dtype, (len(types), *types[0].shape))


def _transpose(types: list[TensorType], axes: Sequence[int]) -> TensorType:
    t = _one(types, "transpose")
    if sorted(axes) != list(range(len(t.shape))):
        raise _misfit("transpose", f"axes {list(axes)} are not an order of the axes of {t}")
    return TensorType(t.dtype, tuple(t.shape[axis] for axis in axes))


def _slice(types: list[TensorType], axis: int, start: int, stop: int) -> TensorType:
    t = _one(types, "slice")
    _axis(t, axis, "slice")
    if not 0 <= start < stop <= t.shape[axis]:
        raise _misfit("slice", f"{start}..{stop} is not inside axis {axis} of {t}")
    return TensorType(t.dtype, (*t.shape[:axis], stop - start, *t.shape[axis + 1 :]))


def _reshape(types: list[TensorType], shape: Sequence[int]) -> TensorType:
    t = _one(types, "reshape")
    if min(shape, default=1) < 0 or prod(shape) != t.numel():
        raise _misfit("reshape", f"{t} has no shape {list(shape)}")
    return TensorType(t.dtype, tuple(shape))


def _cast(types: list[TensorType], dtype: str) -> TensorType:
    if dtype in QUANTISED:
        raise IRError(f"a cast to {dtype}", fix="use the weight op quantize")
    return TensorType(dtype, _one(types, "cast").shape)


def _quantize(types: list[TensorType], scheme: str) -> TensorType:
    t = _one(types, "quantize")
    if scheme not in SCHEMES:
        raise IRError(f"unknown scheme {scheme!r}", fix=f"use one of {', '.join(SCHEMES)}")
    if t.dtype not in ("f32", "bf16") or len(t.shape) not in (2, 3):
        raise _misfit("quantize", f"{t} cannot be quantised")
    return TensorType(scheme, t.shape)


WEIGHT_OPS: dict[str, Callable[..., TensorType]] = {
    "constant": _constant,
    "concat": _concat,
    "stack": _stack,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "cast": _cast,
    "quantize": _quantize,
    "dequantize": dequantized_type,
}
