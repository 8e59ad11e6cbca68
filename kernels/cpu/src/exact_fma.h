// A multiply-add that rounds once, for four floats of a machine without such an instruction (SSE2).
//
// The product of two floats is exact in double, and the sum with the third is rounded to 53 bits; rounding that to
// float32 gives what one rounding would give, unless the double is a tie between two floats or the result is subnormal.
// Those are rare and go through the C library, whose fmaf rounds once whatever the machine.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>

#include <cmath>

namespace tmlc::detail {

typedef float f32x4 __attribute__((vector_size(16)));

__attribute__((noinline)) inline f32x4 fma_by_library(f32x4 a, f32x4 b, f32x4 c) {
    f32x4 r;
    for (int i = 0; i < 4; ++i) r[i] = std::fma(a[i], b[i], c[i]);
    return r;
}

inline __attribute__((always_inline)) f32x4 exact_fma(f32x4 a, f32x4 b, f32x4 c) {
    const auto wide = [](f32x4 v, bool high) __attribute__((always_inline)) {
        return _mm_cvtps_pd(high ? _mm_movehl_ps(v, v) : __m128(v));
    };
    const __m128d low = _mm_add_pd(_mm_mul_pd(wide(a, false), wide(b, false)), wide(c, false));
    const __m128d high = _mm_add_pd(_mm_mul_pd(wide(a, true), wide(b, true)), wide(c, true));
    const __m128 r = _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
    // The 29 bits of a double that a float32 does not have: exactly half of a unit there?
    const __m128i rest = _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0x88));
    const __m128i tie = _mm_cmpeq_epi32(_mm_and_si128(rest, _mm_set1_epi32(0x1fffffff)), _mm_set1_epi32(0x10000000));
    const __m128i exponent = _mm_and_si128(_mm_castps_si128(r), _mm_set1_epi32(0x7f800000));
    const __m128i small = _mm_cmpeq_epi32(exponent, _mm_setzero_si128());
    const __m128i doubt = _mm_or_si128(tie, _mm_andnot_si128(_mm_castps_si128(_mm_cmpeq_ps(r, _mm_setzero_ps())), small));
    if (__builtin_expect(_mm_movemask_ps(_mm_castsi128_ps(doubt)) != 0, 0)) return fma_by_library(a, b, c);
    return r;
}

}  // namespace tmlc::detail
#endif
