// Dense operations: copies, lookups, norms and elementwise work.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "check.h"
#include "op.h"
#include "vec.h"

namespace tmlc {
namespace {

// ---- elementwise ----------------------------------------------------------------------------------------------------

// out[r][c..c+16) = f(r, c, count) for every row and every sixteen columns, tails included.
template <class F>
int each16(const RunArgs& a, int64_t cost, F f) {
    const Operand& out = a.t[0];
    a.par.split(out.rows, out.rows * out.cols * cost, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            float* o = out.f32(r);
            for (int64_t c = 0; c < out.cols; c += 16) {
                const int64_t count = out.cols - c;
                store_n(o + c, f(r, c, count), count);
            }
        }
    });
    return ok;
}

template <class F>
int unary(const RunArgs& a, int64_t cost, F f) {
    const Operand& x = a.t[1];
    return each16(a, cost, [&](int64_t r, int64_t c, int64_t count) { return f(load_n(x.f32(r) + c, count)); });
}
template <class F>
int binary(const RunArgs& a, int64_t cost, F f) {
    const Operand &x = a.t[1], &y = a.t[2];
    return each16(a, cost, [&](int64_t r, int64_t c, int64_t count) {
        return f(load_n(x.f32(r) + c, count), load_n(y.f32(r) + c, count));
    });
}

// `operands` float32 tensors of one shape, the output first.
const char* same_f32(const Call& c, int operands) {
    for (int j = 0; j < operands; ++j) {
        TMLC_REQUIRE(is_f32(*c.t[j]), "operands must be f32");
        TMLC_REQUIRE(same_shape(*c.t[j], *c.t[0]), "operands must have one shape");
    }
    return nullptr;
}
const char* check_unary(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 0), "wrong number of operands");
    return same_f32(c, 2);
}
const char* check_binary(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 0), "wrong number of operands");
    return same_f32(c, 3);
}
const char* check_ternary(const Call& c) {
    TMLC_REQUIRE(arity(c, 4, 0, 0), "wrong number of operands");
    return same_f32(c, 4);
}
const char* check_add_scaled(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 1), "wrong number of operands");
    return same_f32(c, 3);
}
const char* check_scale(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 1), "wrong number of operands");
    return same_f32(c, 2);
}
const char* check_clamp(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 2), "wrong number of operands");
    TMLC_REQUIRE(std::fabs(c.f[0]) <= FLT_MAX && std::fabs(c.f[1]) <= FLT_MAX && c.f[0] <= c.f[1], "lo..hi must be a range of f32 numbers");
    return same_f32(c, 2);
}
const char* check_scale_by(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 0), "wrong number of operands");
    TMLC_REQUIRE(is_f32(*c.t[2]) && c.t[2]->fixed(1, 1), "the scale must be f32 [1,1]");
    return same_f32(c, 2);
}
const char* check_add_row(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 1, 0), "wrong number of operands");
    const TensorInfo& rows = *c.t[2];
    TMLC_REQUIRE(is_f32(rows) && rows.a == 0 && rows.cols == c.t[0]->cols, "the rows do not fit");
    TMLC_REQUIRE(c.i[0] >= 0 && c.i[0] < rows.b, "no such row");
    return same_f32(c, 2);
}

int run_add(const RunArgs& a) { return binary(a, 1, [](v16 x, v16 y) { return x + y; }); }
int run_mul(const RunArgs& a) { return binary(a, 1, [](v16 x, v16 y) { return x * y; }); }
int run_add_scaled(const RunArgs& a) {
    const v16 alpha = splat(static_cast<float>(a.f[0]));
    return binary(a, 1, [&](v16 x, v16 y) { return fma(alpha, y, x); });
}
int run_scale(const RunArgs& a) {
    const v16 alpha = splat(static_cast<float>(a.f[0]));
    return unary(a, 1, [&](v16 x) { return alpha * x; });
}
int run_clamp(const RunArgs& a) {
    const v16 lo = splat(static_cast<float>(a.f[0])), hi = splat(static_cast<float>(a.f[1]));
    return unary(a, 1, [&](v16 x) { return min16(max16(x, lo), hi); });  // a NaN is neither below nor above
}
int run_scale_by(const RunArgs& a) {
    const v16 s = splat(*a.t[2].f32());
    return unary(a, 1, [&](v16 x) { return s * x; });
}
int run_add_row(const RunArgs& a) {
    const Operand& x = a.t[1];
    const float* row = a.t[2].f32(a.i[0]);
    return each16(a, 1, [&](int64_t r, int64_t c, int64_t count) {
        return load_n(x.f32(r) + c, count) + load_n(row + c, count);
    });
}
int run_silu(const RunArgs& a) { return unary(a, 8, [](v16 x) { return silu16(x); }); }
int run_gelu(const RunArgs& a) {
    return unary(a, 16, [](v16 x) {
        const v16 half = x * splat(0.5f);
        return fma(half, erf16(x * splat(0.707106781f)), half);
    });
}
int run_swiglu(const RunArgs& a) { return binary(a, 8, [](v16 g, v16 u) { return silu16(g) * u; }); }
int run_modulate(const RunArgs& a) {
    const Operand &x = a.t[1], &scale = a.t[2], &shift = a.t[3];
    return each16(a, 1, [&](int64_t r, int64_t c, int64_t count) {
        return fma(load_n(x.f32(r) + c, count), splat(1.0f) + load_n(scale.f32(r) + c, count),
                   load_n(shift.f32(r) + c, count));
    });
}

// ---- copy and lookup ------------------------------------------------------------------------------------------------

