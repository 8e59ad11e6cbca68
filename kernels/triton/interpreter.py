"""Runs launches through Triton's interpreter on host memory, in a process that was started with TRITON_INTERPRET=1.

Three things differ from Triton's own interpreter. Every address that a kernel touches is checked against the operands
of its launch. float32 → bf16 rounds to nearest, ties to even, as GPUs do (Triton's interpreter cuts off). A dot
multiplies bf16 numbers as such and adds up each element in one order, whatever column it stands in.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as base

from tmlc.errors import TargetError
from tmlc.kernels.triton.mode import FUNCTIONS, INTERPRET, PARAMETERS
from tmlc.kernels.triton.registry import load_kernels

if not INTERPRET:
    raise TargetError(
        "this process compiles kernels and cannot interpret them",
        fix="use tmlc.kernels.triton.worker.open_interpreter(), which starts a process that can",
    )

_TYPES = {
    "*fp64": tl.float64, "*fp32": tl.float32, "*fp16": tl.float16, "*bf16": tl.bfloat16, "*i64": tl.int64,
    "*i32": tl.int32, "*u8": tl.uint8,
}  # fmt: skip
_NUMBERS = {"i32": (np.int32, tl.int32), "i64": (np.int64, tl.int64), "fp32": (np.float32, tl.float32)}

Range = tuple[int, int]
_allowed: list[Range] = []
_reported: list[str] = []


def run_launch(
    kernel: str,
    constexprs: dict[str, Any],
    grid: tuple[int, int, int],
    signature: Sequence[str],
    args: Sequence[int | float],
    ranges: Sequence[Range],
) -> None:
    """Runs every program of a launch, one after the other.

    Args:
        signature: as of `Launch.signature`.
        args: addresses, integers, floats, in the order of the kernel's runtime parameters.
        ranges: (first, behind the last) address of each piece of memory that the launch may touch.

    Raises:
        IndexError: a program touched an address outside the ranges; says which operand is nearest.
    """
    load_kernels()
    fn = FUNCTIONS[kernel]
    runtime = [name for name in PARAMETERS[kernel] if name not in constexprs]
    values: dict[str, Any] = {name: _constant(value) for name, value in constexprs.items()}
    for name, kind, value in zip(runtime, signature, args, strict=True):
        values[name] = _argument(kind.partition(":")[0], value)
    _allowed[:] = sorted(ranges)
    builder = base.interpreter_builder
    builder.set_grid_dim(*grid)
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                builder.set_grid_idx(x, y, z)
                fn(**values)


def _constant(value: Any) -> Any:
    return None if value is None else tl.constexpr(tuple(value) if isinstance(value, list) else value)


def _argument(kind: str, value: int | float) -> tl.tensor:
    if kind in _TYPES:
        dtype = tl.pointer_type(_TYPES[kind])
        return tl.tensor(base.TensorHandle(np.array([value], np.uint64), dtype), dtype)
    numpy, dtype = _NUMBERS[kind]
    return tl.tensor(base.TensorHandle(np.array([value], numpy), dtype), dtype)


def _check(addresses: np.ndarray, mask: np.ndarray | None, nbytes: int, what: str) -> None:
    touched = addresses.reshape(-1) if mask is None else np.broadcast_to(addresses, mask.shape)[mask].reshape(-1)
    if not touched.size:
        return
    starts = np.array([first for first, _ in _allowed], np.uint64)
    ends = np.array([last for _, last in _allowed], np.uint64)
    place = np.searchsorted(starts, touched, "right").astype(np.int64) - 1
    good = (place >= 0) & (touched + np.uint64(nbytes) <= ends[np.maximum(place, 0)])
    if not good.all():
        bad = int(touched[~good][0])
        raise IndexError(
            f"a program {what} {nbytes} bytes at {bad:#x}, outside {[(hex(a), hex(b)) for a, b in _allowed]}"
        )


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _dense(handle: Any) -> Any:
    return base.TensorHandle(np.ascontiguousarray(handle.data), handle.dtype)


def _floats(handle: Any) -> np.ndarray:
    """The numbers of a handle; of bf16, which is kept as bits, as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _install() -> None:
    """Puts the differences into Triton's builder and makes its language functions callable at once."""
    cls = base.InterpreterBuilder
    load, store = cls.create_masked_load, cls.create_masked_store
    cast, splat = cls.cast_impl, cls.create_splat

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _check(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8, "reads")
        return load(self, _dense(ptrs), _dense(mask), *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8, "writes")
        return store(self, _dense(ptrs), _dense(value), _dense(mask), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any, *_: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16:
            return base.TensorHandle(_bf16_bits(_floats(src).astype(np.float32)), tl.bfloat16)
        if source == tl.bfloat16:
            return base.TensorHandle(_floats(src).astype(base._get_np_dtype(target)), target)
        return cast(self, src, dst_type)

    def broadcast_scalar(self: Any, ret_ty: Any, arg: Any) -> Any:
        if (
            arg.data.dtype == np.bool_
        ):  # the result of a comparison, which the interpreter files under its operands' type
            arg = base.TensorHandle(arg.data, tl.int1)
        return splat(self, ret_ty, arg)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = _floats(a).astype(np.float64), _floats(b).astype(np.float64)
        # Column by column: what a column gives must not depend on how many there are.
        columns = [
            np.einsum("...ik,...k->...i", left, np.ascontiguousarray(right[..., j]), optimize=False)
            for j in range(right.shape[-1])
        ]
        return base.TensorHandle(np.stack(columns, -1).astype(np.float32) + d.data, d.dtype.scalar)

    changed: dict[str, Callable[..., Any]] = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "cast_impl": cast_impl,
        "create_fp_to_fp": cast_impl,
        "create_fp_ext": cast_impl,
        "create_fp_trunc": cast_impl,
        "create_si_to_fp": cast_impl,
        "create_dot": dot,
        "create_splat": broadcast_scalar,
    }
    for name, function in changed.items():
        setattr(cls, name, function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    base.InterpretedFunction.__call__ = call  # the language is patched once, below, and stays so
    base._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # Triton 3.6 asks numpy for the number in an array of one, which numpy refuses from 2.4 on.
    tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())


_install()
