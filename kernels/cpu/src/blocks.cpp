// What Inkling-2 adds: mixing of residual blocks, L2 clips, soft caps, and a short convolution with computed taps.
#include <cmath>
#include <cstring>

#include "check.h"
#include "vec.h"

namespace tmlc {
namespace {

constexpr int64_t max_blocks = 64, max_queries = 8, max_kernel = 64;

// Sum over d columns of x·y, in four accumulators over fixed columns: one order whatever else a call holds.
float dot(const float* x, const float* y, int64_t d) {
    v16 s[4] = {zero16(), zero16(), zero16(), zero16()};
    for (int64_t c = 0, j = 0; c < d; c += 16, j = (j + 1) & 3)
        s[j] = fma(load_n(x + c, d - c), load_n(y + c, d - c), s[j]);
    return sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
}

const char* check_same(const Call& c) {
    TMLC_REQUIRE(is_f32(*c.t[0]) && is_f32(*c.t[1]) && same_shape(*c.t[0], *c.t[1]), "x and the output must be f32 of one shape");
    return nullptr;
}

// ---- elementwise ----------------------------------------------------------------------------------------------------

template <class F>
int each(const RunArgs& a, F f) {
    const Operand &out = a.t[0], &x = a.t[1];
    a.par.split(out.rows, out.rows * out.cols * 8, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t c = 0; c < out.cols; c += 16)
                store_n(out.f32(r) + c, f(load_n(x.f32(r) + c, out.cols - c)), out.cols - c);
    });
    return ok;
}
const char* check_sigmoid(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 0), "wrong number of operands");
    return check_same(c);
}
int run_sigmoid(const RunArgs& a) { return each(a, [](v16 x) { return sigmoid16(x); }); }

const char* check_softcap(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 0, 1), "wrong number of operands");
    TMLC_REQUIRE(finite(c.f[0]) && c.f[0] > 0, "the cap must be positive");
    return check_same(c);
}
int run_softcap(const RunArgs& a) {
    const v16 cap = splat(static_cast<float>(a.f[0])), uncap = splat(static_cast<float>(1.0 / a.f[0]));
    return each(a, [&](v16 x) { return cap * tanh16(x * uncap); });
}

// ---- l2_clip --------------------------------------------------------------------------------------------------------

const char* check_l2_clip(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 1, 1) || arity(c, 3, 1, 1), "wrong number of operands");
    if (const char* what = check_same(c)) return what;
    TMLC_REQUIRE(c.i[0] >= 1 && c.i[0] <= c.t[1]->cols && c.t[1]->cols % c.i[0] == 0, "the columns are no heads");
    TMLC_REQUIRE(c.n_t == 2 || (is_f32(*c.t[2]) && c.t[2]->fixed(1, c.t[1]->cols)), "the scale must be f32 [1,c]");
    TMLC_REQUIRE(finite(c.f[0]) && c.f[0] > 0, "the threshold must be positive");
    return nullptr;
}
int run_l2_clip(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1];
    const float* scale = a.n_t == 3 ? a.t[2].f32() : nullptr;
    const float threshold = static_cast<float>(a.f[0]);
    const int64_t heads = a.i[0], d = x.cols / heads;
    a.par.split(out.rows * heads, out.rows * out.cols * 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t r = u / heads, at = u % heads * d;
            float* o = out.f32(r) + at;
            for (int64_t c = 0; c < d; c += 16) {
                v16 v = load_n(x.f32(r) + at + c, d - c);
                if (scale != nullptr) v = v * load_n(scale + at + c, d - c);
                store_n(o + c, v, d - c);
            }
            const float length = std::sqrt(dot(o, o, d));
            const v16 factor = splat(std::fmin(1.0f, threshold / (length + 1e-6f)));
            for (int64_t c = 0; c < d; c += 16) store_n(o + c, load_n(o + c, d - c) * factor, d - c);
        }
    });
    return ok;
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

const char* check_concat_columns(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 0), "wrong number of operands");
    for (int j = 0; j < 3; ++j) TMLC_REQUIRE(is_f32(*c.t[j]) && c.t[j]->same_rows(*c.t[0]), "operands must be f32 with one number of rows");
    TMLC_REQUIRE(c.t[0]->cols == c.t[1]->cols + c.t[2]->cols, "the output must have the columns of both");
    return nullptr;
}
int run_concat_columns(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &y = a.t[2];
    for (int64_t r = 0; r < out.rows; ++r) {
        std::memcpy(out.f32(r), x.f32(r), static_cast<size_t>(x.cols) * 4);
        std::memcpy(out.f32(r) + x.cols, y.f32(r), static_cast<size_t>(y.cols) * 4);
    }
    return ok;
}

