// Rounds rows of activations to the integers that products with quantised weights read (quant.h).
#include "quant.h"

#include <cmath>

namespace tmlc {
namespace {

constexpr float least_peak = 1e-30f;  // a group whose largest magnitude is not above counts as zero

TMLC_INLINE void finish(uint8_t* record, float scale, int32_t sum, Form form) {
    const int32_t below = form == Form::int8 ? -128 * sum : -sum;
    std::memcpy(record + quant_code_bytes, &scale, 4);
    std::memcpy(record + quant_code_bytes + 4, &below, 4);
}

#if defined(__AVX512VNNI__)

// One value of all sixteen lanes; each step folds the upper half of what is left onto the lower.
template <class V, class Op>
TMLC_INLINE auto fold(V v, Op op) {
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

TMLC_INLINE void group(v16 a, v16 b, Form form, uint8_t* record) {
    constexpr int infinite_or_nan = 0x99;
    const auto larger = [](v16 p, v16 q) TMLC_LAMBDA_INLINE { return v16(_mm512_maskz_max_ps(0xffff, p, q)); };
    const float peak = fold(larger(abs16(a), abs16(b)), larger);
    const bool finite = (_mm512_fpclass_ps_mask(a, infinite_or_nan) | _mm512_fpclass_ps_mask(b, infinite_or_nan)) == 0;
    const v16 to_code = splat(finite && peak > least_peak ? quant_peak / peak : 0.0f);
    __m512i first = _mm512_maskz_cvtps_epi32(0xffff, a * to_code), second = _mm512_maskz_cvtps_epi32(0xffff, b * to_code);
    if (!finite) first = second = _mm512_setzero_si512();
    _mm_storeu_si128(reinterpret_cast<__m128i*>(record), _mm512_maskz_cvtsepi32_epi8(0xffff, first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(record + 16), _mm512_maskz_cvtsepi32_epi8(0xffff, second));
    const int32_t sum = fold(reinterpret_cast<w16>(first) + reinterpret_cast<w16>(second), [](w16 p, w16 q) { return p + q; });
    const float scale = !finite ? NAN : peak > least_peak ? peak / quant_peak : 0.0f;
    finish(record, scale, sum, form);
}

#else

TMLC_INLINE void group(v16 a, v16 b, Form form, uint8_t* record) {
    float x[quant_group];
    store(x, a);
    store(x + 16, b);
    float peak = 0.0f, strange = 0.0f;  // v - v is 0 for numbers, NaN for infinities and NaN, which must reach the result
    for (float v : x) {
        const float size = std::fabs(v);
        peak = size > peak ? size : peak;
        strange += v - v;
    }
    const bool finite = strange == 0.0f, plain = finite && peak > least_peak;
    const float to_code = plain ? quant_peak / peak : 0.0f;
    int16_t codes[quant_group] = {};
    int32_t sum = 0;
    for (int64_t i = 0; i < quant_group && plain; ++i) {
        codes[i] = static_cast<int16_t>(std::lrintf(x[i] * to_code));  // ties to even, as the vector instruction rounds
        sum += codes[i];
    }
    std::memcpy(record, codes, sizeof codes);
    finish(record, plain ? peak / quant_peak : finite ? 0.0f : NAN, sum, form);
}

#endif

}  // namespace

void quantise_group(const float* x, int64_t count, Form form, uint8_t* record) {
    group(load_n(x, count), count > 16 ? load_n(x + 16, count - 16) : zero16(), form, record);
}

}  // namespace tmlc
