// Products with quantised weights: activations as 15-bit integers per group of 32, sums of a group exact in integers.
//
// A row of activations is rounded once per call to whole numbers of -32512..32512 times a float scale for each group of
// 32 (rounding error: 1.5e-5 of the group's largest value, so outputs are those of the dequantised weights to about that
// much). The dot product of a group is then an exact integer on every instruction set: by `vpdpbusd` or
// `sdot` on the two bytes of each activation where there are such, by 16-bit multiply-add elsewhere. Groups are added up in float32, in order.
#pragma once
#include "form.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include "quant_neon.h"
#endif

// Codes of activations are kept as two bytes apart (upper ones first) where bytes are multiplied, else as 16-bit words.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define TMLC_BYTE_CODES 1
#endif

namespace tmlc {

constexpr float quant_peak = 32512.0f;  // 127 * 256: both bytes of a code stay signed bytes

// One row of quantised activations: codes of all groups (64 bytes each), then scales, then sums of codes.
struct QuantRow {
    int64_t groups;
    explicit QuantRow(int64_t k) : groups((k + quant_group - 1) / quant_group) {}
    int64_t bytes() const { return (groups * (64 + 8) + 63) / 64 * 64; }
    int64_t scales() const { return groups * 64; }
    int64_t sums() const { return groups * 68; }
};

void quantise_row(const float* x, int64_t k, uint8_t* out);  // quant.cpp; out holds QuantRow(k).bytes()

// Quantises the rows row(0) .. row(rows - 1) of k values into `out`, one behind the other.
template <class Row>
void quantise_rows(Parallel& par, int64_t rows, int64_t k, uint8_t* out, Row row) {
    const int64_t bytes = QuantRow(k).bytes();
    par.split(rows, rows * k * 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) quantise_row(row(r), k, out + r * bytes);
    });
}

namespace detail {

TMLC_INLINE f32n to_float(i32n v) { return __builtin_convertvector(v, f32n); }
template <class T> TMLC_INLINE auto to_float(Two<T> v) {
    auto lo = to_float(v.lo);
    return Two<decltype(lo)>{lo, to_float(v.hi)};
}

}  // namespace detail

TMLC_INLINE v16 to_float(w16 v) { return detail::to_float(v); }

// Sixteen float16 numbers (finite ones: what infinities and NaN become is not defined).
TMLC_INLINE v16 load_f16(const uint8_t* p) {
#if defined(__AVX512F__)
    // The masked form: gcc 12 takes the undefined source of the plain one for a mistake of ours (here and below).
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    uint16_t half[16];
    std::memcpy(half, p, sizeof half);
    w16 h;
    detail::widen(h, half);
    const w16 sign = detail::shift_left(h & splat_int(0x8000), 16);
    const v16 size = bits_to_float(detail::shift_left(h & splat_int(0x7fff), 13)) * splat(5.192296858534828e33f);  // 2^112
    return bits_to_float(float_to_bits(size) | sign);
#endif
}
// Sixteen zero points, stored in sixteenths.
TMLC_INLINE v16 load_zeros(const uint8_t* p) {
#if defined(__AVX512F__)
    const v16 v = to_float(reinterpret_cast<w16>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
    uint16_t wide[16];
    for (int i = 0; i < 16; ++i) wide[i] = p[i];
    w16 w;
    detail::widen(w, wide);
    const v16 v = to_float(w);
#endif
    return v * splat(0.0625f);
}

// total[r] = the sums over one group of 32 of code x activation, for 16 output rows and R rows of activations. Codes are
// unsigned; quad q holds [16 rows][4 inputs], nibbles the quads q (low) and q + 4 (high) in one byte.
#if defined(__AVX512VNNI__)

// sums += codes x four signed bytes at p, broadcast. Spelled in assembly so that the broadcast stays part of the
// instruction: gcc otherwise makes the vectors once for all blocks of a tile, and keeps them on the stack.
TMLC_INLINE void dot_bytes(__m512i& sums, __m512i codes, const uint8_t* p) {
    typedef int32_t four_bytes __attribute__((aligned(1), may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const four_bytes*>(p)));
}

template <int R, bool NIBBLES>
TMLC_INLINE void dot_group(const uint8_t* w, const uint8_t* const (&x)[R], w16 (&total)[R]) {
    __m512i hi[R], lo[R];
    const uint8_t* from[R];
    for (int r = 0; r < R; ++r) {
        hi[r] = lo[r] = _mm512_setzero_si512();
        from[r] = x[r];
        asm volatile("" : "+r"(from[r]));  // or the addresses of all quads are kept (on the stack) between blocks
    }
    const auto quad = [&](__m512i codes, int q) TMLC_LAMBDA_INLINE {
        for (int r = 0; r < R; ++r) {
            dot_bytes(hi[r], codes, from[r] + q * 4);
            dot_bytes(lo[r], codes, from[r] + 32 + q * 4);
        }
    };
    for (int q = 0; q < (NIBBLES ? 4 : 8); ++q) {
        const __m512i codes = _mm512_loadu_si512(w + q * 64);
        if constexpr (NIBBLES) {
            const __m512i mask = _mm512_set1_epi8(15);
            quad(_mm512_and_si512(codes, mask), q);
            quad(_mm512_and_si512(_mm512_maskz_srli_epi16(~__mmask32{0}, codes, 4), mask), q + 4);
        } else {
            quad(codes, q);
        }
    }
    for (int r = 0; r < R; ++r)
        total[r] = (reinterpret_cast<w16>(hi[r]) << 8) + reinterpret_cast<w16>(lo[r]);
}

#elif defined(__AVX2__)

template <int R, bool NIBBLES>
TMLC_INLINE void dot_group(const uint8_t* w, const uint8_t* const (&x)[R], w16 (&total)[R]) {
    i32n parts[2][R];
    for (int half = 0; half < 2; ++half) {  // eight output rows at a time: two sums of pairs for each row of x
        __m256i a[R], b[R];
        for (int r = 0; r < R; ++r) a[r] = b[r] = _mm256_setzero_si256();
        const auto quad = [&](__m256i codes, int q) TMLC_LAMBDA_INLINE {
            const __m256i first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes));
            const __m256i second = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1));
            for (int r = 0; r < R; ++r) {
                int64_t four;
                std::memcpy(&four, x[r] + q * 8, 8);
                const __m256i values = _mm256_set1_epi64x(four);
                a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(first, values));
                b[r] = _mm256_add_epi32(b[r], _mm256_madd_epi16(second, values));
            }
        };
        for (int q = 0; q < (NIBBLES ? 4 : 8); ++q) {
            const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + q * 64 + half * 32));
            if constexpr (NIBBLES) {
                const __m256i mask = _mm256_set1_epi8(15);
                quad(_mm256_and_si256(codes, mask), q);
                quad(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), q + 4);
            } else {
                quad(codes, q);
            }
        }
        for (int r = 0; r < R; ++r) {
            const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a[r], b[r]), 0xd8);
            parts[half][r] = reinterpret_cast<i32n>(sums);
        }
    }
    for (int r = 0; r < R; ++r) total[r] = {parts[0][r], parts[1][r]};
}

