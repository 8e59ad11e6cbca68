"""What Inkling-2 adds to a residual stream: heads clipped to a length, blocks of a row mixed by fixed queries."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import MOST_COLUMNS, power
from tmlc.kernels.triton.registry import Call, launch, lowering


@device
def l2_clip_kernel(out, x, scale, heads, d, x_stride, out_stride, threshold, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Each head of scale·x times min(1, threshold/(its length + 1e-6)); grid (rows, runs of heads)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inner = tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (inner < d)[None, :]
    col = head[:, None] * d + inner[None, :]
    values = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    if scale is not None:
        values = values * tl.load(scale + col, mask=mask, other=0.0)
    length = tl.sqrt_rn(tl.sum(values * values, 1))
    factor = tl.minimum(1.0, threshold / (length + 1e-6))
    tl.store(out + row * out_stride + col, values * factor[:, None], mask=mask)


@device
def mix_blocks_kernel(
    out, x, queries, blocks, d, root, x_stride, out_stride, eps, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_b softmax_b(query·b̂/√d)·b̂ with b̂ the RMS-normalised blocks of a row; grid (rows, queries)."""
    row, q = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner, index = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    inside = inner < d
    query = tl.load(queries + q * d + inner, mask=inside, other=0.0)
    scores = tl.full((BLOCKS,), float("-inf"), tl.float32)
    inverses = tl.zeros((BLOCKS,), tl.float32)
    for b in range(blocks):
        value = tl.load(x + row * x_stride + b * d + inner, mask=inside, other=0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / d + eps)
        score = tl.sum(query * value, 0) * inverse / root
        scores = tl.where(index == b, score, scores)
        inverses = tl.where(index == b, inverse, inverses)
    shares = tl.exp(scores - tl.max(scores, 0))
    shares = shares / tl.sum(shares, 0) * inverses
    total = tl.zeros((BLOCK,), tl.float32)
    for b in range(blocks):
        value = tl.load(x + row * x_stride + b * d + inner, mask=inside, other=0.0)
        total += tl.sum(tl.where(index == b, shares, 0.0), 0) * value
    tl.store(out + row * out_stride + q * d + inner, total, mask=inside)


@lowering("l2_clip")
def lower_l2_clip(call: Call) -> Lowered:
    x, out, scale, heads = call.operand("x"), call.outputs[0], call.optional("scale"), int(call.attrs["num_heads"])
    d = x.cols // heads
    call.need(d <= MOST_COLUMNS, f"heads of {d} columns", f"up to {MOST_COLUMNS} are supported")
    block = power(d)
    run = min(power(heads), max(1, 1024 // block))
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "scale": None if scale is None else call.pointer(scale),
        "heads": heads, "d": Aligned(d), "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride),
        "threshold": float(call.attrs["threshold"]),
    }  # fmt: skip
    grid = (call.rows(x), -(-heads // run))
    warps = 1 if run * block <= 256 else 4 if run * block <= 4096 else 8
    return Lowered((launch("l2_clip_kernel", grid, values, {"HEADS": run, "BLOCK": block}, warps),))


@lowering("mix_blocks")
def lower_mix_blocks(call: Call) -> Lowered:
    x, out, queries = call.operand("x"), call.outputs[0], call.operand("queries")
    d = queries.cols
    call.need(d <= MOST_COLUMNS, f"blocks of {d} columns", f"up to {MOST_COLUMNS} are supported")
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "queries": call.pointer(queries), "blocks": x.cols // d,
        "d": Aligned(d), "root": float(d) ** 0.5, "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride),
        "eps": float(call.attrs["eps"]),
    }  # fmt: skip
    fixed = {"BLOCKS": power(x.cols // d), "BLOCK": power(d)}
    grid = (call.rows(x), out.cols // d)
    return Lowered((launch("mix_blocks_kernel", grid, values, fixed, 4 if d <= 4096 else 8),))
