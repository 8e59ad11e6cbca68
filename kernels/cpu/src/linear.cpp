// Rows times packed weights, and what follows on the columns while they are in the cache.
#include "check.h"
#include "epilogue.h"
#include "gemm.h"
#include "op.h"
#include "vec.h"

namespace tmlc {
namespace {

// Ints: none, or flags (1: there is a bias; the rest epilogue.h's), and of the epilogue start and residual.
bool has_bias(int n_t, const int64_t* i, int n_i) { return n_i == 3 ? (i[0] & 1) != 0 : n_t == 4; }
int epilogue_at(bool bias) { return bias ? 4 : 3; }

const char* check_linear(const Call& c) {
    const bool after = c.n_i == 3 && c.n_f == 1;
    TMLC_REQUIRE(after || (c.n_i == 0 && c.n_f == 0 && (c.n_t == 3 || c.n_t == 4)), "wrong number of operands");
    const bool bias = has_bias(c.n_t, c.i, c.n_i);
    if (after) {
        TMLC_REQUIRE(c.i[0] >= 0 && (c.i[0] & ~(epilogue_flags | 1)) == 0, "unknown flags");
        TMLC_REQUIRE(c.n_t == epilogue_at(bias) + epilogue_operands(c.i[0]), "wrong number of operands");
    }
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &w = *c.t[2];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && out.same_rows(x), "activations must be f32 with one number of rows");
    TMLC_REQUIRE(packed(w, blocks16(out.cols), x.cols), "the weight is not packed for these columns");
    TMLC_REQUIRE(!bias || (is_f32(*c.t[3]) && c.t[3]->fixed(1, out.cols)), "the bias must be f32 [1,m]");
    return after ? check_epilogue(c, epilogue_at(bias), c.i[0], c.i[1], c.i[2], c.f[0]) : nullptr;
}
int64_t scratch_linear(const Call& c, int) {
    const TensorInfo &x = *c.t[1], &w = *c.t[2];
    return x.rows(c.max_n) * most_row_bytes(form_of(w.dtype, w.cols, x.cols), x.cols);
}
int run_linear(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &w = a.t[2];
    const bool biased = has_bias(a.n_t, a.i, a.n_i), after = a.n_i == 3;
    const float* bias = biased ? a.t[3].f32() : nullptr;
    const Epilogue epilogue(a, epilogue_at(biased), after ? a.i[0] : 0, after ? a.i[1] : 0, after ? a.i[2] : 0,
                            after ? a.f[0] : 1);
    const Packed packed_w(w, x.cols);
    const bool rounded = packed_w.rows.rounded();
    const int64_t row_bytes = packed_w.rows.bytes();
    if (rounded) packed_w.rows.round_rows(a.par, x.rows, a.scratch, [&](int64_t r) { return x.f32(r); });
    // The epilogue takes so many blocks at a time: whole strips of tiles of every shape, little enough for the cache.
    constexpr int64_t chunk = 64, strip = 24;
    a.par.split(w.rows, out.rows * out.cols * x.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t b0 = begin; b0 < end;) {
            const int64_t b1 = epilogue.any() ? std::min(end, b0 + strip) : end;
            for (int64_t r0 = 0; r0 < out.rows; r0 += chunk) {
                const float* rows[chunk];
                const int64_t count = out.rows - r0 < chunk ? out.rows - r0 : chunk;
                for (int64_t r = 0; r < count; ++r)
                    rows[r] = rounded ? reinterpret_cast<const float*>(a.scratch + (r0 + r) * row_bytes) : x.f32(r0 + r);
                for_tiles<1>(rows, count, b0, b1, packed_w, 0, [&](int64_t r, int64_t b, auto& sums) {
                    const int64_t left = out.cols - b * 16;
                    v16 v = load(sums[0]);
                    if (bias != nullptr) v = v + load_n(bias + b * 16, left);
                    store_n(out.f32(r0 + r) + b * 16, v, left);
                });
            }
            if (epilogue.any()) epilogue.apply(b0 * 16, b1 * 16);
            b0 = b1;
        }
    });
    return ok;
}

const OpDef table[] = {
    {"linear", check_linear, scratch_linear, run_linear, 1, false, true},
};

}  // namespace

OpTable linear_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
