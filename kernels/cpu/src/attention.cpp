// Attention over the caches in a slot, and the position that goes with them.
//
// Work is cut into (tile of query rows, kv head): all query heads of the group and all rows of the tile pass over a
// block of 16 keys together, so keys and values are read once per tile. Blocks of positions are aligned to 16, and so
// are the ring and the sinks, hence a block of positions is one block of the cache. For each query, scores, the sum of
// exponentials and the weighted values run over exactly its visible keys in ascending position; which rows share its
// tile changes nothing.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "conv.h"
#include "real.h"
#include "vec.h"

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

// Which optional operands a call has, behind the caches: flags 1 (rel, rel_table) and 2 (sink_logits).
struct AttentionFlags {
    bool known;
    int rel = 0, sink_logits = 0, operands = 7;  // operand numbers, 0: not there
    explicit AttentionFlags(int64_t flags) : known(flags >= 0 && flags <= 3) {
        if ((flags & 1) != 0) rel = operands, operands += 2;
        if ((flags & 2) != 0) sink_logits = operands++;
    }
};

// The sizes of one attention call and where its scratch lies; d columns in a key, dv in a value.
struct Shape {
    int64_t heads, kv_heads, per, d, dv, window, sinks, capacity, rank, extent;
    int64_t tile, blocks;                          // rows of a tile; the most key blocks that a tile can see
    int64_t q_at, bias_at, score_at, sums_at, acc_at, floats;  // in floats, for one thread
    int64_t bias_stride, dv_pad;

    template <class T>  // TensorInfo or Operand
    Shape(const T& q, const T& v, const T* rel, const T* rel_table, const int64_t* i)
        : heads(i[0]), kv_heads(i[1]), per(heads / kv_heads), d(q.cols / heads), dv(v.cols / kv_heads), window(i[2]),
          sinks(i[2] > 0 ? i[3] : 0), capacity(i[4]), rank(rel ? rel->cols / heads : 0),
          extent(rel ? rel_table->cols : 0) {
        tile = std::min<int64_t>(8, std::max<int64_t>(1, 16 / per));
        blocks = window > 0 ? sinks / 16 + (window - 1 + tile + 15) / 16 + 1 : capacity / 16;
        bias_stride = rel ? round_up(extent, 16) + 32 : 0;
        dv_pad = round_up(dv, 16);
        int64_t at = 0;
        const auto take = [&](int64_t size) { const int64_t here = at; at += round_up(size, 16); return here; };
        q_at = take(tile * per * d);
        bias_at = take(tile * per * bias_stride);
        score_at = take(tile * per * blocks * 16);
        sums_at = take(tile * per);
        acc_at = take(tile * per * dv_pad);
        floats = at;
    }
    // Where the cache keeps position p.
    int64_t index(int64_t p) const {
        if (window == 0 || p < sinks) return p;
        return sinks + (p - sinks) % (capacity - sinks);
    }
    // The lanes [first, last) of the block of positions that begins at `start` that the query at p sees.
    void visible(int64_t p, int64_t start, int64_t& first, int64_t& last) const {
        const int64_t low = window == 0 || start < sinks ? 0 : std::max(sinks, p - window + 1);
        first = std::clamp<int64_t>(low - start, 0, 16);
        last = std::clamp<int64_t>(p + 1 - start, 0, 16);
    }
};

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
    TMLC_REQUIRE(k_cache.space == Space::slot && is_float(k_cache) && k_cache.fixed(kv * (capacity / 16), d * 16) && dense(k_cache),
                 "k_cache must be [G*C/16, D*16] in the slot");
    TMLC_REQUIRE(v_cache.space == Space::slot && is_float(v_cache) && v_cache.fixed(kv * capacity, dv) && dense(v_cache),
                 "v_cache must be [G*C, Dv] in the slot");
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
int64_t scratch_attention(const Call& c, int threads) {
    const AttentionFlags with(c.i[5]);
    const TensorInfo* rel = with.rel > 0 ? c.t[with.rel] : nullptr;
    return 4 * threads * Shape(*c.t[1], *c.t[3], rel, rel != nullptr ? c.t[with.rel + 1] : nullptr, c.i).floats;
}

