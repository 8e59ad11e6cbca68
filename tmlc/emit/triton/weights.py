"""The tensors of a Triton package: weights as kernels/triton/layouts.py lays them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from tmlc.emit.packing import pack_plain
from tmlc.errors import EmitError
from tmlc.ir.program import Program
from tmlc.ir.quantize import SCHEMES, quantise, row_chunks
from tmlc.kernels.triton.layouts import FORMS, pack, weight_parts

#: What a package calls the dtypes of parts; float16 scales are kept as their bytes.
_STORED = {
    "f32": ("f32", 1),
    "bf16": ("bf16", 1),
    "i64": ("i64", 1),
    "i32": ("i32", 1),
    "u8": ("u8", 1),
    "f16": ("u8", 2),
}


@dataclass
class _Coded:
    """The codes of the weight that was packed last: its parts are written one after the other."""

    name: str = ""
    parts: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class TritonWeight:
    """One stored tensor: part number `part` of a weight (docs/triton.md, "Weights")."""

    name: str
    weight: str
    dtype: str
    rows: int
    cols: int
    scheme: str
    part: int
    last: bool
    coded: _Coded

    def pieces(self, tensor: torch.Tensor) -> Iterator[np.ndarray]:
        """The bytes of this part of `tensor`."""
        if not self.scheme:
            yield from pack_plain(tensor, self.dtype)
            return
        if self.coded.name != self.weight:
            self.coded.name, self.coded.parts = self.weight, _codes(tensor, self.scheme)
        part = self.coded.parts[self.part]
        if self.last:
            self.coded.name, self.coded.parts = "", []
        yield part


def _codes(tensor: torch.Tensor, scheme: str) -> list[np.ndarray]:
    """The stored parts of a float weight [.., m, k]."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    made: list[list[np.ndarray]] = []
    for piece in row_chunks(*flat.shape):
        q = quantise(flat[piece], SCHEMES[scheme])
        zeros = None if q.zeros is None else q.zeros.numpy()
        made.append(pack(scheme, q.codes.numpy(), q.scales.numpy(), zeros))
    return [np.concatenate(parts) for parts in zip(*made, strict=True)]


def stored_weights(program: Program, names: Iterable[str]) -> list[TritonWeight]:
    """The tensors of the weights that launches read, part after part.

    Raises EmitError for a dtype that the kernels have no layout for.
    """
    coded, stored = _Coded(), []
    for name in names:
        entry = program.weights[name]
        shape = tuple(int(size) for size in entry.shape) or (1,)
        scheme = entry.dtype if entry.dtype in SCHEMES else ""
        if entry.dtype not in FORMS and entry.dtype not in _STORED:
            what = f"weight {name} is {entry.dtype}, for which there is no layout"
            raise EmitError(what, where="target triton", fix=f"use {', '.join(FORMS)}")
        parts = weight_parts(name, entry.dtype, shape) if entry.dtype in FORMS else None
        for number, part in enumerate(parts or ()):
            dtype, factor = _STORED[part.dtype]
            rows = prod(part.shape[:-1])
            last = number == len(parts or ()) - 1
            cols = part.shape[-1] * factor
            stored.append(TritonWeight(part.name, name, dtype, rows, cols, scheme, number, last, coded))
        if parts is None:
            stored.append(TritonWeight(name, name, entry.dtype, prod(shape[:-1]), shape[-1], "", 0, True, coded))
    return stored
