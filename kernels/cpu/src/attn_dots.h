// Inner products of attention for caches of floats: queries with blocks of 16 keys, weights with values.
//
// Queries and weights are stored as the products take them. bf16 caches: both are rounded to bf16; where the machine
// multiplies bf16 pairs (`vdpbf16ps`) they are stored as pairs, elsewhere as floats that hold bf16 values. The
// instruction rounds in a way of its own, so portable bits do without it.
#pragma once
#include "attn_cache.h"
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

// Loops over the sums of a tile: unrolled from the start, or the compiler keeps the sums in memory.
#define TMLC_UNROLL _Pragma("GCC unroll 16")

namespace tmlc {

#if defined(__AVX512F__)
constexpr int score_rows = 8, value_rows = 4, value_cols = 4;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int score_rows = 4, value_rows = 2, value_cols = 2;
#else
constexpr int score_rows = 2, value_rows = 1, value_cols = 2;
#endif

// The factors of a product (queries; weights of values) as it takes them.
enum class Factors { f32, bf16_pairs, bf16, int8 };

#if defined(__AVX512BF16__)
// sum += pairs x the pair at p, broadcast. Spelled in assembly so that the broadcast stays part of the instruction.
TMLC_INLINE void dot_pair(v16& sum, w16 pairs, const void* p) {
    typedef int32_t four_bytes __attribute__((aligned(1), may_alias));
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*static_cast<const four_bytes*>(p)));
}
#else
void dot_pair(v16& sum, w16 pairs, const void* p);  // nobody has Factors::bf16_pairs here
#endif

inline Factors factors_of(KV cache, bool portable) {
    if (cache == KV::bf16) return bf16_dots && !portable ? Factors::bf16_pairs : Factors::bf16;
    return cache == KV::f32 ? Factors::f32 : Factors::int8;
}
// Bytes of one factor for a cache of floats.
constexpr int64_t factor_bytes(Factors f) { return f == Factors::bf16_pairs ? 2 : 4; }

// Stores sixteen factors, rounded for the form, as elements [at, at + 16) of a row; returns them as rounded.
template <Factors F>
TMLC_INLINE v16 store_factors(void* row, int64_t at, v16 x) {
#if defined(__AVX512BF16__)
    if constexpr (F == Factors::bf16_pairs) {
        const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(row) + at), half);
        const auto words = reinterpret_cast<w16>(_mm512_maskz_cvtepu16_epi32(0xffff, half));  // see load_f16
        return bits_to_float(detail::shift_left(words, 16));
    }
#endif
    const v16 rounded = F == Factors::bf16 ? round_bf16(x) : x;
    store(static_cast<float*>(row) + at, rounded);
    return rounded;
}

// Lane 0 of the lanes folded by an operation whose order does not matter (largest numbers, sums of integers).
template <class V, class F>
TMLC_INLINE V fold_lanes(V v, const F& f) {
#if defined(__AVX512F__)
    v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return f(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
    int32_t lanes[16];
    std::memcpy(lanes, &v, sizeof lanes);
    for (int half = 8; half > 0; half /= 2) {
        V a, b;
        int32_t low[16] = {}, high[16] = {};
        std::memcpy(low, lanes, static_cast<size_t>(4 * half));
        std::memcpy(high, lanes + half, static_cast<size_t>(4 * half));
        std::memcpy(&a, low, sizeof low);
        std::memcpy(&b, high, sizeof high);
        a = f(a, b);
        std::memcpy(lanes, &a, sizeof lanes);
    }
    std::memcpy(&v, lanes, sizeof lanes);
    return v;
#endif
}
template <class T, class V>
TMLC_INLINE T first_lane(V v) {
    T lane;
    std::memcpy(&lane, &v, sizeof lane);
    return lane;
}

TMLC_INLINE w16 load_words(const void* p) { w16 v; detail::load(v, static_cast<const int32_t*>(p)); return v; }
TMLC_INLINE w16 load_words_n(const void* p, int64_t count) { return float_to_bits(load_n(static_cast<const float*>(p), count)); }
TMLC_INLINE v16 even_of(w16 pairs) { return bits_to_float(detail::shift_left(pairs, 16)); }
TMLC_INLINE v16 odd_of(w16 pairs) { return bits_to_float(pairs & splat_int(static_cast<int32_t>(0xffff0000u))); }

// out[t][b] = q[t] . keys of block b, over the d columns in order. FETCH: the keys of the next B blocks are asked for
// meanwhile, which lie behind these unless a ring wraps here.
template <Factors F, int T, int B, bool FETCH>
__attribute__((noinline)) void float_scores(const uint8_t* q, int64_t q_bytes, int64_t d, const uint8_t* const* k, float* out,
                                            int64_t out_stride) {
    const int64_t ahead = T <= 4 ? 2560 * B : 32 * d * B;  // bytes; few rows are through with a block too soon
    v16 acc[T][B];
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = zero16();
    if constexpr (F == Factors::f32) {
        for (int64_t i = 0; i < d; ++i) {
            v16 key[B];
            TMLC_UNROLL for (int b = 0; b < B; ++b) key[b] = load(reinterpret_cast<const float*>(k[b]) + 16 * i);
            TMLC_UNROLL for (int t = 0; t < T; ++t) {
                const v16 x = splat(reinterpret_cast<const float*>(q + t * q_bytes)[i]);
                TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = fma(x, key[b], acc[t][b]);
            }
        }
    } else {
        const auto step = [&](const w16(&key)[B], int64_t i, bool whole) TMLC_LAMBDA_INLINE {
            if constexpr (F == Factors::bf16_pairs) {
                (void)whole;
                TMLC_UNROLL for (int t = 0; t < T; ++t)
                    TMLC_UNROLL for (int b = 0; b < B; ++b) dot_pair(acc[t][b], key[b], q + t * q_bytes + 4 * i);
            } else {
                TMLC_UNROLL for (int t = 0; t < T; ++t) {
                    const float* x = reinterpret_cast<const float*>(q + t * q_bytes) + 2 * i;
                    const v16 x0 = splat(x[0]), x1 = splat(x[1]);
                    TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = fma(x0, even_of(key[b]), acc[t][b]);
                    if (whole)
                        TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = fma(x1, odd_of(key[b]), acc[t][b]);
                }
            }
        };
        for (int64_t i = 0; i < d / 2; ++i) {
            w16 key[B];
            TMLC_UNROLL for (int b = 0; b < B; ++b) {
                if constexpr (FETCH) __builtin_prefetch(k[b] + 64 * i + ahead, 0, 2);
                key[b] = load_words(k[b] + 64 * i);
            }
            step(key, i, true);
        }
        if (d % 2 != 0) {  // the last column by itself
            w16 key[B];
            TMLC_UNROLL for (int b = 0; b < B; ++b) detail::widen(key[b], reinterpret_cast<const uint16_t*>(k[b] + d / 2 * 64));
            step(key, d / 2, false);
        }
    }
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int b = 0; b < B; ++b) store(out + t * out_stride + b * 16, acc[t][b]);
}

