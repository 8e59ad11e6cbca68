"""Reads a graph's file before ONNX Runtime does, without any library: which weights it takes from where, and whether it
holds nothing but a graph of known operators.

A graph names its weights by file, offset and length. Here each such place is held to lie inside one tensor of the
package's weights; where the package is a single file, the places are rewritten to point into that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from tmlc.errors import PackageError

AGAIN = "Get the package again from its source, or compile it again with this version of tmlc."
DOMAINS = ("", "com.microsoft")
MAX_DEPTH = 8  # of graphs in graphs

# Field numbers of the messages of ONNX (onnx.proto) that matter here.
MODEL_PLAIN, MODEL_OPSET, MODEL_GRAPH = frozenset({1, 2, 3, 4, 5, 6, 14}), 8, 7
GRAPH_NODE, GRAPH_TENSOR, GRAPH_PLAIN = 1, 5, frozenset({2, 10, 11, 12, 13})
NODE_ATTRIBUTE, NODE_DOMAIN, NODE_PLAIN = 5, 7, frozenset({1, 2, 3, 4, 6})
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = (5, 10), (6, 11)
ATTRIBUTE_PLAIN = frozenset({1, 2, 3, 4, 7, 8, 9, 13, 20})
TENSOR_EXTERNAL, TENSOR_LOCATION, TENSOR_NAME = 13, 14, 8
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Field = tuple[int, int, memoryview | int, memoryview]
"""(number, wire type, value, the field's own bytes)."""


class Place(Protocol):
    """Where a tensor lies behind the header of the weights file (`tmlc.package.safetensors_io.TensorEntry`)."""

    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class ModelFile:
    """One graph's file.

    Args:
        data: its bytes.
        where: its name, for errors.
        weights: name of the weights file in the graph.
        tensors: the stored tensors; `start` is where the first byte behind the header of the weights file lies in it.

    Attributes:
        nodes: of all its graphs, once `pointed` has seen them.
    """

    def __init__(self, data: bytes, where: str, weights: str, tensors: Mapping[str, Place], start: int) -> None:
        self._data, self._where, self._weights = memoryview(data), where, weights
        spans = sorted((start + t.offset, start + t.offset + t.nbytes) for t in tensors.values())
        self.nodes = 0
        self._begins, self._ends = [b for b, _ in spans], [e for _, e in spans]

    def pointed(self, location: str, shift: int) -> bytes:
        """The file with every weight at `location`, `shift` bytes further on; checked on the way.

        Raises:
            PackageError: no graph, cut short, functions or operators of another domain, weights of another file or
                outside of the stored tensors.
        """
        out: list[bytes | memoryview] = []
        graphs = 0
        for number, wire, value, raw in self._fields(self._data):
            if number == MODEL_GRAPH and wire == BYTES:
                graphs += 1
                out.append(_message(MODEL_GRAPH, self._graph(_view(value), location, shift)))
                continue
            if number == MODEL_OPSET and wire == BYTES:
                for inner, _, domain, _ in self._fields(_view(value)):
                    if inner == 1:
                        self._domain(domain)
            elif number not in MODEL_PLAIN:
                raise self._bad(f"it holds more than a graph (field {number})")
            out.append(raw)
        if graphs != 1:
            raise self._bad(f"it holds {graphs} graphs")
        return b"".join(out)

    def _bad(self, what: str) -> PackageError:
        return PackageError(f"not a graph that tmlc wrote: {what}", where=self._where, fix=AGAIN)

    def _graph(self, data: memoryview, location: str, shift: int) -> bytes:
        out: list[bytes | memoryview] = []
        for number, _, value, raw in self._fields(data):
            if number == GRAPH_TENSOR:
                made = self._tensor(_view(value), location, shift)
                out.append(raw if made is None else _message(GRAPH_TENSOR, made))
                continue
            self._inside(number, value, 0)
            out.append(raw)
        return b"".join(out)

    def _inside(self, number: int, value: memoryview | int, depth: int) -> None:
        """Checks a field of a graph that is no initializer of the outermost graph."""
        if number == GRAPH_NODE:
            self.nodes += 1
            self._node(_view(value), depth)
        elif number == GRAPH_TENSOR:
            self._own(_view(value))
        elif number not in GRAPH_PLAIN:
            raise self._bad(f"an unknown part of a graph (field {number})")

    def _node(self, data: memoryview, depth: int) -> None:
        for number, _, value, _ in self._fields(data):
            if number == NODE_DOMAIN:
                self._domain(value)
            elif number == NODE_ATTRIBUTE:
                for inner, _, part, _ in self._fields(_view(value)):
                    if inner in ATTRIBUTE_TENSORS:
                        self._own(_view(part))
                    elif inner in ATTRIBUTE_GRAPHS:
                        if depth >= MAX_DEPTH:
                            raise self._bad("graphs are nested too deeply")
                        for field, _, content, _ in self._fields(_view(part)):
                            self._inside(field, content, depth + 1)
                    elif inner not in ATTRIBUTE_PLAIN:
                        raise self._bad(f"an unknown part of an attribute (field {inner})")
            elif number not in NODE_PLAIN:
                raise self._bad(f"an unknown part of a node (field {number})")

    def _domain(self, value: memoryview | int) -> None:
        domain = bytes(_view(value)).decode("utf-8", "replace")
        if domain not in DOMAINS:
            raise self._bad(f"operators of the domain {domain[:40]!r}")

    def _own(self, data: memoryview) -> None:
        """Checks that a tensor has its values in the graph itself."""
        if any(number in (TENSOR_EXTERNAL, TENSOR_LOCATION) for number, _, _, _ in self._fields(data)):
            raise self._bad("a tensor inside of it lies elsewhere")

    def _tensor(self, data: memoryview, location: str, shift: int) -> bytes | None:
        """An initializer with its place moved; None where it has its values in the graph."""
        entries: dict[str, str] = {}
        rest: list[bytes | memoryview] = []
        name, external = "", False
        for number, wire, value, raw in self._fields(data):
            if number == TENSOR_EXTERNAL:
                pair = {inner: bytes(_view(part)).decode("utf-8", "replace") for inner, _, part, _ in
                        self._fields(_view(value))}  # fmt: skip
                entries[pair.get(1, "")] = pair.get(2, "")
                continue
            external |= number == TENSOR_LOCATION and wire == VARINT and value == 1
            if number == TENSOR_NAME:
                name = bytes(_view(value)).decode("utf-8", "replace")
            rest.append(raw)
        if not entries and not external:
            return None
        shown = f"weight {name[:60]}"
        if not external or set(entries) != {"location", "offset", "length"} or entries["location"] != self._weights:
            raise self._bad(f"{shown} does not lie in {self._weights}")
        numbers = [entries[key] for key in ("offset", "length")]
        if not all(text.isascii() and text.isdecimal() and len(text) < 19 for text in numbers):
            raise self._bad(f"{shown} has no place")
        offset, length = map(int, numbers)
        if not self._stored(offset, length):
            raise self._bad(f"{shown} lies outside of the stored tensors")
        for key, text in (("location", location), ("offset", str(offset + shift)), ("length", str(length))):
            pair_bytes = _message(1, key.encode()) + _message(2, text.encode())
            rest.append(_message(TENSOR_EXTERNAL, pair_bytes))
        return b"".join(rest)

    def _stored(self, offset: int, length: int) -> bool:
        from bisect import bisect_right

        at = bisect_right(self._begins, offset) - 1
        return at >= 0 and offset + length <= self._ends[at]

    def _fields(self, data: memoryview) -> Iterator[Field]:
        at, end = 0, len(data)
        while at < end:
            begin = at
            key, at = self._varint(data, at)
            number, wire = key >> 3, key & 7
            value: memoryview | int
            if wire == VARINT:
                value, at = self._varint(data, at)
            elif wire == BYTES:
                length, at = self._varint(data, at)
                value, at = data[at : at + length], at + length
            elif wire in (FIXED64, FIXED32):
                size = 8 if wire == FIXED64 else 4
                value, at = data[at : at + size], at + size
            else:
                raise self._bad("it is damaged")
            if at > end or number == 0:
                raise self._bad("it is cut short")
            yield number, wire, value, data[begin:at]

    def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise self._bad("it is cut short")
            byte = data[at]
            value, at = value | (byte & 0x7F) << shift, at + 1
            if byte < 0x80:
                return value, at
        raise self._bad("it is damaged")


def _view(value: memoryview | int) -> memoryview:
    """A field that should be bytes; a number there is an empty message, which no check lets pass as more."""
    return value if isinstance(value, memoryview) else memoryview(b"")


def _message(number: int, data: bytes) -> bytes:
    return _encoded(number << 3 | BYTES) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
