// What follows a product on the columns that a thread has just made, before another thread or call sees them: a learned
// scale, a short convolution over a range of the columns, an addition (docs/plan-format.md, "Epilogues").
//
// Columns are independent of each other, so there is no barrier: `linear` and `moe` write plain sums into their output
// and call `apply` on them while they are in the cache. All arithmetic is that of scale_by, short_conv, scale and add.
#pragma once
#include <algorithm>

#include "check.h"
#include "op.h"
#include "vec.h"

namespace tmlc {

constexpr int64_t epilogue_scale = 4, epilogue_conv = 8, epilogue_add = 16;  // flags of linear and moe
constexpr int64_t epilogue_flags = epilogue_scale | epilogue_conv | epilogue_add;
constexpr int64_t max_taps = 64;

inline int epilogue_operands(int64_t flags) {
    return ((flags & epilogue_scale) ? 1 : 0) + ((flags & epilogue_conv) ? 2 : 0) + ((flags & epilogue_add) ? 1 : 0);
}

// The operands of an epilogue begin at t[first]: [scale] [taps tail] [addend], as the flags say.
inline const char* check_epilogue(const Call& c, int first, int64_t flags, int64_t start, int64_t residual, double level) {
    const TensorInfo& out = *c.t[0];
    const bool conv = (flags & epilogue_conv) != 0;
    TMLC_REQUIRE(residual == 0 || (conv && residual == 1), "residual must be 0 or 1");
    TMLC_REQUIRE(finite(level) && (conv || level == 1), "the level must be finite, and 1 without a convolution");
    TMLC_REQUIRE(conv || start == 0, "columns of a convolution that is not there");
    if (flags & epilogue_scale) {
        const TensorInfo& scale = *c.t[first++];
        TMLC_REQUIRE(is_f32(scale) && scale.fixed(1, 1), "the scale must be f32 [1,1]");
    }
    if (conv) {
        const TensorInfo &taps = *c.t[first], &tail = *c.t[first + 1];
        first += 2;
        TMLC_REQUIRE(is_f32(taps) && taps.a == 0 && taps.b >= 2 && taps.b <= max_taps, "the taps must be f32 [k,c]");
        TMLC_REQUIRE(start >= 0 && start < out.cols && taps.cols <= out.cols - start, "a convolution outside the columns");
        TMLC_REQUIRE(is_f32(tail) && tail.space == Space::slot && tail.fixed(taps.b - 1, taps.cols),
                     "the tail must be f32 [k-1,c] in the slot");
        TMLC_REQUIRE(out.b == 0, "a convolution needs rows that belong to positions");
    }
    if (flags & epilogue_add) {
        const TensorInfo& addend = *c.t[first];
        TMLC_REQUIRE(is_f32(addend) && same_shape(addend, out), "the addend must be f32 of the output's shape");
    }
    return nullptr;
}

class Epilogue {
public:
    Epilogue(const RunArgs& a, int first, int64_t flags, int64_t start, int64_t residual, double level)
        : a_(a), start_(start), residual_(residual == 1), level_(static_cast<float>(level)) {
        if (flags & epilogue_scale) scale_ = first++;
        if (flags & epilogue_conv) taps_ = first, first += 2;
        if (flags & epilogue_add) addend_ = first;
        any_ = (flags & epilogue_flags) != 0;
    }
    bool any() const { return any_; }

    // Columns begin ... end - 1 of the output, of all rows, hold plain sums.
    void apply(int64_t begin, int64_t end) const {
        end = std::min(end, a_.t[0].cols);
        if (scale_ >= 0) scale(begin, end);
        const int64_t from = taps_ < 0 ? end : std::clamp(start_, begin, end);
        const int64_t to = taps_ < 0 ? end : std::clamp(start_ + a_.t[taps_].cols, begin, end);
        for (int s = 0; from < to && s < a_.n_spans; ++s)
            for (int64_t c = from; c < to; c += 16) {
                if (a_.t[taps_].rows == 4) convolve<4>(s, c, to - c);
                else convolve<0>(s, c, to - c);
            }
        if (addend_ >= 0) {
            add(begin, from);
            add(std::max(from, to), end);
        }
    }

private:
    void scale(int64_t begin, int64_t end) const {
        const Operand& out = a_.t[0];
        const v16 s = splat(*a_.t[scale_].f32());
        for (int64_t r = 0; r < out.rows; ++r)
            for (int64_t c = begin; c < end; c += 16) {
                float* p = out.f32(r) + c;
                store_n(p, s * load_n(p, end - c), end - c);
            }
    }
    void add(int64_t begin, int64_t end) const {
        const Operand &out = a_.t[0], &addend = a_.t[addend_];
        for (int64_t r = 0; r < out.rows; ++r)
            for (int64_t c = begin; c < end; c += 16) {
                float* p = out.f32(r) + c;
                store_n(p, load_n(addend.f32(r) + c, end - c) + load_n(p, end - c), end - c);
            }
    }
    // Up to sixteen columns of one session: its rows in order, with the k - 1 sums before each in `past`. TAPS 0: any.
    template <int TAPS>
    void convolve(int s, int64_t c, int64_t count) const {
        const Operand out = a_.at(0, s), &w = a_.t[taps_], tail = a_.at(taps_ + 1, s);
        const Operand addend = addend_ < 0 ? Operand{} : a_.at(addend_, s);
        const int64_t k = TAPS > 0 ? TAPS : w.rows, at = c - start_;
        v16 past[TAPS > 0 ? TAPS - 1 : max_taps - 1], taps[TAPS > 0 ? TAPS : max_taps];
        for (int64_t j = 0; j < k; ++j) taps[j] = load_n(w.f32(j) + at, count);
        for (int64_t j = 0; j < k - 1; ++j) past[j] = load_n(tail.f32(j) + at, count);
        for (int64_t t = 0; t < out.rows; ++t) {
            float* p = out.f32(t) + c;
            const v16 now = load_n(p, count);
            v16 sum = zero16();
            for (int64_t j = 0; j < k - 1; ++j) sum = fma(taps[j], past[j], sum);
            sum = fma(taps[k - 1], now, sum);
            if (residual_) sum = sum + now;
            if (level_ != 1.0f) sum = splat(level_) * sum;
            if (addend_ >= 0) sum = load_n(addend.f32(t) + c, count) + sum;
            store_n(p, sum, count);
            for (int64_t j = 0; j + 1 < k - 1; ++j) past[j] = past[j + 1];
            past[k - 2] = now;
        }
        for (int64_t j = 0; j < k - 1; ++j) store_n(tail.f32(j) + at, past[j], count);
    }

    const RunArgs& a_;
    int scale_ = -1, taps_ = -1, addend_ = -1;
    int64_t start_;
    bool residual_, any_;
    float level_;
};

}  // namespace tmlc
