// Rounding new keys and values into the caches, once, when they are written.
#include "attn_cache.h"

#include <cmath>
#include <cstring>

#include "vec.h"

namespace tmlc {
namespace {

// int8: code = round(x * (127 / peak)) + 128 and scale = peak / 127 (codes 128 and scale 0 where peak is below 1e-30; a
// row with an infinity or NaN has the scale NaN). code_at(i) is where the code of column i belongs.
template <class Place>
void put_codes(uint8_t* block, int64_t lane, int64_t codes, const float* x, int64_t d, const Place& code_at) {
    float peak = 0;
    bool finite_row = true;
    for (int64_t i = 0; i < d; ++i) {
        const float size = std::fabs(x[i]);
        finite_row &= size <= 3.4028235e38f;
        if (size > peak) peak = size;
    }
    const bool flat = !finite_row || peak < 1e-30f;
    const float to_code = flat ? 0.0f : 127.0f / peak;
    const float scale = !finite_row ? NAN : flat ? 0.0f : peak / 127.0f;
    for (int64_t i = 0; i < d; ++i)
        block[code_at(i)] = static_cast<uint8_t>(flat ? 128 : 128 + static_cast<int>(std::nearbyintf(x[i] * to_code)));
    std::memcpy(block + codes + 4 * lane, &scale, 4);
}

}  // namespace

void put_key(KV form, const HeadCache& cache, int64_t at, const float* x, int64_t d) {
    uint8_t* block = cache.k + at / 16 * cache.k_block;
    const int64_t lane = at % 16;
    if (form == KV::f32) {
        float* p = reinterpret_cast<float*>(block) + lane;
        for (int64_t i = 0; i < d; ++i) p[16 * i] = x[i];
    } else if (form == KV::bf16) {
        uint16_t* p = reinterpret_cast<uint16_t*>(block);
        for (int64_t i = 0; i + 1 < d; i += 2) {
            p[16 * i + 2 * lane] = float_to_bf16(x[i]);
            p[16 * i + 2 * lane + 1] = float_to_bf16(x[i + 1]);
        }
        if (d % 2 != 0) p[16 * (d - 1) + lane] = float_to_bf16(x[d - 1]);
    } else {
        put_codes(block, lane, 16 * round_up(d, 4), x, d, [&](int64_t i) { return i / 4 * 64 + lane * 4 + i % 4; });
    }
}

void put_value(KV form, const HeadCache& cache, int64_t at, const float* x, int64_t dv) {
    uint8_t* block = cache.v + at / 16 * cache.v_block;
    const int64_t lane = at % 16, quads = round_up(dv, 4);
    if (form == KV::f32) {
        std::memcpy(block + 4 * lane * dv, x, static_cast<size_t>(4 * dv));
    } else if (form == KV::bf16) {
        uint16_t* p = reinterpret_cast<uint16_t*>(block) + lane / 2 * 2 * dv + lane % 2;
        for (int64_t i = 0; i < dv; ++i) p[2 * i] = float_to_bf16(x[i]);
    } else {
        put_codes(block, lane, 16 * quads, x, dv, [&](int64_t i) { return (lane / 4 * quads + i) * 4 + lane % 4; });
    }
}

}  // namespace tmlc
