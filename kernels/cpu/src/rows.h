// The rows of activations that a product reads: as they are, or rounded once a call (docs/plan-format.md, "Determinism").
//
// Rounding goes by groups of 32 inputs, each of which fills its own bytes of the row: whoever has computed 32 columns can
// round them. Inputs beyond k are zero.
#pragma once
#include <algorithm>

#include "form.h"
#include "quant.h"

namespace tmlc {

// Two ways to hold numbers rounded to bf16: the pairs that `vdpbf16ps` multiplies, and floats for a multiply-add.
enum class Rounding { none, bf16_pairs, bf16_floats, codes };

#if defined(__AVX512BF16__)
constexpr bool bf16_dots = true;
#else
constexpr bool bf16_dots = false;
#endif

struct RowLayout {
    int64_t k;
    Form form;
    Rounding rounding;

    // `portable`: only what every instruction set can do.
    RowLayout(Form f, int64_t inputs, bool portable) : k(inputs), form(f) {
        rounding = f == Form::f32 ? Rounding::none : f != Form::bf16 ? Rounding::codes
                   : bf16_dots && !portable ? Rounding::bf16_pairs : Rounding::bf16_floats;
    }
    bool rounded() const { return rounding != Rounding::none; }
    int64_t group_bytes() const {
        switch (rounding) {
            case Rounding::none: return 0;
            case Rounding::bf16_pairs: return quant_group * 2;
            case Rounding::bf16_floats: return quant_group * 4;
            case Rounding::codes: return quant_record;
        }
        return 0;
    }
    // Bytes of a rounded row: an odd number of cache lines, so that the rows of a tile do not all meet in a few sets of
    // the cache. 0 where rows are read as they are.
    int64_t bytes() const {
        return rounded() ? ((((k + quant_group - 1) / quant_group * group_bytes() + 63) / 64) | 1) * 64 : 0;
    }
    // Rounds `count` values (of which the first 32 are looked at) into one group.
    void round_group(const float* x, int64_t count, uint8_t* group) const;  // rows.cpp
    void round_row(const float* x, uint8_t* out) const {
        const int64_t step = group_bytes();
        for (int64_t at = 0; at < k; at += quant_group, out += step) round_group(x + at, k - at, out);
    }
    // The rows row(0) .. row(rows - 1) into `out`, one behind the other.
    template <class Row>
    void round_rows(Parallel& par, int64_t rows, uint8_t* out, Row row) const {
        par.split(rows, rows * k * 2, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r) round_row(row(r), out + r * bytes());
        });
    }
};

// Bytes of a row in the way that takes most: what a plan sets aside before it knows which one a call will ask for.
inline int64_t most_row_bytes(Form f, int64_t k) {
    return std::max(RowLayout(f, k, false).bytes(), RowLayout(f, k, true).bytes());
}

}  // namespace tmlc
