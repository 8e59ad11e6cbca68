// Products with quantised weights: activations as signed bytes per group of 32, sums of a group exact in integers.
//
// A row of activations is rounded once per call to whole numbers of -127..127 times a float scale for each group of 32.
// The dot product of a group is then an exact integer on every instruction set: by `vpdpbusd` or `sdot` where there is
// such, by 16-bit multiply-add elsewhere. Groups are added up in float32, in order.
#pragma once
#include <utility>

#include "form.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include "quant_neon.h"
#endif

namespace tmlc {

constexpr float quant_peak = 127.0f;

// One row of quantised activations: a record for each group, so that one pointer reaches all of it. A record holds the
// 32 codes (bytes where the machine multiplies those, 16-bit words elsewhere), the float scale, and `below`: what one unit of the
// weights' zero point adds to the sum, which is -sum of the codes (for int8 its zero point is in it: -128 times the sum).
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int64_t quant_code_bytes = 32;
#else
constexpr int64_t quant_code_bytes = 64;
#endif
constexpr int64_t quant_record = quant_code_bytes + 8;

TMLC_INLINE float record_scale(const uint8_t* record) {
    float v;
    std::memcpy(&v, record + quant_code_bytes, 4);
    return v;
}
TMLC_INLINE int32_t record_below(const uint8_t* record) {
    int32_t v;
    std::memcpy(&v, record + quant_code_bytes + 4, 4);
    return v;
}

// Rounds `count` values (at least one; of which the first 32 are looked at) into one record, for weights of this form (quant.cpp).
void quantise_group(const float* x, int64_t count, Form form, uint8_t* record);

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
// Sixteen zero points (bytes, in sixteenths) as integers.
TMLC_INLINE w16 load_zeros(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<w16>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    uint16_t wide[16];
    for (int i = 0; i < 16; ++i) wide[i] = p[i];
    w16 w;
    detail::widen(w, wide);
    return w;
#endif
}

// v[r] = the whole number sum((code - 128) * activation) for int8, sum((16 code - zero) * activation) for int4, over one
// group of 32, for 16 output rows and R rows of activations. Every one is below 2^24: exact as a float too. Codes are
// unsigned; quad q holds [16 rows][4 inputs], nibbles the quads q (low) and q + 4 (high) in one byte.
#if defined(__AVX512VNNI__)

// sums += codes x four signed bytes at p, broadcast. Spelled in assembly so that the broadcast stays part of the
// instruction: gcc otherwise makes the vectors once for all blocks of a tile, and keeps them on the stack.
[[nodiscard]] TMLC_INLINE __m512i dot_bytes(__m512i sums, __m512i codes, const uint8_t* p) {
    typedef int32_t four_bytes __attribute__((aligned(1), may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const four_bytes*>(p)));
    return sums;
}

// Row r of the activations is at row[r] + at. The offset is made opaque again and again, or gcc keeps a sum of the two for each row
// in registers that it does not have.
template <bool NIBBLES, int... R>
TMLC_INLINE void group_sums(const uint8_t* w, const uint8_t* zeros, const uint8_t* const (&row)[sizeof...(R)], int64_t at,
                            v16 (&v)[sizeof...(R)], std::integer_sequence<int, R...>) {
    __m512i sums[sizeof...(R)];
    if constexpr (NIBBLES) {  // codes come as 16 code: in the high half of a byte, where half of them are already
        const __m512i zero = reinterpret_cast<__m512i>(load_zeros(zeros));
        ((sums[R] = _mm512_madd_epi16(zero, _mm512_set1_epi32(record_below(row[R] + at)))), ...);
    } else {
        ((sums[R] = _mm512_set1_epi32(record_below(row[R] + at))), ...);
    }
#pragma GCC unroll 8
    for (int q = 0; q < (NIBBLES ? 4 : 8); ++q) {
        if constexpr (sizeof...(R) > 2) asm("" : "+r"(at));
        const __m512i codes = _mm512_loadu_si512(w + q * 64);
        if constexpr (NIBBLES) {
            const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
            const __m512i low = _mm512_and_si512(_mm512_maskz_slli_epi16(~__mmask32{0}, codes, 4), mask);
            const __m512i high = _mm512_and_si512(codes, mask);
            ((sums[R] = dot_bytes(sums[R], low, row[R] + at + q * 4)), ...);
            ((sums[R] = dot_bytes(sums[R], high, row[R] + at + q * 4 + 16)), ...);
        } else {
            ((sums[R] = dot_bytes(sums[R], codes, row[R] + at + q * 4)), ...);
        }
    }
    ((v[R] = to_float(reinterpret_cast<w16>(sums[R]))), ...);
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
        int32x4_t sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = vdupq_n_s32(0);
        detail::dot_bytes_neon<NIBBLES>(w, x[r], sums);
        int32_t lanes[16];
        for (int i = 0; i < 4; ++i) vst1q_s32(lanes + 4 * i, sums[i]);
        detail::load(total[r], lanes);
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

#if !defined(__AVX512VNNI__)
template <bool NIBBLES, int... R>
TMLC_INLINE void group_sums(const uint8_t* w, const uint8_t* zeros, const uint8_t* const (&row)[sizeof...(R)], int64_t at,
                            v16 (&v)[sizeof...(R)], std::integer_sequence<int, R...>) {
    const uint8_t* const record[] = {row[R] + at...};
    w16 total[sizeof...(R)];
    dot_group<sizeof...(R), NIBBLES>(w, record, total);
    if constexpr (NIBBLES) {
        const v16 zero = to_float(load_zeros(zeros));
        ((v[R] = fma(zero, splat(static_cast<float>(record_below(record[R]))), to_float(total[R]) * splat(16.0f))), ...);
    } else {
#if defined(__ARM_FEATURE_DOTPROD)
        ((v[R] = to_float(total[R])), ...);  // signed bytes: their zero point is in them
#else
        ((v[R] = to_float(total[R] + splat_int(record_below(record[R])))), ...);
#endif
    }
}
#endif

// One tile of R rows by one block, its results stored as [R][16] floats. x points to quantised rows.
template <Form F, int... R>
TMLC_INLINE void quant_rows(const float* const* x, const void* w, int64_t k, float* out, std::integer_sequence<int, R...> all) {
    constexpr bool nibbles = F != Form::int8;
    constexpr int halves = F == Form::int4_64 ? 2 : 1;         // groups of activations to a group of weights
    constexpr int64_t codes = (nibbles ? 256 : 512) * halves;  // bytes of a group: its codes; with scales and zero points
    constexpr int64_t whole = codes + (nibbles ? 48 : 32);
    const uint8_t *run = static_cast<const uint8_t*>(w), *const row[] = {reinterpret_cast<const uint8_t*>(x[R])...};
    v16 acc[] = {(static_cast<void>(R), zero16())...};
    int64_t at = 0;  // of the group in every row: one register for all of them
    for (int64_t left = (k + quant_group - 1) / quant_group; left > 0;) {
        const int64_t need = (left + halves - 1) / halves, count = need < quant_run ? need : quant_run;
        for (int64_t g = 0; g < count; ++g) {
            const v16 scale = load_f16(run + count * codes + g * 32);
            for (int half = 0; half < halves; ++half, --left) {
                if (halves > 1 && left == 0) break;
                for (int64_t line = 0; line < whole / halves; line += 64)
                    ask_ahead<F, sizeof...(R)>(run + g * whole + half * (whole / halves) + line);
                v16 v[sizeof...(R)];
                group_sums<nibbles>(run + g * codes + half * 256, run + count * (codes + 32) + g * 16, row, at, v, all);
                asm volatile("" : "+r"(at));  // or gcc keeps a running pointer for each row, in vector registers
                ((acc[R] = fma(splat(record_scale(row[R] + at)), v[R] * scale, acc[R])), ...);
                at += quant_record;
            }
        }
        run += count * whole;
    }
    (store(out + R * 16, nibbles ? acc[R] * splat(0.0625f) : acc[R]), ...);
}
template <int R, Form F>
void quant_tile(const float* const* x, const void* w, int64_t k, float* out) {
    quant_rows<F>(x, w, k, out, std::make_integer_sequence<int, R>());
}

}  // namespace tmlc
