// One tile of attention over one split of positions: bias, scores, softmax, values; and how splits are added up.
//
// Exponents are of two, relative to a whole number: rescaling what was summed so far is then exact, and so the bits of a
// result do not depend on which maximum was known when. For each query everything runs over exactly its visible keys in
// ascending position; which rows share its tile changes nothing.
#include "attn_tile.h"

#include <cmath>
#include <cstring>

#include "real.h"

namespace tmlc {
namespace {

constexpr float log2_e = 1.44269504f;
constexpr Factors pairs_or_floats = bf16_dots ? Factors::bf16_pairs : Factors::bf16;  // what of bf16_pairs is compiled

// 2^x for x <= 0 (0 below -126; NaN stays NaN), to about 1e-7; where weights are rounded anyway, to 3e-6.
template <bool EXACT>
TMLC_INLINE v16 exp2_16(v16 x) {
#if defined(__AVX512F__)
    const v16 r = _mm512_maskz_reduce_ps(0xffff, x, 0);  // x less the nearest whole number
#else
    const v16 low = splat(-126.0f), magic = splat(12582912.0f);
    const v16 bounded = choose(x < low, low, x);
    const v16 shifted = bounded + magic;
    const v16 r = bounded - (shifted - magic);
    const w16 n = float_to_bits(shifted) - splat_int(0x4b400000 - 127);
#endif
    v16 p;
    if constexpr (EXACT) {
        p = splat(0.000153458124f);
        p = fma(p, r, splat(0.00133999309f));
        p = fma(p, r, splat(0.00961848907f));
        p = fma(p, r, splat(0.0555032864f));
        p = fma(p, r, splat(0.240226462f));
        p = fma(p, r, splat(0.693147182f));
        p = fma(p, r, splat(1.0f));
    } else {
        p = splat(0.00957010221f);
        p = fma(p, r, splat(0.0559178591f));
        p = fma(p, r, splat(0.240247443f));
        p = fma(p, r, splat(0.693121791f));
        p = fma(p, r, splat(0.999999285f));
    }
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), p, x - r);
#else
    const v16 y = p * bits_to_float(detail::shift_left(n, 23));
    return choose(x < low, zero16(), y);
#endif
}
#if defined(__AVX512BF16__)
// 2^x, x <= 0, of a weight that becomes half of a pair, to 3e-6. What is below 2^-126 comes out as a denormal, which the
// conversion to bf16 takes for zero; NaN stays NaN.
TMLC_INLINE v16 exp2_of_pair(v16 x) {
    const v16 r = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);
    v16 p = splat(0.0135341454f);
    p = fma(p, r, splat(0.0520114936f));
    p = fma(p, r, splat(0.24144274f));
    p = fma(p, r, splat(0.693003833f));
    p = fma(p, r, splat(1.00000262f));
    return _mm512_maskz_scalef_ps(0xffff, p, x);  // takes the same whole number
}
#endif
TMLC_INLINE v16 larger(v16 a, v16 b) {  // max16 in one instruction; where b is NaN, a
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, b, a);
#else
    return max16(a, b);
#endif
}
// 2^x for a whole x <= 0; 0 below -126, and where x is NaN (then the sums that it multiplies are NaN already).
float power(float x) {
    if (!(x >= -126.0f)) return 0.0f;
    return bf16_to_float(static_cast<uint16_t>(static_cast<int32_t>(x + 127.0f) << 7));
}

TMLC_INLINE float top_lane(v16 v) { return first_lane<float>(fold_lanes(v, [](v16 a, v16 b) { return max16(a, b); })); }

TMLC_INLINE w16 lanes_of(Interval seen, int64_t block) {  // which lanes of the block at this position are seen
    const w16 lane = lane_numbers();
    const auto bound = [&](int64_t at) {
        return splat_int(static_cast<int32_t>(std::clamp<int64_t>(at - block, 0, 16)));
    };
    const w16 first = bound(seen.begin), last = bound(seen.end);
    return (splat_int(-1) - (lane < first)) & (lane < last);
}

