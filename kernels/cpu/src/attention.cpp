// Attention over the caches in a slot, and the position that goes with them.
//
// Work is cut into tiles (rows of one session, a kv head): all query heads of the group and all rows of the tile pass over
// a split of the positions together, so keys and values are read once per tile (attn_tile.cpp). Tiles of all sessions of
// a call are shared out at once; where there are fewer than the threads need, their splits are shared out as well.
#include "attn_tile.h"
#include "check.h"
#include "conv.h"

namespace tmlc {
namespace {

// ---- advance --------------------------------------------------------------------------------------------------------

const char* check_advance(const Call& c) {
    TMLC_REQUIRE(arity(c, 1, 1, 0), "wrong number of operands");
    TMLC_REQUIRE(c.i[0] >= 0 && c.i[0] < position_end, "the limit is out of range");
    return check_position(*c.t[0]);
}
int run_advance(const RunArgs& a) {
    int64_t& position = *a.t[0].i64();
    if (position < 0 || position >= position_end) return bad_index;
    if (a.i[0] > 0 && position + a.n > a.i[0]) return context_full;
    position += a.n;
    return ok;
}

// ---- attention ------------------------------------------------------------------------------------------------------

const char* check_attention(const Call& c) {
    TMLC_REQUIRE(c.n_i == 6 && c.n_f == 4, "wrong number of operands");
    const AttentionFlags with(c.i[5]);
    TMLC_REQUIRE(with.known && c.n_t == with.operands, "wrong number of operands");
    const TensorInfo &out = *c.t[0], &q = *c.t[1], &k = *c.t[2], &v = *c.t[3], &k_cache = *c.t[5], &v_cache = *c.t[6];
    const int64_t heads = c.i[0], kv = c.i[1], window = c.i[2], sinks = c.i[3], capacity = c.i[4];
    TMLC_REQUIRE(kv >= 1 && heads >= kv && heads <= 4096 && heads % kv == 0, "heads must be a multiple of kv heads");
    for (int j = 0; j < 4; ++j)
        TMLC_REQUIRE(is_f32(*c.t[j]) && c.t[j]->a == 1 && c.t[j]->b == 0, "q, k, v and the output must be f32 with n rows");
    TMLC_REQUIRE(q.cols % heads == 0 && q.cols / heads <= 4096, "q must be [n,H*D]");
    TMLC_REQUIRE(v.cols % kv == 0 && v.cols / kv <= 4096, "v must be [n,G*Dv]");
    const int64_t d = q.cols / heads, dv = v.cols / kv;
    TMLC_REQUIRE(k.cols == kv * d, "k must be [n,G*D]");
    TMLC_REQUIRE(out.cols == heads * dv, "the output must be [n,H*Dv]");
    if (const char* what = check_position(*c.t[4])) return what;
    TMLC_REQUIRE(capacity >= 16 && capacity <= 1 << 24 && capacity % 16 == 0, "the capacity must be a multiple of 16");
    TMLC_REQUIRE(k_cache.space == Space::slot && v_cache.space == Space::slot && is_cache(k_cache) && k_cache.dtype == v_cache.dtype,
                 "the caches must be in the slot, both f32, bf16 or u8");
    const int64_t blocks = kv * (capacity / 16);
    if (k_cache.dtype == DType::u8) {
        TMLC_REQUIRE(k_cache.fixed(blocks, kv_block_bytes(KV::int8, d)) && dense(k_cache) && k_cache.offset % 4 == 0,
                     "an int8 k_cache must be u8 [G*C/16, 16*D4+64], D4 = D in whole fours, at a multiple of 4 bytes");
        TMLC_REQUIRE(v_cache.fixed(blocks, kv_block_bytes(KV::int8, dv)) && dense(v_cache) && v_cache.offset % 4 == 0,
                     "an int8 v_cache must be u8 [G*C/16, 16*Dv4+64], Dv4 = Dv in whole fours, at a multiple of 4 bytes");
    } else {
        TMLC_REQUIRE(k_cache.fixed(blocks, d * 16) && dense(k_cache), "k_cache must be [G*C/16, D*16] in the slot");
        TMLC_REQUIRE(v_cache.fixed(kv * capacity, dv) && dense(v_cache), "v_cache must be [G*C, Dv] in the slot");
        TMLC_REQUIRE(k_cache.offset % 4 == 0 && v_cache.offset % 4 == 0, "the caches must be at a multiple of 4 bytes");
    }
    TMLC_REQUIRE(window >= 0 && window <= 1 << 24 && sinks >= 0, "the window is out of range");
    if (window > 0) {
        TMLC_REQUIRE(sinks % 16 == 0 && sinks < capacity, "sinks must be a multiple of 16 below the capacity");
        TMLC_REQUIRE(capacity - sinks >= window - 1 + c.max_n, "the ring is smaller than window - 1 + max_n");
    }
    if (with.rel > 0) {
        const TensorInfo &rel = *c.t[with.rel], &table = *c.t[with.rel + 1];
        TMLC_REQUIRE(is_f32(rel) && rel.same_rows(q) && rel.cols % heads == 0, "rel must be f32 [n,H*R]");
        TMLC_REQUIRE(is_f32(table) && table.a == 0 && table.b == rel.cols / heads && table.cols <= 1 << 24,
                     "rel_table must be f32 [R,extent]");
    }
    if (with.sink_logits > 0)
        TMLC_REQUIRE(is_f32(*c.t[with.sink_logits]) && c.t[with.sink_logits]->cols == heads &&
                         (c.t[with.sink_logits]->fixed(1, heads) || c.t[with.sink_logits]->same_rows(q)),
                     "sink_logits must be f32 [1,H] or [n,H]");
    for (int j = 0; j < 4; ++j) TMLC_REQUIRE(finite(c.f[j]), "the scales must be finite");
    TMLC_REQUIRE(c.f[1] >= 0 && c.f[3] >= 0, "log_floor and softcap must not be negative");
    return nullptr;
}
// A thread's scratch, for each thread; then, for calls with few tiles, records of what splits computed apart gave, and one
// for each such tile.
constexpr int64_t splits_each = 4;  // records a thread gets

int64_t scratch_attention(const Call& c, int threads) {
    const AttentionFlags with(c.i[5]);
    const TensorInfo* rel = with.rel > 0 ? c.t[with.rel] : nullptr;
    const bool portable = true;  // which takes the larger factors
    const Shape s(*c.t[1], *c.t[3], c.t[5]->dtype, rel, rel != nullptr ? c.t[with.rel + 1] : nullptr, c.i, portable);
    return threads * (s.bytes + 2 * splits_each * s.part_bytes);
}

// The tiles of a call, over all its sessions: number u of a session is rows u / kv_heads of kv head u % kv_heads.
struct Tiles {
    const RunArgs& a;
    const Shape& s;
    AttentionFlags with;
    int64_t count = 0;

