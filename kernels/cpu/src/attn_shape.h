// The sizes of one attention call, which positions a query sees, and where a thread's scratch lies.
#pragma once
#include <algorithm>

#include "attn_cache.h"
#include "attn_dots.h"
#include "attn_int8.h"

namespace tmlc {

// Softmax and the weighted sum of values run over splits: positions [512 s, 512 s + 512). Each split is computed by itself
// and added to what came before, in order, so that splits may be computed on any thread.
constexpr int64_t split_keys = 512;
constexpr int64_t score_stride = split_keys + 16;  // floats; not a multiple of 4 KiB, so that rows do not share cache sets
constexpr int64_t tile_queries = 32;               // rows x heads of a group that pass over the keys together
constexpr int64_t max_tile_rows = 16;

// Which optional operands a call has, behind the caches: flags 1 (rel, rel_table) and 2 (sink_logits).
struct AttentionFlags {
    bool known;
    int rel = 0, sink_logits = 0, operands = 7;  // operand numbers, 0: not there
    explicit AttentionFlags(int64_t flags) : known(flags >= 0 && flags <= 3) {
        if ((flags & 1) != 0) rel = operands, operands += 2;
        if ((flags & 2) != 0) sink_logits = operands++;
    }
};

struct Interval {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
    bool operator==(const Interval& o) const { return begin == o.begin && end == o.end; }
};

// d columns in a key, dv in a value, `per` query heads to a kv head.
struct Shape {
    KV form;
    Factors factors;
    int64_t heads, kv_heads, per, d, dv, window, sinks, capacity, rank, extent, tile;
    int64_t q_bytes, bias_stride, dv_pad;
    // In bytes, for one thread; and the bytes of one record of partial results (top, sums, acc of each query).
    int64_t q_at, row_at, bias_at, score_at, codes_at, groups_at, part_at, total_at, bytes, part_bytes;

    template <class T>  // TensorInfo or Operand
    Shape(const T& q, const T& v, DType cache, const T* rel, const T* rel_table, const int64_t* i, bool portable)
        : form(kv_form(cache)), factors(factors_of(form, portable)), heads(i[0]), kv_heads(i[1]), per(heads / kv_heads), d(q.cols / heads), dv(v.cols / kv_heads),
          window(i[2]), sinks(i[2] > 0 ? i[3] : 0), capacity(i[4]), rank(rel ? rel->cols / heads : 0),
          extent(rel ? rel_table->cols : 0) {
        tile = std::clamp<int64_t>(tile_queries / per, 1, max_tile_rows);
        const int64_t count = tile * per;
        q_bytes = form == KV::int8 ? IntQuery(d).bytes() : round_up(round_up(d, 16) * factor_bytes(factors), 64);
        bias_stride = rel ? split_keys + tile + 64 : 0;
        dv_pad = round_up(dv, 16);
        part_bytes = round_up(4 * count, 64) + count * 64 + 4 * count * dv_pad;
        int64_t at = 0;
        const auto take = [&](int64_t size) { const int64_t here = at; at += round_up(size, 64); return here; };
        q_at = take(count * q_bytes);
        row_at = take(4 * round_up(d, 16));
        bias_at = take(4 * count * bias_stride);
        score_at = take(4 * count * score_stride);
        codes_at = take(form == KV::int8 ? 2 * count * split_keys : 0);
        groups_at = take(form == KV::int8 ? count * (split_keys / factor_group) * static_cast<int64_t>(sizeof(Rounded)) : 0);
        part_at = take(part_bytes);
        total_at = take(part_bytes);
        bytes = at;
    }
    // Where the cache keeps position p.
    int64_t index(int64_t p) const {
        if (window == 0 || p < sinks) return p;
        return sinks + (p - sinks) % (capacity - sinks);
    }
    // The oldest position of the window of the query at p that is not a sink.
    int64_t low(int64_t p) const { return window == 0 ? 0 : std::max(sinks, p - window + 1); }
    // What the query at p sees of the split that begins at `start`, relative to it: of the sinks (part 0) or of the window.
    Interval seen(int64_t p, int part, int64_t start) const {
        const int64_t begin = part == 0 ? 0 : low(p), end = part == 0 ? std::min(sinks, p + 1) : p + 1;
        return {std::max<int64_t>(begin - start, 0), std::min(end - start, split_keys)};
    }
    // The splits that the positions p0..p1 see, ascending: how many, and where number i begins.
    int64_t sink_splits(int64_t p1) const { return (std::min(sinks, p1 + 1) + split_keys - 1) / split_keys; }
    int64_t splits(int64_t p0, int64_t p1) const {
        const int64_t first = std::max(low(p0) / split_keys, sink_splits(p1));
        return sink_splits(p1) + std::max<int64_t>(p1 / split_keys - first + 1, 0);
    }
    int64_t split_start(int64_t p0, int64_t p1, int64_t i) const {
        const int64_t before = sink_splits(p1);
        return (i < before ? i : std::max(low(p0) / split_keys, before) + i - before) * split_keys;
    }
};

// Partial results of a tile: for each query the whole number its exponents are relative to, 16 sums of weights, and the
// weighted values.
struct Partial {
    float *top, *sums, *acc;
    Partial(const Shape& s, uint8_t* at) : top(reinterpret_cast<float*>(at)) {
        const int64_t count = s.tile * s.per;
        sums = top + round_up(count, 16);
        acc = sums + 16 * count;
    }
};

}  // namespace tmlc