// The scores of `count` queries with B blocks, in the largest tiles of rows that fit.
template <Factors F, int T, int B>
void score_rows_of(const uint8_t* q, int64_t q_bytes, int64_t count, int64_t d, const uint8_t* const* k, float* out,
                   bool fetch = true) {  // once is enough
    for (; count >= T; count -= T, q += T * q_bytes, out += T * score_stride, fetch = false) {
        if constexpr (F == Factors::int8) int8_scores<T, B>(q, q_bytes, d, k, out, score_stride);
        else if (fetch) float_scores<F, T, B, true>(q, q_bytes, d, k, out, score_stride);
        else float_scores<F, T, B, false>(q, q_bytes, d, k, out, score_stride);
    }
    if constexpr (T > 1) score_rows_of<F, T / 2, B>(q, q_bytes, count, d, k, out, fetch);
}
template <Factors F>
void score_blocks(const uint8_t* q, int64_t q_bytes, int64_t count, int64_t d, const uint8_t* const* k, int64_t blocks, float* out) {
    constexpr int rows = F == Factors::int8 ? int8_rows : score_rows, pair = native_lanes == 16 ? 2 : 1;
    int64_t b = 0;
    if constexpr (F != Factors::int8) {  // few queries: more blocks at once, for more independent sums
        constexpr int few = std::max(score_rows / 2, 1), most = 2 * pair;
        if (count <= few)
            for (; b + most <= blocks; b += most) score_rows_of<F, few, most>(q, q_bytes, count, d, k + b, out + 16 * b);
    }
    for (; b + pair <= blocks; b += pair) score_rows_of<F, rows, pair>(q, q_bytes, count, d, k + b, out + 16 * b);
    for (; b < blocks; ++b) score_rows_of<F, rows, 1>(q, q_bytes, count, d, k + b, out + 16 * b);
}

template <Factors F, int T, bool EDGE, bool FETCH>
void value_columns_of(const float* e, int64_t e_at, const uint8_t* v, int64_t dv, int64_t first, int64_t last, float* acc,
                      int64_t acc_stride) {
    int64_t column = 0;
    for (; column + 16 * value_cols <= dv; column += 16 * value_cols)
        float_values<F, T, value_cols, EDGE, FETCH>(e, score_stride, e_at, v, dv, column, first, last, acc, acc_stride);
    for (; column < dv; column += 16)
        float_values<F, T, 1, EDGE, FETCH>(e, score_stride, e_at, v, dv, column, first, last, acc, acc_stride);
}
template <Factors F, int T, bool EDGE>
void value_rows_of(const float* e, int64_t e_at, int64_t count, const uint8_t* v, int64_t dv, int64_t first, int64_t last,
                   float* acc, int64_t acc_stride, bool fetch) {  // once is enough
    for (; count >= T; count -= T, e += T * score_stride, acc += T * acc_stride, fetch = false) {
        if (fetch) value_columns_of<F, T, EDGE, true>(e, e_at, v, dv, first, last, acc, acc_stride);
        else value_columns_of<F, T, EDGE, false>(e, e_at, v, dv, first, last, acc, acc_stride);
    }
    if constexpr (T > 1) value_rows_of<F, T / 2, EDGE>(e, e_at, count, v, dv, first, last, acc, acc_stride, fetch);
}

// out[t] = r[t] . C vectors of the columns of a table of `rank` rows, of which `left` are there (the rest count as zero).
template <int T, int C>
__attribute__((noinline)) void table_products(const float* const* r, int64_t rank, const float* table, int64_t stride, int64_t left,
                                              v16 (&out)[T][C]) {
    const float* x[T];
    for (int t = 0; t < T; ++t) x[t] = r[t];
    v16 sum[T][C];
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int i = 0; i < C; ++i) sum[t][i] = zero16();
    for (int64_t j = 0; j < rank; ++j, table += stride) {
        v16 column[C];
        TMLC_UNROLL for (int i = 0; i < C; ++i)
            column[i] = left >= 16 * C ? load(table + 16 * i) : left > 16 * i ? load_n(table + 16 * i, left - 16 * i) : zero16();
        TMLC_UNROLL for (int t = 0; t < T; ++t) {
            const v16 factor = splat(x[t][j]);
            TMLC_UNROLL for (int i = 0; i < C; ++i) sum[t][i] = fma(factor, column[i], sum[t][i]);
        }
    }
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int i = 0; i < C; ++i) out[t][i] = sum[t][i];
}

// One split at work: positions are relative to its start.
struct Split {
    const Tile& tile;
    const Shape& s;
    int64_t start, p0, p1, count, bias_from;  // bias_from: the distance that the first column of `bias` is for
    uint8_t *queries, *codes, *scratch;
    float *bias, *scores;
    Partial part;
    float taus[max_tile_rows];

