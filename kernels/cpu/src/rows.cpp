// Rounds activations to the bf16 numbers that products with bf16 weights read, or hands them to quant.cpp (rows.h).
#include "rows.h"

namespace tmlc {
namespace {

// To nearest, ties to even; a NaN stays one.
TMLC_INLINE v16 to_bf16(v16 x) {
    const w16 u = float_to_bits(x);
    const w16 odd = detail::shift_right(u, 16) & splat_int(1);
    const v16 rounded = bits_to_float((u + splat_int(0x7fff) + odd) & splat_int(static_cast<int32_t>(0xffff0000u)));
    return choose(x <= x, rounded, x);
}

}  // namespace

void RowLayout::round_group(const float* x, int64_t count, uint8_t* group) const {
    if (rounding == Rounding::codes) return quantise_group(x, count, form, group);
    const v16 a = load_n(x, count), b = count > 16 ? load_n(x + 16, count - 16) : zero16();
#if defined(__AVX512BF16__)
    if (rounding == Rounding::bf16_pairs) {  // the instruction takes denormals for zero, as the products do
        const __m512bh pairs = _mm512_cvtne2ps_pbh(b, a);
        std::memcpy(group, &pairs, sizeof pairs);
        return;
    }
#endif
    store(reinterpret_cast<float*>(group), to_bf16(a));
    store(reinterpret_cast<float*>(group) + 16, to_bf16(b));
}

}  // namespace tmlc
