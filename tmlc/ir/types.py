"""Types of IR values: a dtype name and a shape whose sizes may depend on `n`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tmlc.errors import IRError
from tmlc.ir.dims import Size, at, parse_size

__all__ = ["QUANTISED", "TORCH_DTYPES", "TensorType", "ValueType", "dtype_name", "parse_type"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    # What quantised checkpoints are stored in; nothing computes in them.
    "i8": torch.int8,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "f8e8m0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}

#: Dtypes of weights that engines keep as codes (tmlc/ir/quantize.py); in eager PyTorch their values are float32.
QUANTISED = ("i8g32", "i4g32", "i4g64", "f8g128")


def dtype_name(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype; IRError for one that the IR does not have."""
    if dtype not in _NAMES:
        raise IRError(f"{dtype} is not a dtype of the IR", fix=f"use one of {', '.join(TORCH_DTYPES)}")
    return _NAMES[dtype]


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype (a name in TORCH_DTYPES or QUANTISED) and shape; while a method is traced sizes may be torch.SymInt."""

    dtype: str
    shape: tuple[Any, ...]

    def __post_init__(self) -> None:
        if self.dtype not in TORCH_DTYPES and self.dtype not in QUANTISED:
            raise IRError(f"unknown dtype {self.dtype!r}", fix=f"use one of {', '.join(TORCH_DTYPES)}")
        if not isinstance(self.shape, tuple):
            object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def rows(self) -> Any:
        """Size of the first dimension (1 for a vector, as engines see it)."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def cols(self) -> Any:
        """Size of the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype in QUANTISED else TORCH_DTYPES[self.dtype]

    def at(self, n: int) -> tuple[int, ...]:
        """The shape in a call with `n` new positions."""
        return tuple(at(size, n) for size in self.shape)

    def numel(self, n: int = 1) -> int:
        total = 1
        for size in self.at(n):
            total *= size
        return total

    def nbytes(self, n: int = 1) -> int:
        """Bytes of the dense tensor in eager PyTorch, in a call with `n` new positions."""
        return self.numel(n) * ITEM_BYTES["f32" if self.dtype in QUANTISED else self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(size) for size in self.shape)}]"

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        """The type of a tensor (real, meta, or fake with symbolic sizes)."""
        return TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))


ValueType = TensorType | tuple[TensorType, ...]  # what node.meta["type"] holds: a tuple for ops of 0 or 2 outputs


def parse_type(text: str) -> TensorType:
    """Reads `f32[4n, 64]`, the form that `str` writes."""
    dtype, bracket, rest = text.strip().partition("[")
    if not bracket or not rest.endswith("]"):
        raise IRError(f"{text!r} is not a tensor type", fix="write it as f32[4n, 64]")
    sizes: list[Size] = [parse_size(part) for part in rest[:-1].split(",")] if rest[:-1].strip() else []
    return TensorType(dtype, tuple(sizes))