const char* check_mix_blocks(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 1), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &queries = *c.t[2];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && out.same_rows(x), "x and the output must be f32 with one number of rows");
    TMLC_REQUIRE(is_f32(queries) && queries.a == 0 && queries.b >= 1 && queries.b <= max_queries, "queries must be f32 [q,d]");
    TMLC_REQUIRE(queries.cols <= 1 << 24 && out.cols == queries.b * queries.cols, "the output must be [n,q*d]");
    TMLC_REQUIRE(x.cols % queries.cols == 0 && x.cols / queries.cols <= max_blocks, "x must be [n,m*d], of at most 64 blocks");
    TMLC_REQUIRE(finite(c.f[0]) && c.f[0] >= 0, "eps must not be negative");
    return nullptr;
}
int run_mix_blocks(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &queries = a.t[2];
    const int64_t d = queries.cols, blocks = x.cols / d;
    const float eps = static_cast<float>(a.f[0]), scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
    a.par.split(out.rows, out.rows * x.cols * (1 + 2 * queries.rows), [&](int64_t begin, int64_t end, int) {
        float inverse[max_blocks], share[max_blocks];
        for (int64_t r = begin; r < end; ++r) {
            const float* row = x.f32(r);
            for (int64_t b = 0; b < blocks; ++b)
                inverse[b] = 1.0f / std::sqrt(dot(row + b * d, row + b * d, d) / static_cast<float>(d) + eps);
            for (int64_t q = 0; q < queries.rows; ++q) {
                float top = -INFINITY, sum = 0.0f;
                for (int64_t b = 0; b < blocks; ++b) {
                    share[b] = dot(queries.f32(q), row + b * d, d) * inverse[b] * scale;
                    top = share[b] > top ? share[b] : top;
                }
                for (int64_t b = 0; b < blocks; b += 16)
                    store_n(share + b, exp16(load_n(share + b, blocks - b) - splat(top)), blocks - b);
                for (int64_t b = 0; b < blocks; ++b) sum += share[b];
                for (int64_t b = 0; b < blocks; ++b) share[b] = share[b] / sum * inverse[b];
                for (int64_t c = 0; c < d; c += 16) {
                    v16 mixed = zero16();
                    for (int64_t b = 0; b < blocks; ++b) mixed = fma(splat(share[b]), load_n(row + b * d + c, d - c), mixed);
                    store_n(out.f32(r) + q * d + c, mixed, d - c);
                }
            }
        }
    });
    return ok;
}

// ---- dynamic_conv ---------------------------------------------------------------------------------------------------

const char* check_dynamic_conv(const Call& c) {
    TMLC_REQUIRE(arity(c, 5, 1, 0), "wrong number of operands");
    const TensorInfo &w = *c.t[2], &taps = *c.t[3], &tail = *c.t[4], &x = *c.t[1];
    if (const char* what = check_same(c)) return what;
    TMLC_REQUIRE(is_f32(w) && w.a == 0 && w.b >= 1 && w.b <= max_kernel && w.cols == x.cols, "the weight must be f32 [k,c]");
    TMLC_REQUIRE(is_f32(taps) && taps.same_rows(x) && taps.cols % w.b == 0, "taps must be f32 [n,H*k]");
    TMLC_REQUIRE(x.cols % (taps.cols / w.b) == 0, "the columns are no heads");
    TMLC_REQUIRE(is_f32(tail) && tail.space == Space::slot && tail.fixed(w.b - 1, x.cols), "the tail must be f32 [k-1,c] in the slot");
    TMLC_REQUIRE(c.i[0] == 0 || c.i[0] == 1, "residual must be 0 or 1");
    return nullptr;
}
// Threads take columns, each with its own part of the tail; taps are summed newest first.
int run_dynamic_conv(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &w = a.t[2], &taps = a.t[3], &tail = a.t[4];
    const int64_t k = w.rows, past = k - 1, n = x.rows, width = x.cols / (taps.cols / k);
    const bool residual = a.i[0] == 1;
    a.par.split((out.cols + 15) / 16, n * out.cols * k * 2, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t c = b * 16, count = out.cols - c;
            const auto row = [&](int64_t t) {  // t < 0: before this call
                return load_n((t < 0 ? tail.f32(t + past) : x.f32(t)) + c, count);
            };
            int64_t head[16];  // where the taps of each lane begin
            for (int64_t lane = 0; lane < 16; ++lane) head[lane] = (lane < count ? (c + lane) / width : c / width) * k;
            for (int64_t t = 0; t < n; ++t) {
                v16 sum = zero16();
                for (int64_t j = 0; j < k; ++j) {
                    float dynamic[16];
                    for (int lane = 0; lane < 16; ++lane) dynamic[lane] = taps.f32(t)[head[lane] + j];
                    sum = fma(load_n(w.f32(j) + c, count) + load(dynamic), row(t - j), sum);
                }
                if (residual) sum = sum + row(t);
                store_n(out.f32(t) + c, sum, count);
            }
            for (int64_t i = 0; i < past; ++i) store_n(tail.f32(i) + c, row(n - past + i), count);
        }
    });
    return ok;
}

const OpDef table[] = {
    {"sigmoid", check_sigmoid, no_scratch, run_sigmoid, 1, true},
    {"softcap", check_softcap, no_scratch, run_softcap, 1, true},
    {"l2_clip", check_l2_clip, no_scratch, run_l2_clip, 1, true},
    {"concat_columns", check_concat_columns, no_scratch, run_concat_columns, 1},
    {"mix_blocks", check_mix_blocks, no_scratch, run_mix_blocks, 1},
    {"dynamic_conv", check_dynamic_conv, no_scratch, run_dynamic_conv, 1},
};

}  // namespace

OpTable block_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
