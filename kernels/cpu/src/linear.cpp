// Rows times packed weights.
#include "check.h"
#include "gemm.h"
#include "op.h"
#include "vec.h"

namespace tmlc {
namespace {

const char* check_linear(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 0, 0) || arity(c, 4, 0, 0), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &w = *c.t[2];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && out.same_rows(x), "activations must be f32 with one number of rows");
    TMLC_REQUIRE(packed(w, blocks16(out.cols), x.cols), "the weight is not packed for these columns");
    TMLC_REQUIRE(c.n_t == 3 || (is_f32(*c.t[3]) && c.t[3]->fixed(1, out.cols)), "the bias must be f32 [1,m]");
    return nullptr;
}
int64_t scratch_linear(const Call& c, int) {
    const TensorInfo &x = *c.t[1], &w = *c.t[2];
    return quantised(form_of(w.dtype, w.cols, x.cols)) ? x.rows(c.max_n) * QuantRow(x.cols).bytes() : 0;
}
int run_linear(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &w = a.t[2];
    const float* bias = a.n_t == 4 ? a.t[3].f32() : nullptr;
    const Packed packed_w(w, x.cols);
    const int64_t row_bytes = QuantRow(x.cols).bytes();
    if (packed_w.quantised())
        quantise_rows(a.par, x.rows, x.cols, packed_w.form, a.scratch, [&](int64_t r) { return x.f32(r); });
    constexpr int64_t chunk = 64;
    a.par.split(w.rows, out.rows * out.cols * x.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t r0 = 0; r0 < out.rows; r0 += chunk) {
            const float* rows[chunk];
            const int64_t count = out.rows - r0 < chunk ? out.rows - r0 : chunk;
            for (int64_t r = 0; r < count; ++r)
                rows[r] = packed_w.quantised() ? reinterpret_cast<const float*>(a.scratch + (r0 + r) * row_bytes)
                                               : x.f32(r0 + r);
            for_tiles<1>(rows, count, begin, end, packed_w, 0, [&](int64_t r, int64_t b, auto& sums) {
                const int64_t left = out.cols - b * 16;
                v16 v = load(sums[0]);
                if (bias != nullptr) v = v + load_n(bias + b * 16, left);
                store_n(out.f32(r0 + r) + b * 16, v, left);
            });
        }
    });
    return ok;
}

const OpDef table[] = {
    {"linear", check_linear, scratch_linear, run_linear, 1},
};

}  // namespace

OpTable linear_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