// acc[t] += sum over positions [first, last) of weight[t][e_at + j] * value j, in order; C vectors of 16 columns. v is
// where position 0 lies. EDGE: first or last may be odd, then the other half of a pair of bf16 is not looked at. FETCH:
// values that come soon are asked for meanwhile.
template <Factors F, int T, int C, bool EDGE, bool FETCH>
__attribute__((noinline)) void float_values(const float* e, int64_t e_stride, int64_t e_at, const uint8_t* v, int64_t dv,
                                            int64_t column, int64_t first, int64_t last, float* acc, int64_t acc_stride) {
    constexpr int64_t ahead = 8192;
    v16 sum[T][C];
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int c = 0; c < C; ++c) sum[t][c] = load(acc + t * acc_stride + column + 16 * c);
    if constexpr (F == Factors::f32) {
        for (int64_t j = first; j < last; ++j) {
            const float* row = reinterpret_cast<const float*>(v) + j * dv + column;
            v16 value[C];
            TMLC_UNROLL for (int c = 0; c < C; ++c) value[c] = C == 1 ? load_n(row, dv - column) : load(row + 16 * c);
            TMLC_UNROLL for (int t = 0; t < T; ++t) {
                const v16 x = splat(e[t * e_stride + e_at + j]);
                TMLC_UNROLL for (int c = 0; c < C; ++c) sum[t][c] = fma(x, value[c], sum[t][c]);
            }
        }
    } else {
        for (int64_t j = first / 2; j < (last + 1) / 2; ++j) {
            const uint8_t* row = v + (j * dv + column) * 4;
            w16 value[C];
            TMLC_UNROLL for (int c = 0; c < C; ++c) {
                if constexpr (FETCH) __builtin_prefetch(row + 64 * c + ahead, 0, 2);
                value[c] = C == 1 ? load_words_n(row, dv - column) : load_words(row + 64 * c);
            }
            if constexpr (EDGE) {
                const uint32_t mask = (2 * j >= first ? 0xffffu : 0u) | (2 * j + 1 < last ? 0xffff0000u : 0u);
                TMLC_UNROLL for (int c = 0; c < C; ++c) value[c] = value[c] & splat_int(static_cast<int32_t>(mask));
            }
            if constexpr (F == Factors::bf16_pairs) {
                TMLC_UNROLL for (int t = 0; t < T; ++t) {
                    const auto* row_of = reinterpret_cast<const uint8_t*>(e + t * e_stride);
                    TMLC_UNROLL for (int c = 0; c < C; ++c) dot_pair(sum[t][c], value[c], row_of + 2 * e_at + 4 * j);
                }
            } else {
                TMLC_UNROLL for (int t = 0; t < T; ++t) {
                    const float* x = e + t * e_stride + e_at + 2 * j;
                    const v16 x0 = splat(x[0]), x1 = splat(x[1]);
                    TMLC_UNROLL for (int c = 0; c < C; ++c) sum[t][c] = fma(x0, even_of(value[c]), sum[t][c]);
                    TMLC_UNROLL for (int c = 0; c < C; ++c) sum[t][c] = fma(x1, odd_of(value[c]), sum[t][c]);
                }
            }
        }
    }
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int c = 0; c < C; ++c) store(acc + t * acc_stride + column + 16 * c, sum[t][c]);
}

}  // namespace tmlc
