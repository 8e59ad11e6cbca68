// What a kernel call touched that its plan cannot know: experts that rows were sent to, cached positions that they saw.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "op.h"

namespace tmlc {

struct Touched {
    int64_t experts = 0;   // different ones, of a `moe`
    int64_t keys = 0;      // cached positions that at least one row saw, of an `attention`, over its sessions
    int64_t row_keys = 0;  // positions that each row saw, added up over the rows
};

// Experts of a `moe` that has run (so its numbers are in range): `seen` has a bit for each that a plan can name.
inline void count_experts(const RunArgs& a, std::vector<uint64_t>& seen, Touched& into) {
    std::fill(seen.begin(), seen.end(), 0);
    const Operand& experts = a.t[3];
    for (int64_t r = 0; r < experts.rows; ++r)
        for (int64_t j = 0; j < experts.cols; ++j) {
            const auto e = static_cast<uint32_t>(experts.i32(r)[j]);
            uint64_t& word = seen[e / 64];
            const uint64_t bit = uint64_t{1} << (e % 64);
            into.experts += (word & bit) == 0;
            word |= bit;
        }
}

// Positions of an `attention` that has run; `advance` comes behind it, so the slot's position is that of the first row.
inline void count_keys(const RunArgs& a, Touched& into) {
    const int64_t window = a.i[2], sinks = window > 0 ? a.i[3] : 0;
    for (int s = 0; s < a.n_spans; ++s) {
        const int64_t first = *a.at(4, s).i64(), n = a.spans[s].n, end = first + n;
        const int64_t low = window > 0 ? std::max(sinks, first - window + 1) : 0;  // of the first row, beside the sinks
        into.keys += end - std::min(low, end) + std::min(sinks, std::min(low, end));
        for (int64_t p = first; p < end; ++p) {
            const int64_t own = window > 0 ? std::max(sinks, p - window + 1) : 0;
            into.row_keys += p + 1 - std::min(own, p + 1) + std::min(sinks, std::min(own, p + 1));
        }
    }
}

}  // namespace tmlc