    Split(const Tile& t, int64_t at, uint8_t* scratch, Partial p)
        : tile(t), s(t.s), start(at), p0(t.first()), p1(t.last()), count(t.rows * t.s.per), queries(scratch + s.q_at),
          codes(scratch + s.codes_at), scratch(scratch), bias(reinterpret_cast<float*>(scratch + s.bias_at)),
          scores(reinterpret_cast<float*>(scratch + s.score_at)), part(p) {
        bias_from = std::max<int64_t>(p0 - start - split_keys + 1, 0) / 16 * 16;
        for (int64_t r = 0; r < t.rows; ++r) taus[r] = tau(p0 + r);
    }

    float tau(int64_t p) const {
        if (!(tile.f[1] > 0)) return 1.0f;
        return static_cast<float>(1.0 + tile.f[2] * log_real(std::max(1.0, static_cast<double>(p + 1) / tile.f[1])));
    }
    float unit() const { return tile.f[3] > 0 ? 1.0f : log2_e; }  // scores are in powers of two, before a soft cap of e
    Interval seen(int64_t r, int part_of) const { return s.seen(p0 + r, part_of, start); }
    Interval seen_by_any(int part_of) const {
        return {seen(0, part_of).begin, seen(tile.rows - 1, part_of).end};  // both ends only move on with the position
    }

    // bias[16 + distance - bias_from] of every query for every distance that this split can have, 64 at a time.
    void fill_bias() const {
        const int64_t extent = s.extent, stride = s.bias_stride;
        const int64_t most = std::min(extent, p1 - start + 1), end = s.window > 0 && s.sinks == 0 ? std::min(most, s.window + 15) : most;
        for (int64_t c = bias_from; c < end; c += 64)
            for (int64_t at = 0; at < count; at += 4)
                bias_tile(at, std::min<int64_t>(count - at, 4), c, std::min<int64_t>(round_up(end - c, 16), 64));
        const int64_t after = std::max<int64_t>(round_up(std::max(end, bias_from) - bias_from, 16), 0);
        for (int64_t at = 0; at < count; ++at) store(bias + at * stride + 16 + after, zero16());
    }
    void bias_tile(int64_t at, int64_t queries_here, int64_t c, int64_t width) const {
        constexpr int T = native_lanes == 16 ? 4 : 2, C = native_lanes == 16 ? 4 : 2;
        for (int64_t t0 = 0; t0 < queries_here; t0 += T)
            for (int64_t c0 = 0; c0 < width; c0 += 16 * C) {
                const float* r[T];
                for (int t = 0; t < T; ++t) {  // the last query again where there are fewer: its sums are not stored
                    const int64_t query = at + std::min(t0 + t, queries_here - 1);
                    r[t] = tile.rel->f32(tile.r0 + query / s.per) + (tile.g * s.per + query % s.per) * s.rank;
                }
                v16 sum[T][C];
                table_products<T, C>(r, s.rank, tile.rel_table->f32() + c + c0, tile.rel_table->stride, s.extent - c - c0, sum);
                for (int t = 0; t < T && t0 + t < queries_here; ++t) {
                    const int64_t query = at + t0 + t;
                    const v16 factor = splat(taus[query / s.per] * unit());
                    for (int i = 0; i < C && c0 + 16 * i < width; ++i)
                        store(bias + query * s.bias_stride + 16 + (c - bias_from) + c0 + 16 * i, factor * sum[t][i]);
                }
            }
    }

    const uint8_t* block_of(const uint8_t* base, int64_t bytes, int64_t at) const {  // at: relative, a multiple of 16
        return base + (tile.g * s.capacity + s.index(start + at)) / 16 * bytes;
    }

    void score() const {
        for (int part_of = 0; part_of < 2; ++part_of) {
            const Interval any = seen_by_any(part_of);
            if (any.empty()) continue;
            const uint8_t* k[split_keys / 16];
            const int64_t first = any.begin / 16, blocks = (any.end + 15) / 16 - first;
            for (int64_t b = 0; b < blocks; ++b) k[b] = block_of(tile.cache.k, tile.cache.k_block, 16 * (first + b));
            const auto run = [&] {
                switch (s.factors) {
                    case Factors::f32: return score_blocks<Factors::f32>;
                    case Factors::bf16_pairs: return score_blocks<pairs_or_floats>;
                    case Factors::bf16: return score_blocks<Factors::bf16>;
                    case Factors::int8: break;
                }
                return score_blocks<Factors::int8>;
            }();
            run(queries, s.q_bytes, count, s.d, k, blocks, scores + 16 * first);
        }
    }

