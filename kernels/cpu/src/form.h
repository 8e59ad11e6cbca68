// The forms of a packed weight, and how many bytes each takes (docs/plan-format.md, "Packed weights").
#pragma once
#include <initializer_list>

#include "op.h"

namespace tmlc {

enum class Form { none, f32, bf16, int8, int4, int4_64 };

// How far ahead of a line that a tile reads it asks for others, in bytes (0: not at all): into the first-level cache, and into
// the second.
struct Ahead {
    int64_t first, second;
};
// For tiles of so many rows. Measured on Zen 4 from large pages (docs/performance.md): between the tile that only waits for memory
// and the one that computes so long on a line that requests for the first level keep its few buffers, asking straight for the first
// level reads up to 1.4 times as fast.
constexpr Ahead ahead_of(Form f, [[maybe_unused]] int rows) {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    const bool between = f == Form::bf16 ? rows >= 2 && rows <= 6 : f == Form::int8 ? rows >= 2 && rows <= 4
                         : (f == Form::int4 || f == Form::int4_64) && rows == 1;
    if (between) return {4096, 0};
#endif
    return f == Form::int8 && rows > 1 ? Ahead{768, 7168} : Ahead{0, 5120};
}
template <Form F, int R>
inline __attribute__((always_inline)) void ask_ahead(const void* p) {
    constexpr Ahead ahead = ahead_of(F, R);
    if constexpr (ahead.first > 0) __builtin_prefetch(static_cast<const char*>(p) + ahead.first);
    if constexpr (ahead.second > 0) __builtin_prefetch(static_cast<const char*>(p) + ahead.second, 0, 2);
}
constexpr int64_t quant_group = 32;  // inputs that share a scale of the activations (and of int8 and int4 weights)
constexpr int64_t quant_run = 4;     // groups of weights whose codes, then scales, then zero points lie together
constexpr int64_t int8_bytes = 16 * 32 + 32;              // 16 rows x 32 codes, 16 float16 scales
constexpr int64_t int4_bytes = 16 * 16 + 32 + 16;         // 16 rows x 32 nibbles, 16 scales, 16 zero points
constexpr int64_t int4_64_bytes = 2 * 16 * 16 + 32 + 16;  // the same with 64 nibbles to a row

// Columns of the plan's tensor for one block of 16 output rows over k inputs (bytes for the quantised forms).
inline int64_t form_cols(Form f, int64_t k) {
    const int64_t groups = (k + quant_group - 1) / quant_group;
    switch (f) {
        case Form::f32: return k * 16;
        case Form::bf16: return (k + 1) / 2 * 2 * 16;
        case Form::int8: return groups * int8_bytes;
        case Form::int4: return groups * int4_bytes;
        case Form::int4_64: return (groups + 1) / 2 * int4_64_bytes;
        case Form::none: break;
    }
    return 0;
}
// Which form a tensor of this dtype and width has. Quantised ones are bytes, and no two forms are equally wide: the
// widths of G groups are 544 G, 304 G and 560 ceil(G / 2), which never meet.
inline Form form_of(DType dtype, int64_t cols, int64_t k) {
    const auto fits = [&](Form f) { return form_cols(f, k) == cols; };
    if (dtype == DType::f32 && fits(Form::f32)) return Form::f32;
    if (dtype == DType::bf16 && fits(Form::bf16)) return Form::bf16;
    if (dtype != DType::u8) return Form::none;
    for (Form f : {Form::int8, Form::int4, Form::int4_64})
        if (fits(f)) return f;
    return Form::none;
}
inline int64_t form_item_bytes(Form f) { return f == Form::f32 ? 4 : f == Form::bf16 ? 2 : 1; }

}  // namespace tmlc
