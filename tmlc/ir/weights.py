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
from tmlc.ir.types import TensorType, dtype_name

__all__ = ["WEIGHT_OPS", "TensorSource", "WeightEntry", "WeightMap"]


class TensorSource(Protocol):
    """Where checkpoint tensors come from: a Checkpoint, a state_dict, or any mapping."""

    def get(self, name: str, /) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class WeightEntry:
    """One weight: `dst` = `op`(`srcs`, `args`), of the given type.

    `source` has one src, the name of a checkpoint tensor; `constant` has none: its values are in its args (as windows
    and filters that a checkpoint's config implies); the srcs of every other op are earlier entries.
    Args: constant {dtype, shape, data: little-endian values, deflated, base64}, concat {axis}, stack {} (a new
        first axis), transpose {axes}, slice {axis, start, stop}, reshape {shape}, cast {dtype}, dequantize: those of
        `Dequantize`; its srcs are codes, scales, then zero points and global scale where the arguments name them.
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
            raise IRError(f"no weight {name!r} in the program")
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
        if dst in self._entries:
            raise IRError(f"weight {dst!r} exists already")
        types = [self[src].type for src in srcs]
        made = infer_weight(dst, op, types, args)
        self._entries[dst] = WeightEntry(dst, op, tuple(srcs), dict(args), made.dtype, made.shape)
        return dst

    def source(self, dst: str, dtype: str, shape: Sequence[int], tensor: str | None = None) -> str:
        """A checkpoint tensor (named like `dst` unless told)."""
        if dst in self._entries:
            raise IRError(f"weight {dst!r} exists already")
        made = TensorType(dtype, tuple(int(size) for size in shape))
        self._entries[dst] = WeightEntry(dst, "source", (tensor or dst,), {}, made.dtype, made.shape)
        return dst

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
            raise CheckpointError("tensor is missing from the checkpoint", where=entry.srcs[0])
        if tuple(tensor.shape) != entry.shape or dtype_name(tensor.dtype) != entry.dtype:
            found = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            raise CheckpointError(f"tensor is {found}, the program needs {entry.type}", where=entry.srcs[0])
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
        elif entry.op == "cast":
            if out.dtype == entry.type.torch_dtype:
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
            raise IRError(f"{op} needs sources")
        return WEIGHT_OPS[op](list(types), **args)
    except TypeError:
        raise IRError(f"wrong arguments for {op}: {args}", where=dst) from None
    except IRError as error:
        raise IRError(error.what, where=dst, fix=error.fix) from None


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
        raise IRError(f"the data of the constant is not {size} bytes", where=entry.dst)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.shape)


def _constant(types: list[TensorType], dtype: str, shape: Sequence[int], data: str) -> TensorType:
    if types or not isinstance(data, str) or min(shape, default=1) < 1:
        raise IRError("a constant has a dtype, a shape, data and no sources")
    return TensorType(dtype, tuple(shape))


def _one(types: list[TensorType], op: str) -> TensorType:
    if len(types) != 1:
        raise IRError(f"{op} takes one source, not {len(types)}")
    return types[0]


def _axis(t: TensorType, axis: int) -> None:
    if not 0 <= axis < len(t.shape):
        raise IRError(f"axis {axis} is not one of {t}")


def _concat(types: list[TensorType], axis: int) -> TensorType:
    first = types[0]
    _axis(first, axis)
    rest = [t.shape[:axis] + t.shape[axis + 1 :] for t in types]
    if any(len(t.shape) != len(first.shape) or t.dtype != first.dtype for t in types) or len(set(rest)) != 1:
        raise IRError(f"cannot concatenate {', '.join(map(str, types))} along axis {axis}")
    total = sum(t.shape[axis] for t in types)
    return TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _stack(types: list[TensorType]) -> TensorType:
    if len(set(types)) != 1:
        raise IRError(f"cannot stack {', '.join(map(str, types))}")
    return TensorType(types[0].dtype, (len(types), *types[0].shape))


def _transpose(types: list[TensorType], axes: Sequence[int]) -> TensorType:
    t = _one(types, "transpose")
    if sorted(axes) != list(range(len(t.shape))):
        raise IRError(f"axes {list(axes)} are not an order of the axes of {t}")
    return TensorType(t.dtype, tuple(t.shape[axis] for axis in axes))


def _slice(types: list[TensorType], axis: int, start: int, stop: int) -> TensorType:
    t = _one(types, "slice")
    _axis(t, axis)
    if not 0 <= start < stop <= t.shape[axis]:
        raise IRError(f"{start}..{stop} is not inside axis {axis} of {t}")
    return TensorType(t.dtype, (*t.shape[:axis], stop - start, *t.shape[axis + 1 :]))


def _reshape(types: list[TensorType], shape: Sequence[int]) -> TensorType:
    t = _one(types, "reshape")
    if min(shape, default=1) < 0 or prod(shape) != t.numel():
        raise IRError(f"{t} has no shape {list(shape)}")
    return TensorType(t.dtype, tuple(shape))


def _cast(types: list[TensorType], dtype: str) -> TensorType:
    return TensorType(dtype, _one(types, "cast").shape)


WEIGHT_OPS: dict[str, Callable[..., TensorType]] = {
    "constant": _constant,
    "concat": _concat,
    "stack": _stack,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "cast": _cast,
    "dequantize": dequantized_type,
}