    // Turns the scores of an interval into 2^(score - top), and adds them to `sum` as they are rounded.
    template <Factors F>
    static void weigh(float* score, Interval in, v16 top, v16& sum) {
        int64_t b = in.begin / 16 * 16;
#if defined(__AVX512BF16__)
        if constexpr (F == Factors::bf16_pairs) {  // sums of pairs, 32 weights at a time from here on
            auto* const row = reinterpret_cast<uint16_t*>(score);
            const w16 ones = splat_int(0x3f803f80);
            const auto pairs = [&](v16 high, v16 low) TMLC_LAMBDA_INLINE {
                const __m512bh weights = _mm512_cvtne2ps_pbh(high, low);
                sum = _mm512_dpbf16_ps(sum, weights, reinterpret_cast<__m512bh>(ones));
                return reinterpret_cast<__m512i>(weights);
            };
            for (; b + 32 <= in.end; b += 32) {
                const v16 low = exp2_of_pair(load(score + b) - top), high = exp2_of_pair(load(score + b + 16) - top);
                _mm512_storeu_si512(row + b, pairs(high, low));
            }
            for (; b < in.end; b += 16) {
                const __m512i half = pairs(zero16(), exp2_of_pair(load(score + b) - top));
                std::memcpy(row + b, &half, 32);
            }
            return;
        }
#endif
        for (; b < in.end; b += 16) sum = sum + store_factors<F>(score, b, exp2_16<F == Factors::f32>(load(score + b) - top));
    }

    // Turns the scores of a query into 2^(score - top); false where it sees nothing of this split.
    template <Factors F>
    bool softmax(int64_t at) const {
        const int64_t r = at / s.per, p = p0 + r;
        float* score = scores + at * score_stride;
        const Interval parts[2] = {seen(r, 0), seen(r, 1)};
        const bool any = !parts[0].empty() || !parts[1].empty();
        const float* own_bias = tile.rel != nullptr ? bias + at * s.bias_stride + 16 : nullptr;
        const float cap = static_cast<float>(tile.f[3]);
        v16 high = splat(-INFINITY);
        // From this block on, keys are near enough for a bias; before it, whole blocks need only be looked at.
        const int64_t near_from = own_bias == nullptr ? split_keys : std::max<int64_t>(p - start - 15 - s.extent + 16, 0) / 16 * 16;
        for (const Interval& in : parts) {
            const int64_t plain = round_up(in.begin, 16), plain_end = cap > 0 ? plain : std::min(in.end / 16 * 16, near_from);
            for (int64_t b = plain; b < plain_end; b += 16) high = larger(high, load(score + b));
            for (int64_t b = in.begin / 16 * 16; b < in.end; b += 16) {
                if (b == plain && plain_end > plain) b = plain_end;
                if (b >= in.end) break;
                v16 x = load(score + b);
                const int64_t nearest = p - start - b - 15;  // distance of the last lane: it falls along the lanes
                const bool edge = b < in.begin || b + 16 > in.end;
                const bool near = own_bias != nullptr && nearest < s.extent;
                if (near) x = x + reverse(load(own_bias + (nearest - bias_from)));
                if (cap > 0) x = splat(cap * log2_e) * tanh16(x * splat(1.0f / cap));
                if (edge) x = choose(lanes_of(in, b), x, splat(-INFINITY));
                if (edge || near || cap > 0) store(score + b, x);
                high = larger(high, x);
            }
        }
        const float most = top_lane(high), top = most > -INFINITY ? std::ceil(most) : 0.0f;
        const v16 relative = splat(top);
        v16 sum = zero16();
        for (const Interval& in : parts) weigh<F>(score, in, relative, sum);
        part.top[at] = any ? top : -INFINITY;
        store(part.sums + 16 * at, sum);
        return any;
    }

