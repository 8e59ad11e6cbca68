"""Attention over a linear or a ring cache: new keys and values are written (kv_write.py), then each query works through
the splits of its positions.

In a call of up to MOST_OWN rows a session one launch does all of that: whoever has the split of a new position writes
its key and value first, and norms and turns it and the queries where heads are normed or turned. More rows have a
launch before, so that not every program writes them.

A split is [S·s, S·s + S) in absolute positions, so a query's splits, and the order of its sums, depend on its own
position only. Where a call has too few programs for a GPU each split is a program of its own, which leaves its part in
scratch, and a second launch adds the parts up in ascending order; else one program does all of that in its registers.
The arithmetic is the same, so are the bits.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.kv_write import NO_TURNS, cache_row, new_rows, norms, turns, write_columns, write_launch
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer, Scratch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import norm_scale, power
from tmlc.kernels.triton.parts import LEAST, WRITTEN, Parts, join, whole_power
from tmlc.kernels.triton.position import rotated, turning
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.steps import tanh

#: New rows of a session that the programs of attention write themselves.
MOST_OWN = 4
#: Programs below which the splits of a cache become programs of their own.
ENOUGH_PROGRAMS = 256
#: Positions of a split, and how many splits a cache has while they are of no more than the most positions.
LEAST_SPLIT, MOST_SPLIT, SPLITS = 64, 4096, 64
MOST_HEAD = 256
#: Parts whose loads are on their way together when they are added up.
PARTS_AT_ONCE = 40


@device
def relative_bias(share, rel_table, ahead, places, j, held, extent, RANKS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Σ_r share[r, query]·rel_table[r, distance] as [keys, 16]: a product for each of the `places` positions, of which
    `ahead` says where a query stands. Only the queries at a position take what is computed for it."""
    r = tl.arange(0, BLOCK_R)
    bias = tl.zeros((j.shape[0], 16), tl.float32)
    for place in range(places):
        distance = place - j
        near = held & (distance >= 0) & (distance < extent)
        values = tl.load(
            rel_table + r[None, :] * extent + distance[:, None], mask=near[:, None] & (r < RANKS)[None, :], other=0.0
        )
        bias = tl.where((ahead == place)[None, :], tl.dot(values, share, input_precision="ieee"), bias)
    return bias


@device
def normed_columns(values, scale, learned):
    """values[columns, heads]·scale·learned, as `normed` norms heads that lie the other way."""
    return tl.trans(tl.trans(values) * scale[:, None] * learned[None, :])