#elif defined(__SSE2__)

template <int R, bool NIBBLES>
TMLC_INLINE void dot_group(const uint8_t* w, const uint8_t* const (&x)[R], w16 (&total)[R]) {
    i32n parts[4][R];
    for (int part = 0; part < 4; ++part) {  // four output rows at a time
        __m128i a[R], b[R];
        for (int r = 0; r < R; ++r) a[r] = b[r] = _mm_setzero_si128();
        const auto quad = [&](__m128i codes, int q) TMLC_LAMBDA_INLINE {
            const __m128i first = _mm_unpacklo_epi8(codes, _mm_setzero_si128());
            const __m128i second = _mm_unpackhi_epi8(codes, _mm_setzero_si128());
            for (int r = 0; r < R; ++r) {
                int64_t four;
                std::memcpy(&four, x[r] + q * 8, 8);
                const __m128i values = _mm_set1_epi64x(four);
                a[r] = _mm_add_epi32(a[r], _mm_madd_epi16(first, values));
                b[r] = _mm_add_epi32(b[r], _mm_madd_epi16(second, values));
            }
        };
        for (int q = 0; q < (NIBBLES ? 4 : 8); ++q) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + q * 64 + part * 16));
            if constexpr (NIBBLES) {
                const __m128i mask = _mm_set1_epi8(15);
                quad(_mm_and_si128(codes, mask), q);
                quad(_mm_and_si128(_mm_srli_epi16(codes, 4), mask), q + 4);
            } else {
                quad(codes, q);
            }
        }
        for (int r = 0; r < R; ++r) {
            const __m128 p = _mm_castsi128_ps(a[r]), s = _mm_castsi128_ps(b[r]);
            const __m128i even = _mm_castps_si128(_mm_shuffle_ps(p, s, 0x88)), odd = _mm_castps_si128(_mm_shuffle_ps(p, s, 0xdd));
            parts[part][r] = reinterpret_cast<i32n>(_mm_add_epi32(even, odd));
        }
    }
    for (int r = 0; r < R; ++r) total[r] = {{parts[0][r], parts[1][r]}, {parts[2][r], parts[3][r]}};
}

#elif defined(__ARM_FEATURE_DOTPROD)

