// Rounds rows of activations to the integers that products with quantised weights read (quant.h).
#include "quant.h"

namespace tmlc {
namespace {

TMLC_INLINE float largest(v16 v) {
    float lanes[16], most = 0.0f;
    store(lanes, v);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
}

}  // namespace

void quantise_row(const float* x, int64_t k, uint8_t* out) {
    const QuantRow row(k);
    float* scales = reinterpret_cast<float*>(out + row.scales());
    int32_t* sums = reinterpret_cast<int32_t*>(out + row.sums());
    const v16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    for (int64_t g = 0; g < row.groups; ++g) {
        const int64_t at = g * quant_group, left = k - at;
        const v16 a = load_n(x + at, left), b = left > 16 ? load_n(x + at + 16, left - 16) : zero16();
        const float peak = largest(max16(abs16(a), abs16(b)));
        float strange[16], doubt = 0.0f;  // v - v is 0 for numbers, NaN for infinities and NaN, which must reach the result
        store(strange, (a - a) + (b - b));
        for (float lane : strange) doubt += lane;
        const bool plain = doubt == 0.0f && peak > 1e-30f;  // below that the group counts as zero
        const v16 to_code = splat(plain ? quant_peak / peak : 0.0f);
        int32_t codes[quant_group] = {};
        if (plain) {
            w16 first = float_to_bits(fma(a, to_code, magic)) - float_to_bits(magic);
            w16 second = float_to_bits(fma(b, to_code, magic)) - float_to_bits(magic);
            detail::store(codes, first);
            detail::store(codes + 16, second);
        }
        int32_t sum = 0;
        for (int32_t code : codes) sum += code;
        uint8_t* to = out + g * 64;
#if defined(TMLC_BYTE_CODES)
        int8_t bytes[64];
        for (int i = 0; i < quant_group; ++i) {
            const int32_t high = (codes[i] + 128) >> 8;
            bytes[i] = static_cast<int8_t>(high);
            bytes[32 + i] = static_cast<int8_t>(codes[i] - high * 256);
        }
        std::memcpy(to, bytes, sizeof bytes);
#else
        int16_t words[quant_group];
        for (int i = 0; i < quant_group; ++i) words[i] = static_cast<int16_t>(codes[i]);
        std::memcpy(to, words, sizeof words);
#endif
        scales[g] = plain ? peak / quant_peak : doubt;
        sums[g] = sum;
    }
}

}  // namespace tmlc
