"""Random numbers by key (Philox4x32-10) and sampling: noise, and the arg-max of logits with Gumbel noise."""

from dataclasses import replace
from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer, Scratch
from tmlc.kernels.triton.linear import linear_launch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.position import cos_sin
from tmlc.kernels.triton.registry import Call, launch, lowering

#: Blocks of four words that one program draws.
BLOCKS = 256
#: Entries of the vocabulary of which one program finds the best.
ENTRIES = 128
MOST_PARTS = 16384


@device
def philox_words(key, row, block, STREAM: tl.constexpr):
    """Four uint32 words for each counter `block`; key row = (seed, tick, position)."""
    seed = tl.load(key + row * 3)
    tick = tl.load(key + row * 3 + 1)
    position = tl.load(key + row * 3 + 2)
    none = block.to(tl.uint32) * 0
    c0 = block.to(tl.uint32)
    c1 = none + ((position & 0xFFFFFFFF) | STREAM).to(tl.uint32)
    c2 = none + (tick & 0xFFFFFFFF).to(tl.uint32)
    c3 = none + ((tick >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = none + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = none + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = none + 0xD2511F53
    b = none + 0xCD9E8D57
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(a, c0), a * c0
        high_b, low_b = tl.umulhi(b, c2), b * c2
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@device
def uniform(word):
    """float64 in the open interval (0, 1)."""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@device
def normal_pair(first, second):
    radius = tl.sqrt(-2.0 * tl.log(uniform(first)))
    cos, sin = cos_sin(uniform(second) * 6.283185307179586)
    return radius * cos, radius * sin


@device
def philox_normal_kernel(out, key, size, out_stride, BLOCK: tl.constexpr):
    """Standard normals [rows, size]; grid (rows, runs of blocks)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(key, row, block, 0)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    at = out + row * out_stride + block * 4
    tl.store(at, n0.to(tl.float32), mask=block * 4 < size)
    tl.store(at + 1, n1.to(tl.float32), mask=block * 4 + 1 < size)
    tl.store(at + 2, n2.to(tl.float32), mask=block * 4 + 2 < size)
    tl.store(at + 3, n3.to(tl.float32), mask=block * 4 + 3 < size)


@device
def sample_part_kernel(part_score, part_index, logits, key, temperature, entries, logits_stride, BLOCK: tl.constexpr):
    """The best entry of a run of the vocabulary by float64 logits/T + Gumbel noise, or by the logits where T is 0;
    grid (rows, runs).

    A thread draws the four words of a block for one entry and drops three of them: whole numbers cost less than to wait
    for the logarithms of four entries one after the other.
    """
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row * logits_stride + entry, mask=entry < entries, other=float("-inf")).to(tl.float64)
    t = tl.load(temperature + row).to(tl.float64)
    w0, w1, w2, w3 = philox_words(key, row, entry // 4, 0x80000000)
    tl.debug_barrier()  # the compiler would move the loads of the key behind the branch, where they wait once more
    if t > 0:
        low, high = tl.where(entry % 2 == 0, w0, w1), tl.where(entry % 2 == 0, w2, w3)
        score = score / t - tl.log(-tl.log(uniform(tl.where(entry % 4 < 2, low, high))))
    score = tl.where(score != score, float("-inf"), score)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(score == best, entry, 0x7FFFFFFF), 0)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(part_score + part, best)
    tl.store(part_index + part, winner)


@device
def sample_kernel(ids, part_score, part_index, parts, ids_stride, BLOCK: tl.constexpr):
    """The best of the runs, ties to the lowest index; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    held = part < parts
    score = tl.load(part_score + row * parts + part, mask=held, other=float("-inf"))
    index = tl.load(part_index + row * parts + part, mask=held, other=0x7FFFFFFF)
    best = tl.max(score, 0)
    winner = tl.min(tl.where(held & (score == best), index, 0x7FFFFFFF), 0)
    tl.store(ids + row * ids_stride, winner.to(ids.dtype.element_ty))


@lowering("philox_normal")
def lower_philox_normal(call: Call) -> Lowered:
    out, key = call.outputs[0], call.operand("key")
    block = min(BLOCKS, power(-(-out.cols // 4), 16))
    values: dict[str, Any] = {
        "out": call.pointer(out), "key": _key(call, key), "size": out.cols, "out_stride": out.stride,
    }  # fmt: skip
    grid = (call.rows(out), -(-out.cols // (4 * block)))
    return Lowered((launch("philox_normal_kernel", grid, values, {"BLOCK": block}, 4),))


def _key(call: Call, key: Operand) -> Pointer:
    call.need(key.stride == 3, "key rows are not dense")
    return call.pointer(key, ("i64",))


def sample_launches(
    call: Call, logits: Operand | tuple[Pointer, int], entries: int, scratch: Scratch
) -> tuple[Launch, Launch]:
    """Sampling from logits (an operand, or scratch with its stride)."""
    out, rows = call.outputs[0], call.rows(call.outputs[0])
    source, stride = (call.pointer(logits), logits.stride) if isinstance(logits, Operand) else logits
    block = min(ENTRIES, power(entries, 32))
    parts = -(-entries // block)
    call.need(parts <= MOST_PARTS, f"a vocabulary of {entries} entries", f"up to {MOST_PARTS * ENTRIES} are supported")
    score, index = scratch.piece("f64", rows * parts), scratch.piece("i32", rows * parts)
    temperature = call.operand("temperature")
    call.need(temperature.stride == 1, "temperatures are not dense")
    values: dict[str, Any] = {
        "part_score": score, "part_index": index, "logits": source, "key": _key(call, call.operand("key")),
        "temperature": call.pointer(temperature), "entries": entries, "logits_stride": Aligned(stride),
    }  # fmt: skip
    first = launch("sample_part_kernel", (rows, parts), values, {"BLOCK": block}, 4)
    values = {
        "ids": call.pointer(out, ("i32", "i64")), "part_score": score, "part_index": index, "parts": parts,
        "ids_stride": out.stride,
    }  # fmt: skip
    last = launch("sample_kernel", (rows,), values, {"BLOCK": power(parts, 16)}, 1 if parts <= 256 else 4)
    return first, last


@lowering("sample")
def lower_sample(call: Call) -> Lowered:
    logits, scratch = call.operand("logits"), Scratch()
    return scratch.lowered(*sample_launches(call, logits, logits.cols, scratch))


def head_launch(call: Call, out: Operand | Pointer) -> Launch:
    """The product of a head with its first `entries` rows of weights and no others; `out`: scratch is dense."""
    weight, entries = call.operand("weight"), int(call.attrs["entries"])
    weight = replace(weight, rows=(0, entries), shape=(entries, *weight.shape[1:]))
    return linear_launch(
        call, out, call.operand("x"), weight, call.optional("bias"), alpha=float(call.attrs["alpha"]),
        cap=float(call.attrs["cap"]), out_stride=entries,
    )  # fmt: skip


@lowering("head_logits")
def lower_head_logits(call: Call) -> Lowered:
    return Lowered((head_launch(call, call.outputs[0]),))


@lowering("head_sample")
def lower_head_sample(call: Call) -> Lowered:
    """The logits go through scratch: 4 bytes an entry beside the head's own rows of weights."""
    entries, rows, scratch = int(call.attrs["entries"]), call.rows(call.outputs[0]), Scratch()
    logits = scratch.piece("f32", rows * entries)
    return scratch.lowered(
        head_launch(call, logits), *sample_launches(call, (logits, entries), entries, scratch)
    )  # fmt: skip
