// Small words that the kernels' `check` functions share. Each check returns nullptr or one line that says what is wrong.
#pragma once
#include <cmath>

#include "op.h"

namespace tmlc {

#define TMLC_REQUIRE(condition, message) \
    do { \
        if (!(condition)) return message; \
    } while (0)

inline bool arity(const Call& c, int t, int i, int f) { return c.n_t == t && c.n_i == i && c.n_f == f; }
inline bool is_f32(const TensorInfo& t) { return t.dtype == DType::f32; }
inline bool is_float(const TensorInfo& t) { return t.dtype == DType::f32 || t.dtype == DType::bf16; }
inline bool same_shape(const TensorInfo& a, const TensorInfo& b) { return a.same_rows(b) && a.cols == b.cols; }
inline bool dense(const TensorInfo& t) { return t.stride == t.cols || (t.a == 0 && t.b <= 1); }  // rows without gaps
inline bool finite(double v) { return std::isfinite(v); }

inline int64_t blocks16(int64_t m) { return (m + 15) / 16; }
// Columns of one packed block of 16 output rows over k inputs (docs/plan-format.md, "Packed weights").
inline int64_t packed_cols(DType t, int64_t k) { return (t == DType::bf16 ? (k + 1) / 2 * 2 : k) * 16; }
// A packed matrix that has `blocks` blocks of 16 rows over k inputs.
inline bool packed(const TensorInfo& w, int64_t blocks, int64_t k) {
    return is_float(w) && w.fixed(blocks, packed_cols(w.dtype, k)) && dense(w);
}
constexpr int64_t max_experts = 1 << 16, max_choices = 1 << 10;
inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

constexpr int64_t position_end = int64_t{1} << 62;
inline const char* check_position(const TensorInfo& t) {
    TMLC_REQUIRE(t.space == Space::slot && t.dtype == DType::i64 && t.fixed(1, 1), "the position must be i64 [1,1] in the slot");
    return nullptr;
}

inline int64_t no_scratch(const Call&, int) { return 0; }

}  // namespace tmlc
