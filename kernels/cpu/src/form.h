// The forms of a packed weight, and how many bytes each takes (docs/plan-format.md, "Packed weights").
#pragma once
#include <initializer_list>

#include "op.h"

namespace tmlc {

enum class Form { none, f32, bf16, int8, int4, int4_64 };

// What a product asks the memory for while it reads p: the line so many bytes further on, into the second-level cache.
// Asked into the first level instead, requests wait for its few buffers: measured on Zen 4, 18 GB/s instead of 24.
constexpr int64_t read_ahead = 5120;
constexpr int64_t read_further = 7168;  // int8 with two rows and more, which takes longer on a line; int4 gains nothing
inline __attribute__((always_inline)) void ask_ahead(const void* p, int64_t ahead = read_ahead) {
    __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 2);
}
// And from there into the first level, for tiles that compute too long on a line to look far ahead by themselves. Any
// distance of 640 to 900 bytes did as well (int8, 2 to 8 rows: 1.1 to 1.3 times as fast); 512 and 1024 gained nothing.
inline __attribute__((always_inline)) void ask_near(const void* p) {
    __builtin_prefetch(static_cast<const char*>(p) + 768);
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