    template <Factors F>
    void float_split() const {
        for (int64_t at = 0; at < count; ++at) softmax<F>(at);
        for (int part_of = 0; part_of < 2; ++part_of) {
            const Interval first = seen(0, part_of), last = seen(tile.rows - 1, part_of);
            Interval shared{round_up(last.begin, 16), first.end / 16 * 16};
            if (first == last) shared = first;
            if (shared.empty()) shared = {split_keys, split_keys};  // nothing that all rows see in whole blocks
            // The interval of a row only moves on with its position, so what all see lies between the edges of each.
            for (int64_t r = 0; r < tile.rows; ++r) {
                const Interval own = seen(r, part_of);
                values<F>(r, 1, {own.begin, std::min(own.end, shared.begin)});
            }
            values<F>(0, tile.rows, shared);
            for (int64_t r = 0; r < tile.rows; ++r) {
                const Interval own = seen(r, part_of);
                values<F>(r, 1, {std::max(own.begin, shared.end), own.end});
            }
        }
    }
    // Where the values that begin at `from` are cut: at whole blocks, after about 16 KiB.
    int64_t value_run(int64_t from, int64_t last) const {
        const int64_t run = std::max<int64_t>(16384 / tile.cache.v_block * 16, 16);
        return std::min((from + run) / 16 * 16, last);
    }
    // Adds the values of an interval to the results of some rows, one run of the cache after another.
    template <Factors F>
    void values(int64_t r, int64_t rows_here, Interval in) const {
        while (!in.empty()) {
            const int64_t base = in.begin / 16 * 16, left = s.capacity - s.index(start + base);
            const int64_t end = std::min(in.end, base + left), first = in.begin - base, last = end - base;
            const auto run = (first | last) % 2 != 0 ? value_rows_of<F, value_rows, true> : value_rows_of<F, value_rows, false>;
            const uint8_t* v = block_of(tile.cache.v, tile.cache.v_block, base);
            for (int64_t from = first; from < last; from = value_run(from, last))  // a run stays in L1 for all queries
                run(scores + r * s.per * score_stride, base, rows_here * s.per, v, s.dv, from, value_run(from, last),
                    part.acc + r * s.per * s.dv_pad, s.dv_pad, true);
            in.begin = end;
        }
    }

    // int8: weights are multiplied by the scales of their values and rounded, in groups of positions.
    void int8_split() const {
        constexpr int64_t groups = split_keys / factor_group, blocks = factor_group / 16;
        auto* rounded = reinterpret_cast<Rounded*>(scratch + s.groups_at);
        const int64_t codes_off = 16 * round_up(s.dv, 4);
        const uint8_t* v[split_keys / 16] = {};
        for (int part_of = 0; part_of < 2; ++part_of) {
            const Interval any = seen_by_any(part_of);
            for (int64_t b = any.begin / 16; 16 * b < any.end; ++b) {
                v[b] = block_of(tile.cache.v, tile.cache.v_block, 16 * b);
                __builtin_prefetch(v[b] + codes_off, 0, 2);
            }
        }
        for (int64_t at = 0; at < count; ++at) {
            softmax<Factors::int8>(at);
            float* e = scores + at * score_stride;
            const Interval parts[2] = {seen(at / s.per, 0), seen(at / s.per, 1)};
            v16 top[groups] = {};
            uint32_t used = 0;
            for (const Interval& in : parts)
                for (int64_t b = in.begin / 16; 16 * b < in.end; ++b) {
                    v16 w = load(e + 16 * b) * load(reinterpret_cast<const float*>(v[b] + codes_off));
                    if (16 * b < in.begin || 16 * b + 16 > in.end) w = choose(lanes_of(in, 16 * b), w, zero16());
                    store(e + 16 * b, w);
                    top[b / blocks] = larger_size(top[b / blocks], w);
                    used |= uint32_t{1} << b;
                }
            for (int64_t g = 0; g < groups; ++g) {
                const auto weights = [&](int64_t i) {
                    const int64_t b = g * blocks + i;
                    return (used >> b & 1) != 0 ? load(e + 16 * b) : zero16();
                };
                rounded[at * groups + g] = round_factors(blocks, codes + 2 * at * split_keys + 2 * g * factor_group, 0, factor_group,
                                                         largest_size(top[g]), weights);
            }
        }
        for (int64_t g = 0; g < groups; ++g) {
            const uint8_t* const* of_group = v + g * blocks;
            if (std::all_of(of_group, of_group + blocks, [](const uint8_t* p) { return p == nullptr; })) continue;
            int8_rows_of<int8_rows>(codes + 2 * g * factor_group, rounded + g, of_group, count, part.acc);
        }
    }
    template <int T>
    void int8_rows_of(const uint8_t* x, const Rounded* r, const uint8_t* const* v, int64_t left, float* acc) const {
        constexpr int64_t groups = split_keys / factor_group, x_bytes = 2 * split_keys;
        constexpr int C = native_lanes == 16 ? 2 : 1;
        for (; left >= T; left -= T, x += T * x_bytes, r += T * groups, acc += T * s.dv_pad) {
            int64_t column = 0;
            for (; C > 1 && column + 16 * C <= s.dv; column += 16 * C)
                int8_values<T, C>(x, x_bytes, factor_group, r, groups, v, factor_group / 16, s.dv, column, acc, s.dv_pad);
            for (; column < s.dv; column += 16)
                int8_values<T, 1>(x, x_bytes, factor_group, r, groups, v, factor_group / 16, s.dv, column, acc, s.dv_pad);
        }
        if constexpr (T > 1) int8_rows_of<T / 2>(x, r, v, left, acc);
    }
};

}  // namespace