const char* check_copy(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 0), "wrong number of operands");
    TMLC_REQUIRE(c.t[0]->dtype == c.t[1]->dtype && same_shape(*c.t[0], *c.t[1]), "a copy keeps dtype and shape");
    return nullptr;
}
int run_copy(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1];
    const int64_t size = size_of(out.dtype);
    if (out.data == x.data) return ok;  // the same tensor: the executor admits no other overlap
    for (int64_t r = 0; r < out.rows; ++r)
        std::memcpy(out.u8() + r * out.stride * size, x.u8() + r * x.stride * size, static_cast<size_t>(out.cols * size));
    return ok;
}

const char* check_embedding(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 0), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &ids = *c.t[1], &table = *c.t[2];
    TMLC_REQUIRE(is_f32(out), "the output must be f32");
    TMLC_REQUIRE(ids.dtype == DType::i32 && ids.cols == 1 && ids.same_rows(out), "ids must be i32 [n,1]");
    TMLC_REQUIRE(is_float(table) && table.a == 0 && table.cols == out.cols, "the table does not fit");
    return nullptr;
}
int run_embedding(const RunArgs& a) {
    const Operand &out = a.t[0], &ids = a.t[1], &table = a.t[2];
    for (int64_t r = 0; r < out.rows; ++r) {
        const int64_t id = *ids.i32(r);
        if (id < 0 || id >= table.rows) return bad_index;
        float* o = out.f32(r);
        if (table.dtype == DType::f32) {
            std::memcpy(o, table.f32(id), static_cast<size_t>(out.cols) * 4);
        } else {
            const uint16_t* t = table.bf16(id);
            for (int64_t c = 0; c < out.cols; c += 16)
                store_n(o + c, load_bf16_n(t + c, out.cols - c), out.cols - c);
        }
    }
    return ok;
}

// ---- norms ----------------------------------------------------------------------------------------------------------

// out = x * rsqrt(mean(x^2) + eps) * w over d columns. Four accumulators over fixed columns, so the sum has one order.
void normalise(float* out, const float* x, const float* w, int64_t d, float eps) {
    v16 s[4] = {zero16(), zero16(), zero16(), zero16()};
    int64_t c = 0;
    for (; c + 64 <= d; c += 64)
        for (int j = 0; j < 4; ++j) {
            const v16 v = load(x + c + 16 * j);
            s[j] = fma(v, v, s[j]);
        }
    for (int j = 0; c < d; c += 16, ++j) {
        const v16 v = load_n(x + c, d - c);
        s[j] = fma(v, v, s[j]);
    }
    const float sum = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
    const v16 r = splat(1.0f / std::sqrt(sum / static_cast<float>(d) + eps));
    for (c = 0; c < d; c += 16)
        store_n(out + c, load_n(x + c, d - c) * r * load_n(w + c, d - c), d - c);
}

const char* check_rms_norm(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 1), "wrong number of operands");
    const TensorInfo& w = *c.t[2];
    TMLC_REQUIRE(is_f32(w) && w.a == 0 && w.b == 1, "the weight must be f32 [1,d]");
    TMLC_REQUIRE(c.t[0]->cols % w.cols == 0, "the columns are not groups of the weight's");
    return same_f32(c, 2);
}
int run_rms_norm(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &w = a.t[2];
    const float eps = static_cast<float>(a.f[0]);
    const int64_t groups = out.cols / w.cols;
    a.par.split(out.rows * groups, out.rows * out.cols * 2, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t r = u / groups, c = u % groups * w.cols;
            normalise(out.f32(r) + c, x.f32(r) + c, w.f32(), w.cols, eps);
        }
    });
    return ok;
}

const char* check_add_rms_norm(const Call& c) {
    TMLC_REQUIRE(arity(c, 5, 0, 1), "wrong number of operands");
    TMLC_REQUIRE(is_f32(*c.t[4]) && c.t[4]->fixed(1, c.t[0]->cols), "the weight must be f32 [1,d]");
    return same_f32(c, 4);
}
int run_add_rms_norm(const RunArgs& a) {
    const Operand &sum = a.t[0], &out = a.t[1], &x = a.t[2], &residual = a.t[3], &w = a.t[4];
    const float eps = static_cast<float>(a.f[0]);
    a.par.split(out.rows, out.rows * out.cols * 3, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            float* s = sum.f32(r);
            for (int64_t c = 0; c < sum.cols; c += 16) {
                const int64_t count = sum.cols - c;
                store_n(s + c, load_n(x.f32(r) + c, count) + load_n(residual.f32(r) + c, count), count);
            }
            normalise(out.f32(r), s, w.f32(), sum.cols, eps);
        }
    });
    return ok;
}

const OpDef table[] = {
    {"copy", check_copy, no_scratch, run_copy, 1, true},
    {"embedding", check_embedding, no_scratch, run_embedding, 1},
    {"rms_norm", check_rms_norm, no_scratch, run_rms_norm, 1, true},
    {"add_rms_norm", check_add_rms_norm, no_scratch, run_add_rms_norm, 2, true},
    {"add", check_binary, no_scratch, run_add, 1, true},
    {"mul", check_binary, no_scratch, run_mul, 1, true},
    {"add_scaled", check_add_scaled, no_scratch, run_add_scaled, 1, true},
    {"scale", check_scale, no_scratch, run_scale, 1, true},
    {"clamp", check_clamp, no_scratch, run_clamp, 1, true},
    {"scale_by", check_scale_by, no_scratch, run_scale_by, 1, true},
    {"add_row", check_add_row, no_scratch, run_add_row, 1, true},
    {"silu", check_unary, no_scratch, run_silu, 1, true},
    {"gelu", check_unary, no_scratch, run_gelu, 1, true},
    {"swiglu", check_binary, no_scratch, run_swiglu, 1, true},
    {"modulate", check_ternary, no_scratch, run_modulate, 1, true},
};

}  // namespace

OpTable dense_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