template <int R, bool NIBBLES>
TMLC_INLINE void dot_group(const uint8_t* w, const uint8_t* const (&x)[R], w16 (&total)[R]) {
    for (int r = 0; r < R; ++r) {
        int32x4_t upper[4], lower[4];
        for (int i = 0; i < 4; ++i) upper[i] = lower[i] = vdupq_n_s32(0);
        detail::dot_bytes_neon<NIBBLES>(w, x[r], upper);
        detail::dot_bytes_neon<NIBBLES>(w, x[r] + 32, lower);
        const int32_t back = NIBBLES ? 0 : 128 * (256 * detail::sum_bytes_neon(x[r]) + detail::sum_bytes_neon(x[r] + 32));
        int32_t sums[16];
        for (int i = 0; i < 4; ++i)
            vst1q_s32(sums + 4 * i, vaddq_s32(vaddq_s32(vshlq_n_s32(upper[i], 8), lower[i]), vdupq_n_s32(back)));
        detail::load(total[r], sums);
    }
}

#else

template <int R, bool NIBBLES>
TMLC_INLINE void dot_group(const uint8_t* w, const uint8_t* const (&x)[R], w16 (&total)[R]) {
    for (int r = 0; r < R; ++r) {
        int16_t values[quant_group];
        std::memcpy(values, x[r], sizeof values);
        int32_t sums[16] = {};
        for (int q = 0; q < 8; ++q)
            for (int row = 0; row < 16; ++row)
                for (int j = 0; j < 4; ++j) {
                    const int code = NIBBLES ? w[(q & 3) * 64 + row * 4 + j] >> (q & 4) & 15 : w[q * 64 + row * 4 + j];
                    sums[row] += code * values[q * 4 + j];
                }
        detail::load(total[r], sums);
    }
}

#endif

#if defined(__AVX512VNNI__)
constexpr int quant_tile_rows = 8;
constexpr int quant_blocks_for_rows[quant_tile_rows + 1] = {0, 8, 4, 4, 4, 2, 2, 2, 1};
#elif defined(__AVX2__)
constexpr int quant_tile_rows = 4;
constexpr int quant_blocks_for_rows[quant_tile_rows + 1] = {0, 4, 2, 1, 1};
#else
constexpr int quant_tile_rows = 2;
constexpr int quant_blocks_for_rows[quant_tile_rows + 1] = {0, 2, 1};
#endif

// One tile of R rows by B blocks, its results stored as [R][B][16] floats. x points to quantised rows.
template <int R, int B, Form F>
__attribute__((noinline)) void quant_tile(const float* const* x, const void* const* w, int64_t k, float* out) {
    const QuantRow row(k);
    constexpr int64_t step = F == Form::int8 ? int8_bytes : F == Form::int4 ? int4_bytes : int4_64_bytes;
    constexpr int64_t ahead = R <= 2 ? 1024 : 0;  // bytes; rows that share weights hide the latency by themselves
    const uint8_t *codes[R], *base[B];
    const float* scales[R];
    const int32_t* sums[R];
    for (int r = 0; r < R; ++r) {
        codes[r] = reinterpret_cast<const uint8_t*>(x[r]);
        scales[r] = reinterpret_cast<const float*>(codes[r] + row.scales());
        sums[r] = reinterpret_cast<const int32_t*>(codes[r] + row.sums());
    }
    for (int b = 0; b < B; ++b) base[b] = static_cast<const uint8_t*>(w[b]);
    v16 acc[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) acc[r][b] = zero16();
    for (int64_t g = 0; g < row.groups; ++g) {
        const uint8_t* group[R];
        for (int r = 0; r < R; ++r) group[r] = codes[r] + g * 64;
        for (int b = 0; b < B; ++b) {
            const uint8_t* p = base[b] + (F == Form::int4_64 ? g / 2 * step : g * step);
            const uint8_t* packed = F == Form::int4_64 ? p + g % 2 * 256 : p;
            const uint8_t* after = p + (F == Form::int4 ? 256 : 512);
            if constexpr (ahead > 0)
                for (int64_t line = 0; line < (F == Form::int8 ? 9 : 5); ++line)
                    __builtin_prefetch(packed + ahead + line * 64);
            w16 total[R];
            dot_group<R, F != Form::int8>(packed, group, total);
            const v16 scale = load_f16(after);
            if constexpr (F == Form::int8) {
                for (int r = 0; r < R; ++r) {
                    const v16 v = to_float(total[r] - splat_int(128 * sums[r][g])) * scale;
                    acc[r][b] = fma(splat(scales[r][g]), v, acc[r][b]);
                }
            } else {
                const v16 below = zero16() - load_zeros(after + 32);
                for (int r = 0; r < R; ++r) {
                    const v16 v = fma(below, splat(static_cast<float>(sums[r][g])), to_float(total[r])) * scale;
                    acc[r][b] = fma(splat(scales[r][g]), v, acc[r][b]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) store(out + (r * B + b) * 16, acc[r][b]);
}

}  // namespace tmlc
