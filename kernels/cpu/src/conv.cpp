// short_conv: a causal depthwise convolution over a few rows, whose last rows stay in the session's slot.
#include "conv.h"

#include "check.h"
#include "vec.h"

namespace tmlc {

const char* check_short_conv(const Call& c) {
    TMLC_REQUIRE(arity(c, 4, 1, 0), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &w = *c.t[2], &tail = *c.t[3];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && same_shape(out, x), "activations must be f32 of one shape");
    TMLC_REQUIRE(is_f32(w) && w.a == 0 && w.b >= 1 && w.cols == x.cols, "the weight must be f32 [k,c]");
    TMLC_REQUIRE(is_f32(tail) && tail.space == Space::slot && tail.fixed(w.b - 1, x.cols),
                 "the tail must be f32 [k-1,c] in the slot");
    TMLC_REQUIRE(c.i[0] == 0 || c.i[0] == 1, "residual must be 0 or 1");
    return nullptr;
}

// Threads take columns, each with its own part of the tail; taps are summed oldest first.
int run_short_conv(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &w = a.t[2], &tail = a.t[3];
    const int64_t k = w.rows, past = k - 1, n = x.rows;
    const bool residual = a.i[0] == 1;
    a.par.split(blocks16(out.cols), n * out.cols * k, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t c = b * 16, count = out.cols - c;
            const auto row = [&](int64_t t) {  // t < 0: before this call
                return load_n((t < 0 ? tail.f32(t + past) : x.f32(t)) + c, count);
            };
            for (int64_t t = 0; t < n; ++t) {
                v16 sum = zero16();
                for (int64_t j = 0; j < k; ++j) sum = fma(load_n(w.f32(j) + c, count), row(t - past + j), sum);
                if (residual) sum = sum + row(t);
                store_n(out.f32(t) + c, sum, count);
            }
            for (int64_t i = 0; i < past; ++i) store_n(tail.f32(i) + c, row(n - past + i), count);
        }
    });
    return ok;
}

}  // namespace tmlc
