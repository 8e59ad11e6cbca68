// Integer sums of quantised weights by the dot products of ARMv8.2 (sdot): signed bytes times signed bytes, four at a time.
#pragma once
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <cstdint>

namespace tmlc::detail {

// sums[i] += over one group of 32 inputs, for the output rows 4i … 4i+3: (code - 128) · x for bytes, code · x for nibbles.
// Quad q of the codes holds [16 rows][4 inputs], nibbles the quads q (low) and q + 4 (high) in one byte; x are 32 bytes.
template <bool NIBBLES>
inline __attribute__((always_inline)) void dot_bytes_neon(const uint8_t* w, const uint8_t* x, int32x4_t (&sums)[4]) {
    const int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(x)), second = vreinterpretq_s8_u8(vld1q_u8(x + 16));
    for (int i = 0; i < 4; ++i) {
        const auto codes = [&](int q) { return vld1q_u8(w + q * 64 + i * 16); };
        if constexpr (NIBBLES) {
            const auto low = [&](int q) { return vreinterpretq_s8_u8(vandq_u8(codes(q), vdupq_n_u8(15))); };
            const auto high = [&](int q) { return vreinterpretq_s8_u8(vshrq_n_u8(codes(q), 4)); };
            sums[i] = vdotq_laneq_s32(sums[i], low(0), first, 0);
            sums[i] = vdotq_laneq_s32(sums[i], low(1), first, 1);
            sums[i] = vdotq_laneq_s32(sums[i], low(2), first, 2);
            sums[i] = vdotq_laneq_s32(sums[i], low(3), first, 3);
            sums[i] = vdotq_laneq_s32(sums[i], high(0), second, 0);
            sums[i] = vdotq_laneq_s32(sums[i], high(1), second, 1);
            sums[i] = vdotq_laneq_s32(sums[i], high(2), second, 2);
            sums[i] = vdotq_laneq_s32(sums[i], high(3), second, 3);
        } else {
            const auto centred = [&](int q) { return vreinterpretq_s8_u8(veorq_u8(codes(q), vdupq_n_u8(128))); };
            sums[i] = vdotq_laneq_s32(sums[i], centred(0), first, 0);
            sums[i] = vdotq_laneq_s32(sums[i], centred(1), first, 1);
            sums[i] = vdotq_laneq_s32(sums[i], centred(2), first, 2);
            sums[i] = vdotq_laneq_s32(sums[i], centred(3), first, 3);
            sums[i] = vdotq_laneq_s32(sums[i], centred(4), second, 0);
            sums[i] = vdotq_laneq_s32(sums[i], centred(5), second, 1);
            sums[i] = vdotq_laneq_s32(sums[i], centred(6), second, 2);
            sums[i] = vdotq_laneq_s32(sums[i], centred(7), second, 3);
        }
    }
}

}  // namespace tmlc::detail
#endif
