// Rounds activations to the bf16 numbers that products with bf16 weights read, or hands them to quant.cpp (rows.h).
#include "rows.h"

namespace tmlc {

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
    store(reinterpret_cast<float*>(group), round_bf16(a));
    store(reinterpret_cast<float*>(group) + 16, round_bf16(b));
}

}  // namespace tmlc