// Stores row values into a cache of either dtype, `step` elements apart.
void put(const Operand& cache, int64_t at, int64_t step, const float* x, int64_t count) {
    if (cache.dtype == DType::f32) {
        float* p = cache.f32() + at;
        for (int64_t i = 0; i < count; ++i) p[i * step] = x[i];
    } else {
        uint16_t* p = cache.bf16() + at;
        for (int64_t i = 0; i < count; ++i) p[i * step] = float_to_bf16(x[i]);
    }
}

template <bool BF16>
TMLC_INLINE v16 cached(const void* p, int64_t at) {
    if constexpr (BF16) return load_bf16(static_cast<const uint16_t*>(p) + at);
    else return load(static_cast<const float*>(p) + at);
}
template <bool BF16>
TMLC_INLINE v16 cached_n(const void* p, int64_t at, int64_t count) {
    if constexpr (BF16) return load_bf16_n(static_cast<const uint16_t*>(p) + at, count);
    else return load_n(static_cast<const float*>(p) + at, count);
}

#if defined(__AVX512F__)
constexpr int score_rows = 8, value_rows = 4, value_cols = 4;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int score_rows = 4, value_rows = 2, value_cols = 2;
#else
constexpr int score_rows = 2, value_rows = 1, value_cols = 2;
#endif

