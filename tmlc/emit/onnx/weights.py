"""The forms in which ONNX graphs read weights, and how their bytes are made (docs/onnx.md, "Weights").

A quantised weight is one stored tensor of bytes with sections, each at a multiple of 64 bytes: the codes of all rows,
then their scales (float16), then, for int4, their zero points in sixteenths (bytes). Rows are padded to whole groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from tmlc.ir.program import Program
from tmlc.ir.quantize import SCHEMES, Codes, quantise, row_chunks
from tmlc.package.safetensors_io import TensorEntry, WeightItem, layout

ALIGN = 64
CHUNK = 1 << 22
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1, "u8": 1}

#: How codes are written: signed bytes, bytes as they are, two a byte (low four bits first: as 4-bit numbers, or as the
#: bytes that they lie in), or two a byte of which the low halves are the first half of the row and the high ones the
#: second. ".mixed" behind a form: the rows of gate and up, which lie one behind the other in a stack, in turn.
FORMS = ("i8", "u8", "u4", "u4.blocks", "u4.halves")
MIXED = ".mixed"


@dataclass(frozen=True)
class Section:
    """A part of a stored tensor, as a graph sees it: `nbytes` at `offset`, of `dtype` (as in graph.py) and `shape`."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OnnxWeight:
    """A tensor of the package; see `tmlc.emit.targets.StoredWeight`.

    Attributes:
        form: "plain", or one of FORMS for the codes of `scheme`; perhaps with MIXED.
        shape: of the weight in the program, vectors and stacks as they are.
    """

    name: str
    weight: str
    form: str
    dtype: str
    shape: tuple[int, ...]
    scheme: str = ""

    @property
    def rows(self) -> int:
        return 1 if self.scheme or len(self.shape) < 2 else self.shape[0]

    @property
    def cols(self) -> int:
        if self.scheme:
            return sum(_up(section.nbytes) for section in self.sections())
        return prod(self.shape) // self.rows

    def sections(self) -> tuple[Section, ...]:
        """Values; or codes, scales, and zero points where the scheme has them."""
        if not self.scheme:
            return (Section(self.dtype, self.shape, 0, prod(self.shape) * WIDTHS[self.dtype]),)
        scheme = SCHEMES[self.scheme]
        rows, groups = self.shape[:-1], scheme.groups(self.shape[-1])
        width, count = groups * scheme.group, prod(rows)
        form = self.form.removesuffix(MIXED)
        if form == "u4":
            codes = Section("u4", (*rows, width), 0, count * width // 2)
        elif form in ("u4.blocks", "u4.halves"):
            codes = Section("u8", (*rows, width // 2), 0, count * width // 2)
        else:
            codes = Section(form, (*rows, width), 0, count * width)
        sections = [codes, Section("f16", (*rows, groups), _up(codes.nbytes), count * groups * 2)]
        if scheme.bits == 4:
            sections.append(
                Section("u8", (*rows, groups), _up(sections[1].offset + sections[1].nbytes), count * groups)
            )
        return tuple(sections)

    def pieces(self, tensor: torch.Tensor) -> Iterator[np.ndarray]:
        """The stored bytes of `tensor`; for codes it is the float weight that they are made of."""
        if self.form.endswith(MIXED):
            experts, rows, k = tensor.shape
            tensor = tensor.reshape(experts, 2, rows // 2, k).transpose(1, 2)
        if not self.scheme:
            flat = tensor.detach().reshape(-1)
            for begin in range(0, flat.numel(), CHUNK):
                part = flat[begin : begin + CHUNK].to(TORCH[self.dtype]).contiguous()
                bits = part.view(torch.int16) if part.dtype == torch.bfloat16 else part
                yield bits.numpy().view(np.uint8)
            return
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        beside: list[list[np.ndarray]] = [[], []]
        size = 0
        for chunk in row_chunks(*flat.shape):
            found = quantise(flat[chunk], SCHEMES[self.scheme])
            codes = self._codes(found)
            size += codes.nbytes
            yield codes
            beside[0].append(found.scales.numpy().reshape(-1).view(np.uint8))
            if found.zeros is not None:
                beside[1].append(found.zeros.numpy().reshape(-1))
        yield np.zeros(-size % ALIGN, np.uint8)
        for arrays in beside:
            if arrays:
                joined = np.concatenate(arrays)
                yield joined
                yield np.zeros(-joined.nbytes % ALIGN, np.uint8)

    def _codes(self, found: Codes) -> np.ndarray:
        codes = found.codes.numpy().reshape(len(found.codes), -1)
        form = self.form.removesuffix(MIXED)
        if form == "i8":
            return (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
        if form in ("u4", "u4.blocks"):
            return codes[:, 0::2] | codes[:, 1::2] << 4
        if form == "u4.halves":
            half = codes.shape[1] // 2
            return codes[:, :half] | codes[:, half:] << 4
        return np.ascontiguousarray(codes)


class Weights:
    """The weights that the graphs of a program read, in the order of first use."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stored: dict[str, OnnxWeight] = {}

    def use(self, weight: str, form: str = "plain") -> OnnxWeight:
        """The stored tensor of a weight in a form; codes only come from quantised weights, and quantised weights only
        come as codes."""
        entry = self.program.weights[weight]
        shape = tuple(int(size) for size in entry.shape)
        if entry.dtype in SCHEMES:
            made = OnnxWeight(f"{weight}@{form}", weight, form, "u8", shape, entry.dtype)
        else:
            name = f"{weight}@{form}" if form != "plain" else weight
            made = OnnxWeight(name, weight, form, entry.dtype, shape)
        return self.stored.setdefault(made.name, made)

    def places(self) -> tuple[dict[str, TensorEntry], int]:
        """Where each stored tensor lies behind the header of the weights file, and where the header ends."""
        head, entries, _ = layout(_items(list(self.stored.values())))
        return entries, len(head)


def _items(weights: Sequence[OnnxWeight]) -> list[WeightItem]:
    return [WeightItem(w.name, w.dtype, (w.rows, w.cols), lambda: b"") for w in weights]


def _up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