void Tile::begin(uint8_t* scratch) const {
    const Split any(*this, 0, scratch, Partial(s, scratch + s.part_at));
    float* row = reinterpret_cast<float*>(scratch + s.row_at);
    for (int64_t at = 0; at < rows * s.per; ++at) {
        const int64_t r = at / s.per;
        const v16 factor = splat(static_cast<float>(f[0]) * any.taus[r] * any.unit());
        const float* x = q.f32(r0 + r) + (g * s.per + at % s.per) * s.d;
        uint8_t* to = any.queries + at * s.q_bytes;
        for (int64_t c = 0; c < s.d; c += 16) {
            const v16 y = factor * load_n(x + c, s.d - c);
            if (s.factors == Factors::bf16_pairs) store_factors<pairs_or_floats>(to, c, y);
            else if (s.factors == Factors::bf16) store_factors<Factors::bf16>(to, c, y);
            else store(s.factors == Factors::f32 ? reinterpret_cast<float*>(to) + c : row + c, y);
        }
        if (s.form == KV::int8) round_query(row, s.d, to);
    }
}

void Tile::run_split(int64_t i, uint8_t* scratch, Partial p) const {
    const Split split(*this, s.split_start(first(), last(), i), scratch, p);
    std::memset(p.acc, 0, static_cast<size_t>(4 * rows * s.per * s.dv_pad));
    if (rel != nullptr) split.fill_bias();
    split.score();
    switch (s.factors) {
        case Factors::f32: return split.float_split<Factors::f32>();
        case Factors::bf16_pairs: return split.float_split<pairs_or_floats>();
        case Factors::bf16: return split.float_split<Factors::bf16>();
        case Factors::int8: return split.int8_split();
    }
}

// A head's sink logit is a key that has no value: the others are scaled relative to it, its weight is added at the end.
void Tile::clear(Partial total) const {
    for (int64_t at = 0; at < rows * s.per; ++at) {
        total.top[at] = -INFINITY;
        store(total.sums + 16 * at, zero16());
    }
    std::memset(total.acc, 0, static_cast<size_t>(4 * rows * s.per * s.dv_pad));
}

void Tile::merge(Partial total, Partial p) const {
    for (int64_t at = 0; at < rows * s.per; ++at) {
        if (p.top[at] == -INFINITY) continue;  // this row saw nothing there
        const float top = std::max(total.top[at], p.top[at]);
        const v16 before = splat(power(total.top[at] - top)), now = splat(power(p.top[at] - top));
        const auto add = [&](float* to, const float* from) { store(to, fma(now, load(from), before * load(to))); };
        add(total.sums + 16 * at, p.sums + 16 * at);
        for (int64_t c = 0; c < s.dv_pad; c += 16) add(total.acc + at * s.dv_pad + c, p.acc + at * s.dv_pad + c);
        total.top[at] = top;
    }
}

void Tile::finish(Partial total) const {
    for (int64_t at = 0; at < rows * s.per; ++at) {
        const int64_t r = at / s.per, head = g * s.per + at % s.per;
        float sum = sum_lanes(load(total.sums + 16 * at)), shrink = 1.0f;
        if (sink_logits != nullptr) {
            const float sink = log2_e * sink_logits->f32(sink_logits->rows > 1 ? r0 + r : 0)[head];
            const float top = std::max(total.top[at], std::ceil(sink));
            shrink = power(total.top[at] - top);
            sum = sum * shrink + first_lane<float>(exp2_16<true>(splat(sink - top)));
        }
        const v16 factor = splat(shrink / sum);
        float* o = out.f32(r0 + r) + head * s.dv;
        for (int64_t c = 0; c < s.dv; c += 16) store_n(o + c, factor * load(total.acc + at * s.dv_pad + c), s.dv - c);
    }
}

}  // namespace tmlc