// out[t][b] = q[t] . keys of block b, over the d columns in order.
template <int T, int B, bool BF16>
void score_tile(const float* q, int64_t d, const void* const* k, float* out, int64_t out_stride) {
    v16 acc[T][B];
    for (int t = 0; t < T; ++t)
        for (int b = 0; b < B; ++b) acc[t][b] = zero16();
    for (int64_t i = 0; i < d; ++i) {
        v16 key[B];
        for (int b = 0; b < B; ++b) key[b] = cached<BF16>(k[b], i * 16);
        for (int t = 0; t < T; ++t) {
            const v16 x = splat(q[t * d + i]);
            for (int b = 0; b < B; ++b) acc[t][b] = fma(x, key[b], acc[t][b]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int b = 0; b < B; ++b) store(out + t * out_stride + b * 16, acc[t][b]);
}

// The scores of `count` queries against B blocks, in the largest tiles that fit.
template <int T, int B, bool BF16>
void score_rows_of(const float* q, int64_t count, int64_t d, const void* const* k, float* out, int64_t out_stride) {
    while (count >= T) {
        score_tile<T, B, BF16>(q, d, k, out, out_stride);
        q += T * d;
        out += T * out_stride;
        count -= T;
    }
    if constexpr (T > 1) score_rows_of<T / 2, B, BF16>(q, count, d, k, out, out_stride);
}

// acc[t] += sum over lanes [first, last) of weight[t][lane] * v[lane], in order of lanes; C vectors of 16 columns.
template <int T, int C, bool BF16>
void value_tile(const float* w, int64_t w_stride, const void* v, int64_t d, int64_t column, int64_t first, int64_t last,
                float* acc, int64_t acc_stride) {
    v16 sum[T][C];
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < C; ++c) sum[t][c] = load(acc + t * acc_stride + column + 16 * c);
    for (int64_t j = first; j < last; ++j) {
        v16 value[C];
        for (int c = 0; c < C; ++c) {
            if constexpr (C == 1) value[c] = cached_n<BF16>(v, j * d + column, d - column);
            else value[c] = cached<BF16>(v, j * d + column + 16 * c);
        }
        for (int t = 0; t < T; ++t) {
            const v16 e = splat(w[t * w_stride + j]);
            for (int c = 0; c < C; ++c) sum[t][c] = fma(e, value[c], sum[t][c]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int c = 0; c < C; ++c) store(acc + t * acc_stride + column + 16 * c, sum[t][c]);
}
template <int T, bool BF16>
void value_rows_of(const float* w, int64_t w_stride, int64_t count, const void* v, int64_t d, int64_t first, int64_t last,
                   float* acc, int64_t acc_stride) {
    while (count >= T) {
        int64_t column = 0;
        for (; column + 16 * value_cols <= d; column += 16 * value_cols)
            value_tile<T, value_cols, BF16>(w, w_stride, v, d, column, first, last, acc, acc_stride);
        for (; column < d; column += 16) value_tile<T, 1, BF16>(w, w_stride, v, d, column, first, last, acc, acc_stride);
        w += T * w_stride;
        acc += T * acc_stride;
        count -= T;
    }
    if constexpr (T > 1) value_rows_of<T / 2, BF16>(w, w_stride, count, v, d, first, last, acc, acc_stride);
}

struct Attention {
    const Shape& s;
    const Operand &out, &q, &k_cache, &v_cache;
    const Operand *rel, *rel_table, *sink_logits;
    int64_t position;
    double scale, log_floor, log_alpha, softcap;

    float tau(int64_t p) const {
        if (!(log_floor > 0)) return 1.0f;
        return static_cast<float>(1.0 + log_alpha * log_real(std::max(1.0, static_cast<double>(p + 1) / log_floor)));
    }

    // Relative bias of one query by distance: bias[16 + dist] for every distance it can have.
    void fill_bias(float* bias, const float* r, float t, int64_t p) const {
        int64_t distances = std::min(s.extent, p + 1);
        if (s.window > 0 && s.sinks == 0) distances = std::min(distances, s.window + 15);  // whole blocks are read
        for (int64_t c = 0; c < distances; c += 64) {  // four sums at once, to keep the adders busy
            const int64_t last = std::min<int64_t>(round_up(distances, 16) - c, 64);
            v16 sum[4] = {zero16(), zero16(), zero16(), zero16()};
            for (int64_t j = 0; j < s.rank; ++j) {
                const v16 x = splat(r[j]);
                const float* row = rel_table->f32(j) + c;
                if (c + 64 <= s.extent) {
                    for (int i = 0; i < 4; ++i) sum[i] = fma(x, load(row + 16 * i), sum[i]);
                } else {
                    for (int i = 0; 16 * i < last; ++i) sum[i] = fma(x, load_n(row + 16 * i, s.extent - c - 16 * i), sum[i]);
                }
            }
            for (int i = 0; 16 * i < last; ++i) store(bias + 16 + c + 16 * i, splat(t) * sum[i]);
        }
        store(bias + 16 + round_up(distances, 16), zero16());
    }

    // Turns the raw scores of the query at p into exp(score - max), zero where a key is not visible; returns their sum,
    // with that of the head's sink logit (a key that has no value) where there is one.
    template <class StartOf>
    float softmax(float* score, const float* bias, int64_t head, int64_t p, const StartOf& start_of, int64_t n_blocks) const {
        const w16 lane = lane_numbers();
        const int64_t sink_row = sink_logits != nullptr && sink_logits->rows > 1 ? p - position : 0;
        const v16 sink = splat(sink_logits != nullptr ? sink_logits->f32(sink_row)[head] : -INFINITY);
        const v16 cap = splat(static_cast<float>(softcap)), uncap = splat(static_cast<float>(1.0 / softcap));
        v16 top = sink;
        int64_t first, last;
        for (int64_t b = 0; b < n_blocks; ++b) {
            s.visible(p, start_of(b), first, last);
            if (first >= last) continue;
            v16 x = load(score + b * 16);
            const int64_t nearest = p - start_of(b) - 15;  // distance of the last lane; lanes run backwards in distance
            if (bias != nullptr && nearest < s.extent) x = x + reverse(load(bias + 16 + nearest));
            if (softcap > 0) x = cap * tanh16(x * uncap);
            const w16 seen = (splat_int(static_cast<int32_t>(first)) <= lane) & (lane < splat_int(static_cast<int32_t>(last)));
            x = choose(seen, x, splat(-INFINITY));
            top = max16(top, x);
            store(score + b * 16, x);
        }
        const v16 highest = splat(max_lanes(top));
        v16 sum = zero16();
        for (int64_t b = 0; b < n_blocks; ++b) {
            s.visible(p, start_of(b), first, last);
            if (first >= last) continue;
            const v16 e = exp16(load(score + b * 16) - highest);
            sum = sum + e;
            store(score + b * 16, e);
        }
        if (sink_logits == nullptr) return sum_lanes(sum);
        return sum_lanes(sum) + max_lanes(exp16(sink - highest));
    }

    // Rows [r0, r0 + rows) for the query heads of one kv head.
    void run_tile(int64_t r0, int64_t rows, int64_t g, float* scratch) const {
        float *queries = scratch + s.q_at, *biases = scratch + s.bias_at, *scores = scratch + s.score_at,
              *acc = scratch + s.acc_at;
        const int64_t per = s.per, d = s.d, stride = s.blocks * 16, p0 = position + r0, p1 = p0 + rows - 1;
        for (int64_t r = 0; r < rows; ++r) {
            const float t = tau(p0 + r);
            const v16 factor = splat(static_cast<float>(scale) * t);
            for (int64_t h = 0; h < per; ++h) {
                const int64_t head = g * per + h, at = r * per + h;
                for (int64_t c = 0; c < d; c += 16)
                    store_n(queries + at * d + c, factor * load_n(q.f32(r0 + r) + head * d + c, d - c), d - c);
                if (rel != nullptr)
                    fill_bias(biases + at * s.bias_stride, rel->f32(r0 + r) + head * s.rank, t, p0 + r);
            }
        }
        std::memset(acc, 0, static_cast<size_t>(4 * rows * per * s.dv_pad));

        // The blocks of positions that some row sees, ascending: sinks, then the window.
        const int64_t sink_blocks = blocks16(std::min(s.sinks, p1 + 1));
        const int64_t low = s.window == 0 ? 0 : std::max(s.sinks, p0 - s.window + 1);
        const int64_t window_blocks = p1 >= low ? p1 / 16 - low / 16 + 1 : 0;
        const int64_t n_blocks = sink_blocks + window_blocks;
        const auto start_of = [&](int64_t b) { return b < sink_blocks ? b * 16 : (low / 16 + b - sink_blocks) * 16; };
        const bool k_bf16 = k_cache.dtype == DType::bf16, v_bf16 = v_cache.dtype == DType::bf16;
        const auto key_block = [&](int64_t b) -> const void* {
            const int64_t at = (g * s.capacity + s.index(start_of(b))) * d;
            return k_bf16 ? static_cast<const void*>(k_cache.bf16() + at) : k_cache.f32() + at;
        };
        for (int64_t b = 0; b < n_blocks;) {
            const void* k[2] = {key_block(b), nullptr};
            const int64_t count = rows * per;
            if (b + 1 < n_blocks && count * 2 <= score_rows) {  // few queries: two blocks, for more independent sums
                k[1] = key_block(b + 1);
                constexpr int few = score_rows / 2;
                (k_bf16 ? score_rows_of<few, 2, true> : score_rows_of<few, 2, false>)(queries, count, d, k, scores + b * 16, stride);
                b += 2;
            } else {
                (k_bf16 ? score_rows_of<score_rows, 1, true> : score_rows_of<score_rows, 1, false>)(queries, count, d, k,
                                                                                               scores + b * 16, stride);
                b += 1;
            }
        }
        finish(r0, rows, g, n_blocks, start_of, v_bf16, biases, scores, acc);
    }

    template <class StartOf>
    void finish(int64_t r0, int64_t rows, int64_t g, int64_t n_blocks, const StartOf& start_of, bool bf16,
                const float* biases, float* scores, float* acc) const {
        const int64_t per = s.per, dv = s.dv, stride = s.blocks * 16, p0 = position + r0;
        float* sums = scores + s.sums_at - s.score_at;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < per; ++h) {
                const int64_t at = r * per + h;
                const float* bias = rel ? biases + at * s.bias_stride : nullptr;
                sums[at] = softmax(scores + at * stride, bias, g * per + h, p0 + r, start_of, n_blocks);
            }
        const auto values = bf16 ? value_rows_of<value_rows, true> : value_rows_of<value_rows, false>;
        for (int64_t b = 0; b < n_blocks; ++b) {
            const int64_t start = start_of(b), at = (g * s.capacity + s.index(start)) * dv;
            const void* v = bf16 ? static_cast<const void*>(v_cache.bf16() + at) : v_cache.f32() + at;
            int64_t first, last, first1, last1;
            s.visible(p0, start, first, last);
            s.visible(p0 + rows - 1, start, first1, last1);
            if (first == first1 && last == last1) {  // both grow with p, so all rows between agree
                if (first < last)
                    values(scores + b * 16, stride, rows * per, v, dv, first, last, acc, s.dv_pad);
                continue;
            }
            for (int64_t r = 0; r < rows; ++r) {
                s.visible(p0 + r, start, first, last);
                if (first < last)
                    values(scores + r * per * stride + b * 16, stride, per, v, dv, first, last, acc + r * per * s.dv_pad, s.dv_pad);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < per; ++h) {
                const int64_t at = r * per + h;
                const v16 inverse = splat(1.0f / sums[at]);
                float* o = out.f32(r0 + r) + (g * per + h) * dv;
                for (int64_t c = 0; c < dv; c += 16) store_n(o + c, load(acc + at * s.dv_pad + c) * inverse, dv - c);
            }
    }
};

int run_attention(const RunArgs& a) {
    const Operand &q = a.t[1], &k = a.t[2], &v = a.t[3], &k_cache = a.t[5], &v_cache = a.t[6];
    const AttentionFlags with(a.i[5]);
    const Operand *rel = with.rel > 0 ? &a.t[with.rel] : nullptr, *rel_table = rel != nullptr ? rel + 1 : nullptr;
    const Operand* sink_logits = with.sink_logits > 0 ? &a.t[with.sink_logits] : nullptr;
    const Shape s(q, v, rel, rel_table, a.i);
    const int64_t position = *a.t[4].i64(), n = q.rows, d = s.d, dv = s.dv;
    if (position < 0 || position >= position_end) return bad_index;
    if (s.window == 0 && position + n > s.capacity) return bad_index;

    a.par.split(s.kv_heads, n * (k.cols + v.cols) * 2, [&](int64_t begin, int64_t end, int) {
        for (int64_t g = begin; g < end; ++g)
            for (int64_t r = 0; r < n; ++r) {
                const int64_t at = s.index(position + r);
                put(k_cache, (g * s.capacity + at / 16 * 16) * d + at % 16, 16, k.f32(r) + g * d, d);
                put(v_cache, (g * s.capacity + at) * dv, 1, v.f32(r) + g * dv, dv);
            }
    });

    const Attention attention{s,           a.t[0],   q,      k_cache, v_cache, rel,   rel_table,
                              sink_logits, position, a.f[0], a.f[1],  a.f[2],  a.f[3]};
    const int64_t tiles = (n + s.tile - 1) / s.tile;
    const int64_t seen = s.window > 0 ? std::min(position + n, s.sinks + s.window + n) : position + n;
    float* scratch = reinterpret_cast<float*>(a.scratch);
    a.par.split(tiles * s.kv_heads, n * q.cols * std::min<int64_t>(seen, 1 << 24) * 2, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t r0 = u / s.kv_heads * s.tile, rows = std::min(s.tile, n - r0);
            attention.run_tile(r0, rows, u % s.kv_heads, scratch + thread * s.floats);
        }
    });
    return ok;
}

const OpDef table[] = {
    {"short_conv", check_short_conv, no_scratch, run_short_conv, 1},
    {"attention", check_attention, scratch_attention, run_attention, 1},
    {"advance", check_advance, no_scratch, run_advance, 0},
};

}  // namespace

OpTable attention_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