    Tiles(const RunArgs& args, const Shape& shape) : a(args), s(shape), with(args.i[5]) {
        for (int j = 0; j < a.n_spans; ++j) count += of_span(j);
    }
    int64_t of_span(int j) const { return (a.spans[j].n + s.tile - 1) / s.tile * s.kv_heads; }
    HeadCache cache(int j) const {
        return {static_cast<uint8_t*>(a.at(5, j).data), static_cast<uint8_t*>(a.at(6, j).data), kv_block_bytes(s.form, s.d),
                kv_block_bytes(s.form, s.dv)};
    }
    // Calls fn(tile) for each of the tiles [begin, end).
    template <class Fn>
    void each(int64_t begin, int64_t end, const Fn& fn) const {
        for (int j = 0; j < a.n_spans && begin < end; ++j) {
            const int64_t here = of_span(j);
            if (begin < here) {
                const Operand rel = a.at(with.rel, j), sink_logits = a.at(with.sink_logits, j);
                Tile tile{s, a.at(0, j), a.at(1, j), with.rel > 0 ? &rel : nullptr, with.rel > 0 ? a.t + with.rel + 1 : nullptr,
                          with.sink_logits > 0 ? &sink_logits : nullptr, cache(j), *a.at(4, j).i64(), 0, 0, 0, a.f};
                for (; begin < std::min(end, here); ++begin) {
                    tile.g = begin % s.kv_heads;
                    tile.r0 = begin / s.kv_heads * s.tile;
                    tile.rows = std::min(s.tile, a.spans[j].n - tile.r0);
                    fn(tile);
                }
            }
            begin = std::max<int64_t>(begin - here, 0);
            end -= here;
        }
    }
};

// New keys and values go to the caches first: every later query of the call may see them.
void write_caches(const RunArgs& a, const Tiles& tiles) {
    const Shape& s = tiles.s;
    const int64_t d = s.d, dv = s.dv;
    a.par.split(a.n_spans * s.kv_heads, a.n * s.kv_heads * (d + dv) * 2, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; ++u) {
            const int j = static_cast<int>(u / s.kv_heads);
            const int64_t g = u % s.kv_heads, position = *a.at(4, j).i64();
            const Operand k = a.at(2, j), v = a.at(3, j);
            const HeadCache cache = tiles.cache(j);
            for (int64_t r = 0; r < a.spans[j].n; ++r) {
                const int64_t at = g * s.capacity + s.index(position + r);
                put_key(s.form, cache, at, k.f32(r) + g * d, d);
                put_value(s.form, cache, at, v.f32(r) + g * dv, dv);
            }
        }
    });
}