@device
def attention_kernel(
    out, part_m, part_l, part_acc, q, k, v, q_norm, k_norm, table, shared, position, k_cache, v_cache, rel, rel_table,
    sink_logits, slots, counts, n, group, d, dv, own, window, sinks, splits, k_stride, v_stride, q_stride, k_new_stride,
    v_new_stride, table_stride, shared_stride, out_stride, rel_stride, sink_stride, extent, eps, scale, log_floor,
    log_alpha, cap,
    RING: tl.constexpr, INT8: tl.constexpr, EXACT: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr,
    ALONE: tl.constexpr, PARALLEL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ITEM: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """16 queries (rows × heads of one kv head) of a session over its cache; grid (sessions × tiles, kv heads, splits).

    k, v: the new keys and values of a call of few rows a session, which are written here; else they are in the cache.
    q_norm, k_norm: what queries and new keys are normed with. table: the cosines and sines of the new rows, by which
    they are turned then. shared: the columns behind the `own` ones of each head of k.
    RING: rows of a ring, without those of the sinks; 0: a linear cache.
    EXACT: float32 caches, whose products are of float32 numbers; else of bf16 numbers.
    ALONE: the queries of a tile stand at one position, so a key is at one distance from all of them.
    """
    tiles = tl.cdiv(n * group, 16)
    session, g = tl.program_id(0) // tiles, tl.program_id(1)
    t = (tl.program_id(0) % tiles) * 16 + tl.arange(0, 16)
    i, head = t // group, g * group + t % group
    count, slot = tl.load(counts + session), tl.load(slots + session)
    # What does not depend on the position is asked for together with the session, of rows of no session too.
    row = session.to(tl.int64) * n + i
    inner, outer = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    if q_norm is not None:
        q_learned = tl.load(q_norm + inner, mask=inner < d, other=0.0)
        k_learned = tl.load(k_norm + inner, mask=inner < d, other=0.0)
    q_at = q + row[None, :] * q_stride + head[None, :] * d + inner[:, None]
    qt = tl.load(q_at, mask=(i < n)[None, :] & (inner < d)[:, None], other=0.0)
    if table is not None:
        inside, pair, first_of, partner = turning(inner, OFFSET, HALF, INTERLEAVED)
        q_read = (i < n)[None, :] & inside[:, None]
        q_other = tl.load(q + row[None, :] * q_stride + head[None, :] * d + partner[:, None], mask=q_read, other=0.0)
        q_turn = table + row[None, :] * table_stride + pair[:, None]
        q_cos, q_sin = tl.load(q_turn, mask=q_read, other=0.0), tl.load(q_turn + HALF, mask=q_read, other=0.0)
        if q_norm is not None:
            q_learned_other = tl.load(q_norm + partner, mask=inside, other=0.0)
            k_learned_other = tl.load(k_norm + partner, mask=inside, other=0.0)
    share, places = 0.0, 1
    if RANKS > 0:
        r = tl.arange(0, BLOCK_R)
        share_at = rel + (row * rel_stride + head * RANKS)[None, :] + r[:, None]
        share = tl.load(share_at, mask=(i < n)[None, :] & (r < RANKS)[:, None], other=0.0)
    if k is not None:  # in 16 columns, so that they lie as queries do
        fresh = tl.arange(0, 16)
        new_row = (session.to(tl.int64) * n + fresh)[None, :]
        given = (fresh < n)[None, :]
        if shared is not None:
            common_to_all = ((inner >= own) & (inner < d))[:, None]
            common_at = shared + new_row * shared_stride - own
            key_at = k + new_row * k_new_stride + g * own + inner[:, None]
            key = tl.load(key_at, mask=given & (inner < own)[:, None], other=0.0)
            common = tl.load(common_at + inner[:, None], mask=given & common_to_all, other=0.0)
            key = tl.where(common_to_all, common, key)
        else:
            key_at = k + new_row * k_new_stride + g * d + inner[:, None]
            key = tl.load(key_at, mask=given & (inner < d)[:, None], other=0.0)
        value = tl.load(
            v + new_row * v_new_stride + g * dv + outer[:, None], mask=given & (outer < dv)[:, None], other=0.0
        )
        if table is not None:
            k_read = given & inside[:, None]
            if shared is not None:
                key_other = tl.load(common_at + partner[:, None], mask=k_read, other=0.0)
            else:
                key_other = tl.load(k + new_row * k_new_stride + g * d + partner[:, None], mask=k_read, other=0.0)
            k_turn = table + new_row * table_stride + pair[:, None]
            k_cos, k_sin = tl.load(k_turn, mask=k_read, other=0.0), tl.load(k_turn + HALF, mask=k_read, other=0.0)
    # No program ends early, so that all of this is under way at once; one without a query finds no keys.
    there = ((tl.program_id(0) % tiles) * 16 < count * group) & (slot >= 0)
    live = there & (i < count)
    start = tl.load(position + slot // 8, mask=there, other=0)
    if q_norm is not None:  # while the position is under way
        q_inverse, k_inverse = norm_scale(tl.trans(qt), d, eps), norm_scale(tl.trans(key), d, eps)
        qt = normed_columns(qt, q_inverse, q_learned)
        key = normed_columns(key, k_inverse, k_learned)
        if table is not None:
            q_other = normed_columns(q_other, q_inverse, q_learned_other)
            key_other = normed_columns(key_other, k_inverse, k_learned_other)
    if table is not None:
        qt = tl.where(inside[:, None], rotated(qt, q_other, q_cos, q_sin, first_of[:, None]), qt)
        key = tl.where(inside[:, None], rotated(key, key_other, k_cos, k_sin, first_of[:, None]), key)
    p = start + i
    first_i = (tl.program_id(0) % tiles) * 16 // group
    ahead = i - first_i  # positions are counted from the first query on, in 32 bits
    first_p = start + first_i
    last_p = start + tl.minimum(count, ((tl.program_id(0) % tiles) * 16 + 15) // group + 1) - 1
    last_p = tl.where(there, last_p, -1)

    tau = tl.zeros((16,), tl.float32) + 1.0
    if log_floor is not None:
        tau += log_alpha * tl.log(tl.maximum(1.0, (p + 1).to(tl.float32) / log_floor))
    unit = 1.4426950408889634  # scores are in units of ln 2, but for what a soft cap needs
    if cap is not None:
        qt = qt * (scale * tau)[None, :]
    else:
        qt = qt * (scale * tau * unit)[None, :]
    if not EXACT:
        qt = qt.to(tl.bfloat16)

    if RANKS > 0 and not ALONE:
        places = (last_p - first_p).to(tl.int32) + 1

    # Slots lie at multiples of 64 bytes; said here, for the compiler to load whole vectors.
    k_base = tl.multiple_of(slot // ITEM, 16)
    v_base = k_base
    if INT8:
        k_wide, v_wide = (d + 3) // 4 * 4, (dv + 3) // 4 * 4
        k_base += g * (k_wide + 4)
        v_base += g * (v_wide + 4)
    else:
        k_base += g * d
        v_base += g * dv

    if k is not None:  # written and read back by each tile of the head, so they are what a later call reads
        new_p, mine = start + fresh, there & (fresh < count)
        if PARALLEL:
            split = new_p // SPLIT
            if RING:
                split = tl.where(new_p < sinks, 0, split - tl.maximum(start - window + 1, sinks) // SPLIT + 1)
            mine = mine & (split == tl.program_id(2))
        new_at = cache_row(new_p, RING, sinks, RING > 0)
        write_columns(k_cache, key, k_base + new_at * k_stride, d, mine, INT8)
        write_columns(v_cache, value, v_base + new_at * v_stride, dv, mine, INT8)
        tl.debug_barrier()  # every thread reads what some have written

    total_m = tl.full((16,), LEAST, tl.float32)
    total_l = tl.zeros((16,), tl.float32)
    total = tl.zeros((BLOCK_V, 16), tl.float32)
    turns = splits
    if PARALLEL:
        turns = 1
    for step in range(turns):
        z = tl.program_id(2) + step
        if RING:  # split 0 holds the sinks; the others follow from the first position of the call
            oldest = first_p - window + 1
            behind = tl.maximum(start - window + 1, sinks) // SPLIT * SPLIT + (z - 1) * SPLIT
            lo = tl.maximum(tl.where(z == 0, 0, tl.maximum(behind, oldest // BLOCK_J * BLOCK_J)), 0)
            hi = tl.where(z == 0, tl.minimum(sinks, last_p + 1), tl.minimum(behind + SPLIT, last_p + 1))
            skip = tl.where(z == 0, 0, tl.maximum(tl.maximum(oldest, sinks) - lo, 0)).to(tl.int32)
            turned = ((lo - sinks) % RING).to(tl.int32)  # where `lo` lies in the ring
            turned = tl.where(turned < 0, turned + RING, turned)
        else:
            lo = z * SPLIT
            hi = tl.minimum(lo + SPLIT, last_p + 1)
        length = (hi - lo).to(tl.int32)
        begin = tl.maximum(lo - first_p, -(1 << 30)).to(tl.int32)  # so far behind is beyond every table and window
        m = tl.full((16,), LEAST, tl.float32)
        l = tl.zeros((16,), tl.float32)  # noqa: E741
        acc = tl.zeros((BLOCK_V, 16), tl.float32)
        for first in range(0, length, BLOCK_J):
            k_index = tl.arange(0, BLOCK_J)
            held = first + k_index < length
            if RING:
                held = held & (first + k_index >= skip)
                at = (turned + first) % RING + k_index
                at = at % RING if RING < BLOCK_J else tl.where(at >= RING, at - RING, at)
                at = tl.where(z == 0, first + k_index, sinks + at).to(tl.int64)
            else:
                at = (lo + first + k_index).to(tl.int64)
            j = begin + first + k_index
            k_at = k_base + at * k_stride
            v_at = v_base + at * v_stride
            if INT8:
                k_at = tl.multiple_of(k_at, 4)
                v_at = tl.multiple_of(v_at, 4)
            # What a block reads is asked for before anything is computed.
            kt = tl.load(k_cache + k_at[:, None] + inner[None, :], mask=held[:, None] & (inner < d)[None, :], other=0)
            v_ptr = v_cache + v_at[None, :] + outer[:, None]
            vt = tl.load(v_ptr, mask=held[None, :] & (outer < dv)[:, None], other=0)
            if INT8:
                k_scale = tl.load((k_cache + k_at + k_wide).to(tl.pointer_type(tl.float32)), mask=held, other=0.0)
                v_scale = tl.load((v_cache + v_at + v_wide).to(tl.pointer_type(tl.float32)), mask=held, other=0.0)
            distance = ahead[None, :] - j[:, None]
            bias = tl.zeros((BLOCK_J, 16), tl.float32)
            if RANKS > 0:  # noqa: SIM102 (the outer one is decided when the kernel is compiled)
                if 1 - begin - first - BLOCK_J < extent:  # else every key of the block lies beyond the table
                    bias = relative_bias(share, rel_table, ahead, places, j, held, extent, RANKS, BLOCK_R)
            if EXACT:
                scores = tl.dot(kt, qt, input_precision="ieee")
            elif INT8:
                codes = tl.where((inner < d)[None, :], kt.to(tl.int32) - 128, 0).to(tl.float32).to(tl.bfloat16)
                scores = tl.dot(codes, qt) * k_scale[:, None]
            else:
                scores = tl.dot(kt, qt)
            if RANKS > 0:
                if cap is not None:
                    scores += bias * tau[None, :]
                else:
                    scores += bias * (tau * unit)[None, :]
            if cap is not None:
                scores = cap * tanh(scores / cap) * unit
            visible = held[:, None] & (distance >= 0)
            if RING:
                visible = visible & ((distance < window) | (z == 0))
            scores = tl.where(visible, scores, float("-inf"))
            # Whole powers of two: what is rounded below does not depend on the largest score so far.
            new_m = tl.maximum(m, tl.ceil(tl.max(scores, 0)))
            shrink = whole_power(m - new_m)
            weights = tl.exp2(scores - new_m[None, :])
            acc = acc * shrink[None, :]
            if EXACT:
                l = l * shrink + tl.sum(weights, 0)  # noqa: E741
                acc += tl.dot(vt, weights, input_precision="ieee")
            elif INT8:
                l = l * shrink + tl.sum(weights, 0)  # noqa: E741
                codes = tl.where((outer < dv)[:, None], vt.to(tl.int32) - 128, 0).to(tl.float32).to(tl.bfloat16)
                acc += tl.dot(codes, (weights * v_scale[:, None]).to(tl.bfloat16))
            else:
                rounded = weights.to(tl.bfloat16)
                l = l * shrink + tl.sum(rounded.to(tl.float32), 0)  # noqa: E741
                acc += tl.dot(vt, rounded)
            m = new_m
        total_m, total_l, old, new = join(total_m, total_l, m, l)
        total = total * old[None, :] + acc * new[None, :]
    store = live[None, :] & (outer < dv)[:, None]
    if PARALLEL:
        part = (row * tl.num_programs(1) * group + head) * splits + tl.program_id(2)
        tl.store(part_m + part, total_m, mask=live)
        tl.store(part_l + part, total_l, mask=live)
        tl.store(part_acc + part[None, :] * dv + outer[:, None], total, mask=store)
    else:
        if sink_logits is not None:
            sink = tl.load(sink_logits + row * sink_stride + head, mask=live, other=0.0) * unit
            most = tl.maximum(total_m, tl.ceil(sink))
            old = whole_power(total_m - most)
            total_l = total_l * old + tl.exp2(sink - most)
            total = total * old[None, :]
        tl.store(out + row[None, :] * out_stride + head[None, :] * dv + outer[:, None], total / total_l[None, :], store)


@device
def attention_combine_kernel(
    out, part_m, part_l, part_acc, sink_logits, counts, n, heads, dv, splits, out_stride, sink_stride,
    TURNS: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds the parts of one query up in ascending order; grid (rows, heads)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if row % n >= tl.load(counts + row // n):
        return
    outer = tl.arange(0, BLOCK_V)
    total_m, total_l = tl.full((), LEAST, tl.float32), tl.full((), 0.0, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    if sink_logits is not None:
        sink = tl.load(sink_logits + row * sink_stride + head) * 1.4426950408889634
    begin = (row * heads + head) * splits
    for first in range(0, TURNS * PARTS, PARTS):
        for i in tl.static_range(PARTS):  # one behind the last adds nothing
            there = first + i < splits
            part = begin + (first + i)
            m = tl.load(part_m + part, mask=there, other=LEAST)
            l = tl.load(part_l + part, mask=there, other=0.0)  # noqa: E741
            acc = tl.load(part_acc + part * dv + outer, mask=there & (outer < dv), other=0.0)
            total_m, total_l, old, new = join(total_m, total_l, m, l)
            total = total * old + acc * new
    if sink_logits is not None:
        most = tl.maximum(total_m, tl.ceil(sink))
        old = whole_power(total_m - most)
        total_l = total_l * old + tl.exp2(sink - most)
        total = total * old
    tl.store(out + row * out_stride + head * dv + outer, total / total_l, mask=outer < dv)


def split_size(capacity: int, window: int) -> int:
    """Positions of a split, a power of two that the cache decides: at most 64 splits up to 256 k positions."""
    return min(MOST_SPLIT, max(LEAST_SPLIT, power(-(-(window or capacity) // SPLITS))))


def split_count(capacity: int, window: int, n: int) -> int:
    """Splits that the keys of n new positions can touch; of a ring one more for its sinks."""
    size = split_size(capacity, window)
    return -(-(window - 1 + n) // size) + 2 if window else -(-capacity // size)


_CACHES = {"f32": 4, "bf16": 2, "u8": 1}


def attention_launches(call: Call, scratch: Scratch) -> tuple[list[Launch], Parts | None]:
    """The launches of attention, but for the one that adds up the parts of the splits, where they are programs of their
    own; and where these parts lie."""
    q, v = call.operand("q"), call.operand("v")
    caches = call.operand("k_cache"), call.operand("v_cache")
    position = call.operand("position")
    heads, groups = int(call.attrs["num_heads"]), int(call.attrs["num_kv_heads"])
    window, sinks = int(call.attrs["window"]), int(call.attrs["sinks"])
    capacity, n = caches[0].rows[1], call.bucket.session_rows(q.rows)
    d, dv, group = q.cols // heads, v.cols // groups, heads // groups
    sinks = min(sinks, window) if window == 0 else sinks
    call.need(max(d, dv) <= MOST_HEAD, f"heads of {max(d, dv)} columns", f"up to {MOST_HEAD} are supported")
    call.need(q.rows == (1, 0), f"queries have {q.rows[0]}n+{q.rows[1]} rows, not n")
    call.need(
        not window or capacity - sinks >= window - 1 + n,
        f"a ring of {capacity} rows with {sinks} sinks does not hold a window of {window} and {n} new positions",
        "compile with a larger max_append, or smaller buckets",
    )
    dtype = caches[0].dtype
    call.need(dtype in _CACHES, f"caches of {dtype}", f"use {', '.join(_CACHES)}")
    shared: dict[str, Any] = {
        "position": _state(call, position, "i64"), "slots": call.slots, "counts": call.counts, "n": n,
        "d": Aligned(d), "dv": Aligned(dv), "sinks": Aligned(sinks),
        "k_cache": _state(call, caches[0], dtype), "v_cache": _state(call, caches[1], dtype),
        "k_stride": Aligned(caches[0].stride), "v_stride": Aligned(caches[1].stride),
    }  # fmt: skip
    cached: dict[str, Any] = {"INT8": dtype == "u8", "ITEM": _CACHES[dtype]}

    splits = split_count(capacity, window, n)
    tiles = -(-n * group // 16)
    programs = call.bucket.batch * tiles * groups
    parallel = programs < ENOUGH_PROGRAMS and splits > 1
    rel, rel_table = call.optional("rel"), call.optional("rel_table")
    rows = call.bucket.batch * n
    parts = rows * heads * splits
    floor, cap = float(call.attrs["log_floor"]), float(call.attrs["softcap"])
    launches: list[Launch] = []
    left: Parts | None = None
    if parallel:
        m, l, acc = (scratch.piece("f32", parts * each) for each in (1, 1, dv))  # noqa: E741
        left = Parts(m, l, acc, splits, heads, dv)
    table, turning_by = turns(call)
    queries, q_stride, new = call.pointer(q), q.stride, new_rows(call) | norms(call) | table
    if n > MOST_OWN:
        prepared = None
        if new["q_norm"] is not None or new["table"] is not None:
            queries = prepared = scratch.piece("f32", rows * q.cols)
            q_stride = q.cols
        before = shared | new | {"capacity": Aligned(capacity)}
        launches.append(write_launch(call, before, cached | {"RING": window > 0}, prepared))
        new, turning_by = dict.fromkeys(new), NO_TURNS

    last = _results(call)
    inside = shared | new | {
        "q": queries, "q_stride": Aligned(q_stride),
        "rel": None if rel is None else call.pointer(rel),
        "rel_table": None if rel_table is None else call.pointer(rel_table),
        "group": group, "window": Aligned(window), "splits": splits,
        "rel_stride": None if rel is None else Aligned(rel.stride),
        "extent": None if rel_table is None else Aligned(rel_table.cols),
        "scale": float(call.attrs["scale"]), "log_floor": floor if floor > 0 else None,
        "log_alpha": float(call.attrs["log_alpha"]) if floor > 0 else None, "cap": cap if cap > 0 else None,
    }  # fmt: skip
    block_d, block_v = power(d, 16), power(dv, 16)
    blocks = call.blocks("attention", dtype, dv, d)
    most = f"splits hold whole blocks of up to {LEAST_SPLIT}"
    call.need(blocks.block_k <= LEAST_SPLIT, f"blocks of {blocks.block_k} keys", most)
    ranks, alone = 0 if rel is None else rel.cols // heads, n == 1 or group % 16 == 0
    fixed = {
        **cached, "RING": capacity - sinks if window else 0, "EXACT": dtype == "f32", "RANKS": ranks, "ALONE": alone,
        "PARALLEL": parallel, "BLOCK_R": power(ranks or 1, 16), "SPLIT": split_size(capacity, window),
        "BLOCK_J": blocks.block_k, "BLOCK_D": block_d, "BLOCK_V": block_v, **turning_by,
    }  # fmt: skip
    values = inside | last | dict.fromkeys(WRITTEN)
    if left is not None:
        values |= dict.fromkeys(last) | left.written
    programs_by = (call.bucket.batch * tiles, groups, splits if parallel else 1)
    launches.append(launch("attention_kernel", programs_by, values, fixed, blocks.warps, blocks.stages))
    return launches, left


def combine_launch(call: Call, parts: Parts) -> Launch:
    """The launch that adds the parts of every query up."""
    out = call.outputs[0]
    values: dict[str, Any] = parts.values | _results(call) | {
        "counts": call.counts, "n": call.bucket.session_rows(out.rows), "heads": parts.heads,
        "dv": Aligned(parts.columns),
    }  # fmt: skip
    turns = -(-parts.splits // PARTS_AT_ONCE)
    fixed = {
        "BLOCK_V": power(parts.columns, 16), "TURNS": turns, "PARTS": -(-parts.splits // (4 * turns)) * 4,
    }  # fmt: skip
    return launch("attention_combine_kernel", (call.rows(out), parts.heads), values, fixed, 1)


def _results(call: Call) -> dict[str, Any]:
    """Arguments of whoever writes what attention gives."""
    out, sink = call.outputs[0], call.optional("sink_logits")
    return {
        "out": call.pointer(out), "out_stride": Aligned(out.stride),
        "sink_logits": None if sink is None else call.pointer(sink),
        "sink_stride": None if sink is None else 0 if sink.space == "weight" else sink.stride,
    }  # fmt: skip


@lowering("attention_state", "norm_attention_state", "rope_attention_state")
def lower_attention(call: Call) -> Lowered:
    scratch = Scratch()
    launches, parts = attention_launches(call, scratch)
    return scratch.lowered(*launches, *([] if parts is None else [combine_launch(call, parts)]))


def _state(call: Call, operand: Operand, dtype: str) -> Pointer:
    call.need(operand.space == "state", f"{operand} is not a state of the session")
    return call.pointer(operand, (dtype,))
