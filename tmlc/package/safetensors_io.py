"""Safetensors files that can be used in place: tensors at multiples of 64 bytes, data at a multiple of 4096.

The format allows no holes, so the gaps are tensors of their own, named `__pad.N`. Every safetensors reader
accepts such a file; here it is written one tensor at a time and read without copying.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tmlc.errors import REPORT, PackageError
from tmlc.package.fields import parse_json
from tmlc.package.manifest import DTYPES

ALIGN = 64
PAGE = 4096
PAD = "__pad."
_CODES = {"f32": "F32", "bf16": "BF16", "i32": "I32", "i64": "I64", "u8": "U8"}
_DTYPES = {code: name for name, code in _CODES.items()}
NUMPY = {"f32": np.float32, "bf16": np.uint16, "i32": np.int32, "i64": np.int64, "u8": np.uint8}
MAX_HEADER = 100 * 2**20  # the limit of the reference reader
_AGAIN = "Get the package again from its source, or compile it again with this version of tmlc."

Buffer = bytes | bytearray | memoryview | np.ndarray
# What makes the bytes of a tensor when its turn has come: all at once, or in pieces.
Producer = Callable[[], Buffer | Iterable[Buffer]]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `nbytes` at `offset` from the start of the data. bf16: 16-bit patterns."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WeightItem:
    """A tensor to be written: its form is known before its bytes exist."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    producer: Producer

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * DTYPES[self.dtype]


def layout(items: Iterable[WeightItem]) -> tuple[bytes, dict[str, TensorEntry], int]:
    """The header of a file with these tensors in this order, where each lies, and the bytes of all data."""
    header: dict[str, Any] = {"__metadata__": {"format": "tmlc"}}
    entries: dict[str, TensorEntry] = {}
    offset = 0
    for item in items:
        if item.name in entries or item.name.startswith("__"):
            fix = "Rename the weight: each name once, and none that begins with __."
            raise PackageError(f"tensor name {item.name!r} is taken", where="weights.safetensors", fix=fix)
        nbytes = item.nbytes
        entries[item.name] = TensorEntry(item.dtype, tuple(item.shape), offset, nbytes)
        span = [offset, offset + nbytes]
        header[item.name] = {"dtype": _CODES[item.dtype], "shape": list(item.shape), "data_offsets": span}
        offset += nbytes
        if gap := -offset % ALIGN:
            header[f"{PAD}{len(entries)}"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": [offset, offset + gap],
            }
            offset += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text, entries, offset


def as_bytes(buffer: Buffer) -> memoryview:
    """A flat view of the bytes of an array or buffer, without a copy where it is contiguous."""
    if isinstance(buffer, np.ndarray):
        return np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


def stream(items: list[WeightItem]) -> Iterator[memoryview]:
    """The bytes of the file, tensor by tensor: each producer is called when its turn has come.

    Raises:
        PackageError: a producer gave more or fewer bytes than its shape and dtype say.
    """
    head = layout(items)[0]
    yield memoryview(head)
    for item in items:
        try:
            made = item.producer()
        except OSError as error:  # not the disk that is written to
            raise PackageError(
                f"cannot read what {item.name} is made of: {error.strerror or error}",
                where="checkpoint",
                fix="Check the checkpoint's files.",
            ) from error
        pieces = [made] if isinstance(made, (bytes, bytearray, memoryview, np.ndarray)) else made
        count = 0
        for piece in pieces:
            view = as_bytes(piece)
            count += len(view)
            if count <= item.nbytes:
                yield view
        if count != item.nbytes:
            what = f"{item.name} has {count} bytes, expected {item.nbytes}"
            raise PackageError(what, where="weights.safetensors", fix=REPORT)
        if gap := -item.nbytes % ALIGN:
            yield memoryview(bytes(gap))
        del made, pieces


def parse_header(data: memoryview, where: str) -> tuple[dict[str, TensorEntry], int, int]:
    """Reads the header of a whole safetensors file.

    Returns:
        The tensors without the pads (offsets from the start of the data), where the data starts, and its
        bytes.

    Raises:
        PackageError: cut short, absurd sizes, overlapping or unaligned tensors, holes, unknown dtypes.
    """

    def bad(what: str) -> PackageError:
        return PackageError(what[:200], where=where, fix=_AGAIN)

    if len(data) < 8:
        raise bad("the tensor file is cut short")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise bad(f"a tensor header of {length} bytes does not fit the file")
    header = parse_json(bytes(data[8 : 8 + length]), where)
    if not isinstance(header, dict):
        raise bad("the tensor header is not an object")
    start, total = 8 + length, len(data) - 8 - length
    spans: list[tuple[int, int]] = []
    entries: dict[str, TensorEntry] = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"tensor {name[:60]!r} is not described as it should be")
        dtype, shape, offsets = _DTYPES.get(str(value["dtype"])), value["shape"], value["data_offsets"]
        if dtype is None:
            raise bad(f"tensor {name[:60]!r} has the unknown dtype {str(value['dtype'])[:20]!r}")
        if not _whole_numbers(shape, 8) or not _whole_numbers(offsets, 2) or len(offsets) != 2:
            raise bad(f"tensor {name[:60]!r} has a wrong shape or offsets")
        begin, end = offsets
        count = DTYPES[dtype]
        for dim in shape:
            count *= dim
        if not begin <= end <= total or end - begin != count:
            raise bad(f"tensor {name[:60]!r} does not fit its bytes")
        spans.append((begin, end))
        if name.startswith(PAD):
            continue
        if begin % ALIGN:
            raise bad(f"tensor {name[:60]!r} is not at a multiple of {ALIGN} bytes")
        entries[name] = TensorEntry(dtype, tuple(shape), begin, end - begin)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise bad("tensors overlap or leave a hole")
        position = end
    if position != total:
        raise bad("the tensor file has bytes that belong to no tensor")
    return entries, start, total


def _whole_numbers(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(v) is int and 0 <= v < 2**62 for v in value)
    )


def view(data: np.ndarray, entry: TensorEntry) -> np.ndarray:
    """The tensor as an array over the data section (`data`: uint8), no copy; bf16 comes as uint16."""
    flat = data[entry.offset : entry.offset + entry.nbytes].view(NUMPY[entry.dtype])
    return flat.reshape(entry.shape)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def dump(tensors: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> bytes:
    """A small file in memory. Array dtypes give the stored dtype; `dtypes` may name a uint16 array bf16."""
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}
    items = [
        WeightItem(name, (dtypes or {}).get(name, names[array.dtype]), array.shape, partial(_same, array))
        for name, array in tensors.items()
    ]
    return b"".join(bytes(piece) for piece in stream(items))


def load(data: bytes, where: str) -> dict[str, np.ndarray]:
    """All tensors of a small file as read-only arrays; bf16 comes as uint16."""
    entries, start, total = parse_header(memoryview(data), where)
    raw = np.frombuffer(data, np.uint8, total, start)
    return {name: view(raw, entry) for name, entry in entries.items()}