// Few tiles: their splits are shared out too, some at a time, and added up in order.
void run_few(const RunArgs& a, const Tiles& tiles, int64_t work) {
    const Shape& s = tiles.s;
    const int threads = a.par.threads();
    const int64_t at_once = std::max<int64_t>(splits_each * threads / tiles.count, 1);
    uint8_t* records = a.scratch + threads * s.bytes;
    uint8_t* totals = records + splits_each * threads * s.part_bytes;
    int64_t most = 0;
    const auto each = [&](const auto& fn) {
        int64_t u = 0;
        tiles.each(0, tiles.count, [&](const Tile& tile) { fn(tile, u, Partial(s, totals + u * s.part_bytes)), ++u; });
    };
    each([&](const Tile& tile, int64_t, Partial total) { tile.clear(total), most = std::max(most, tile.splits()); });
    for (int64_t from = 0; from < most; from += at_once) {
        a.par.split(tiles.count * at_once, work, [&](int64_t begin, int64_t end, int thread) {
            uint8_t* scratch = a.scratch + thread * s.bytes;
            for (int64_t u = begin; u < end; ++u)
                tiles.each(u / at_once, u / at_once + 1, [&](const Tile& tile) {
                    const int64_t i = from + u % at_once;
                    if (i >= tile.splits()) return;
                    tile.begin(scratch);
                    tile.run_split(i, scratch, Partial(s, records + u * s.part_bytes));
                });
        });
        each([&](const Tile& tile, int64_t u, Partial total) {
            for (int64_t i = 0; i < at_once && from + i < tile.splits(); ++i)
                tile.merge(total, Partial(s, records + (u * at_once + i) * s.part_bytes));
        });
    }
    each([&](const Tile& tile, int64_t, Partial total) { tile.finish(total); });
}

int run_attention(const RunArgs& a) {
    const AttentionFlags with(a.i[5]);
    const Operand *rel = with.rel > 0 ? &a.t[with.rel] : nullptr, *rel_table = rel != nullptr ? rel + 1 : nullptr;
    const Shape s(a.t[1], a.t[3], a.t[5].dtype, rel, rel_table, a.i, a.portable);
    int64_t work = 0;  // multiply-adds
    for (int j = 0; j < a.n_spans; ++j) {
        const int64_t position = *a.at(4, j).i64(), n = a.spans[j].n;
        if (position < 0 || position >= position_end) return bad_index;
        if (s.window == 0 && position + n > s.capacity) return bad_index;
        const int64_t seen = s.window > 0 ? std::min(position + n, s.sinks + s.window + n) : position + n;
        work += n * s.heads * (s.d + s.dv) * std::min<int64_t>(seen, 1 << 24);
    }
    const Tiles tiles(a, s);
    write_caches(a, tiles);
    if (a.par.threads() > 1 && tiles.count < 2 * a.par.threads()) {
        run_few(a, tiles, work);
        return ok;
    }
    a.par.split(tiles.count, work, [&](int64_t begin, int64_t end, int thread) {
        uint8_t* scratch = a.scratch + thread * s.bytes;
        const Partial part(s, scratch + s.part_at), total(s, scratch + s.total_at);
        tiles.each(begin, end, [&](const Tile& tile) {
            tile.begin(scratch);
            tile.clear(total);
            for (int64_t i = 0; i < tile.splits(); ++i) {
                tile.run_split(i, scratch, part);
                tile.merge(total, part);
            }
            tile.finish(total);
        });
    });
    return ok;
}

const OpDef table[] = {
    {"short_conv", check_short_conv, no_scratch, run_short_conv, 1},
    {"attention", check_attention, scratch_attention, run_attention, 1, false, true},
    {"advance", check_advance, no_scratch, run_advance, 0},
};

}  // namespace

OpTable attention_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
