"""Puts weights into the forms that the CPU kernels read (docs/plan-format.md, "Packed weights"), piece by
piece.

Each function yields pieces of the packed tensor in order, so that packing needs little memory beside the
tensor that is being packed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tmlc.errors import CheckpointError
from tmlc.ir.quantize import SCHEMES, Codes, quantise, row_chunks

BLOCK = 16
CHUNK_ROWS = 2048  # rows packed at a time: bounds the extra memory
RUN = 4  # groups of a quantised block whose codes, then scales, then zero points lie together

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PackedWeight:
    """A tensor of the package: which weight of the program, in which form, and its two-dimensional shape.

    `dtype` is the stored one: the codes and scales of a quantised weight (`scheme`) are bytes.
    """

    name: str
    weight: str
    form: str
    dtype: str
    rows: int
    cols: int
    scheme: str = ""

    def pieces(self, tensor: torch.Tensor) -> Iterator[np.ndarray]:
        """The packed bytes of `tensor`, which has the shape that the program gives the weight.

        For a quantised weight it is the float one that the codes are made of.
        """
        return FORMS[self.form].pack(tensor, self.scheme or self.dtype)


def blocks(rows: int) -> int:
    """How many blocks of 16 hold this many output rows."""
    return -(-rows // BLOCK)


def packed_cols(k: int, dtype: str) -> int:
    """Elements of one packed block: K rows of 16; bf16 has K rounded up to even, quantised forms whole groups."""
    if dtype in SCHEMES:
        scheme = SCHEMES[dtype]
        return scheme.groups(k) * BLOCK * (scheme.group * scheme.bits // 8 + scheme.side_bytes)
    return (k + k % 2 if dtype == "bf16" else k) * BLOCK


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises CheckpointError that names the tensor when it holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.itemsize == 1:
        tensor = tensor.bfloat16()  # exact; torch does not compare fp8
    low, high = torch.aminmax(tensor)  # both carry a NaN on, and no copy is made
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(
            f"tensor {name} holds {bad} values that are NaN or infinite",
            where="weights",
            fix="The checkpoint is damaged or its training diverged: export it again.",
        )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def pack_plain(tensor: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """Row after row, as the program has it."""
    flat = tensor.reshape(-1)
    step = 1 << 22
    for begin in range(0, flat.numel(), step):
        yield _numpy(flat[begin : begin + step].to(DTYPES[dtype]))


def pack_taps(tensor: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """A depthwise filter [c, k] or [c, 1, k] as [k, c]: the newest tap in the last row."""
    yield _numpy(tensor.reshape(tensor.shape[0], -1).T.to(DTYPES[dtype]))


def pack_linear(tensor: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """[m, k] in blocks of 16 rows, K-major inside the block (bf16: pairs along K), zeros where rows or K
    end."""
    m, k = tensor.shape
    if dtype in SCHEMES:
        for piece in row_chunks(m, k):
            yield _numpy(_quantised_blocks(quantise(tensor[piece], SCHEMES[dtype])))
        return
    for begin in range(0, m, CHUNK_ROWS):
        part = tensor[begin : begin + CHUNK_ROWS].to(DTYPES[dtype])
        rows, depth = blocks(part.shape[0]), packed_cols(k, dtype) // BLOCK
        if (rows * BLOCK, depth) != tuple(part.shape):
            padded = part.new_zeros(rows * BLOCK, depth)
            padded[: part.shape[0], :k] = part
            part = padded
        if dtype == "bf16":
            packed = part.reshape(rows, BLOCK, depth // 2, 2).permute(0, 2, 1, 3)
        else:
            packed = part.reshape(rows, BLOCK, depth).permute(0, 2, 1)
        yield _numpy(packed)


def _quantised_blocks(q: Codes) -> torch.Tensor:
    """uint8 [blocks, bytes]: run after run of groups, each its codes (quads of inputs outermost), scales, zero points.

    Whole runs keep the codes on cache lines, which groups alone (of 544, 304 or 560 bytes) would not.
    """
    rows, groups, group = q.codes.shape
    pad = blocks(rows) * BLOCK - rows

    def whole(part: torch.Tensor) -> torch.Tensor:
        return torch.cat([part, part.new_zeros(pad, *part.shape[1:])]) if pad else part

    halves = group // 32
    codes = whole(q.codes).reshape(-1, BLOCK, groups, halves, 8, 4).permute(0, 2, 3, 4, 1, 5)
    if q.scheme.bits == 4:  # quads 0..3 in the low nibbles, 4..7 in the high ones
        codes = codes[:, :, :, :4] | codes[:, :, :, 4:] << 4
    count = len(codes)
    parts = [codes.reshape(count, groups, -1)]
    scales = whole(q.scales).reshape(count, BLOCK, groups).transpose(1, 2).contiguous()
    parts.append(scales.view(torch.uint8))
    if q.zeros is not None:
        parts.append(whole(q.zeros).reshape(count, BLOCK, groups).transpose(1, 2))
    full = groups // RUN * RUN
    runs = [part[:, :full].reshape(count, groups // RUN, RUN * part.shape[-1]) for part in parts]
    rest = [part[:, full:].reshape(count, -1) for part in parts]
    return torch.cat([torch.cat(runs, -1).reshape(count, -1), *rest], -1)


def pack_experts(tensor: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """[E, m, k]: the blocks of expert 0, then expert 1, …"""
    for expert in tensor:
        yield from pack_linear(expert, dtype)


def pack_gate_up(tensor: torch.Tensor, dtype: str) -> Iterator[np.ndarray]:
    """[E, 2f, d]: for each expert the blocks of its gate rows and of its up rows in turn."""
    f = tensor.shape[1] // 2
    for expert in tensor:
        for gate, up in zip(pack_linear(expert[:f], dtype), pack_linear(expert[f:], dtype), strict=True):
            count = gate.size // packed_cols(tensor.shape[2], dtype)
            yield np.stack([gate.reshape(count, -1), up.reshape(count, -1)], 1)


@dataclass(frozen=True)
class Form:
    """How a weight of some shape is packed, and the two-dimensional shape that comes of it."""

    pack: Callable[[torch.Tensor, str], Iterator[np.ndarray]]
    shape: Callable[[tuple[int, ...], str], tuple[int, int]]


def _plain_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    return (1, shape[0] if shape else 1) if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))


def _experts_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    return shape[0] * blocks(shape[1]), packed_cols(shape[2], dtype)


def _gate_up_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    return shape[0] * 2 * blocks(shape[1] // 2), packed_cols(shape[2], dtype)


FORMS: dict[str, Form] = {
    "plain": Form(pack_plain, _plain_shape),
    "taps": Form(pack_taps, lambda shape, dtype: (shape[-1], shape[0])),
    "k16": Form(pack_linear, lambda shape, dtype: (blocks(shape[0]), packed_cols(shape[1], dtype))),
    "k16.experts": Form(pack_experts, _experts_shape),
    "k16.gate_up": Form(pack_gate_up, _gate_up_shape),
}


def packed_weight(weight: str, form: str, dtype: str, shape: tuple[int, ...]) -> PackedWeight:
    """The tensor of the package that holds `weight` in `form`; one weight may be there in two forms."""
    rows, cols = FORMS[form].shape(shape, dtype)
    name = weight if form == "plain" else f"{weight}@{form}"
    if dtype in SCHEMES:
        return PackedWeight(name, weight, form, "u8", rows, cols, dtype)
    return PackedWeight(name, weight, form, dtype, rows, cols)
