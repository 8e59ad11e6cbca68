// The head of a language model in one call: scaled rows times packed weights, soft-capped, and the entry that is drawn.
//
// The logits are never written. Each thread keeps, for every row, the best of the columns that it computes; the best of
// these is the best of all, whoever computed what, because of equal scores the lowest entry wins.
#include <algorithm>
#include <limits>

#include "check.h"
#include "gemm.h"
#include "op.h"
#include "philox.h"
#include "vec.h"

namespace tmlc {
namespace {

constexpr int64_t most = int64_t{1} << 24;  // rows of a call, columns of x

// Scratch of one call: scaled rows, the same rounded for the weights, the best entries of each thread.
struct Layout {
    int64_t row_floats, code_bytes, scaled, codes, found, found_row, bytes;
    Layout(int64_t rows, int64_t k, bool scaling, int64_t rounded_bytes, int threads)
        : row_floats(round_up(k, 16)), code_bytes(rounded_bytes) {
        scaled = 0;
        codes = scaled + (scaling ? round_up(rows * row_floats * 4, 64) : 0);
        found = codes + rows * code_bytes;
        found_row = round_up(rows, 64 / static_cast<int64_t>(sizeof(Best)));
        bytes = found + found_row * static_cast<int64_t>(sizeof(Best)) * threads;
    }
};

const char* check_head_sample(const Call& c) {
    TMLC_REQUIRE(arity(c, 5, 1, 2) || arity(c, 6, 1, 2), "wrong number of operands");
    const TensorInfo &ids = *c.t[0], &x = *c.t[1], &w = *c.t[2], &key = *c.t[3], &temperature = *c.t[4];
    const int64_t entries = c.i[0];
    TMLC_REQUIRE(ids.dtype == DType::i32 && ids.cols == 1, "the ids must be i32 [n,1]");
    TMLC_REQUIRE(is_f32(x) && x.same_rows(ids) && x.cols <= most, "x must be f32 [n,k]");
    TMLC_REQUIRE(x.rows(c.max_n) <= most, "too many rows");
    TMLC_REQUIRE(packed(w, w.b, x.cols), "the weight is not packed for these columns");
    TMLC_REQUIRE(entries >= 1 && entries <= int64_t{1} << 31 && blocks16(entries) <= w.b, "the weight has fewer entries");
    TMLC_REQUIRE(key.dtype == DType::i64 && key.cols == 3 && key.same_rows(ids), "the key must be i64 [n,3]");
    TMLC_REQUIRE(is_f32(temperature) && temperature.cols == 1 && temperature.same_rows(ids),
                 "the temperature must be f32 [n,1]");
    TMLC_REQUIRE(c.n_t == 5 || (is_f32(*c.t[5]) && c.t[5]->fixed(1, c.t[5]->cols) && c.t[5]->cols >= entries),
                 "the bias must be f32 [1,m]");
    TMLC_REQUIRE(finite(c.f[0]) && finite(c.f[1]) && c.f[1] >= 0, "the cap must not be negative");
    return nullptr;
}
int64_t scratch_head_sample(const Call& c, int threads) {
    const TensorInfo &x = *c.t[1], &w = *c.t[2];
    return Layout(x.rows(c.max_n), x.cols, c.f[0] != 1, most_row_bytes(form_of(w.dtype, w.cols, x.cols), x.cols), threads).bytes;
}

// The best of sixteen logits, entries first ... first + count - 1, or `best` where none is better.
void choose_highest(Best& best, const float* logits, int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j)
        if (best.beaten_by(logits[j], first + j)) best = {logits[j], first + j};
}
// The words of 32 entries of one row, kept because two blocks of columns mostly follow each other.
struct Noise {
    int64_t row = -1, first = -1;
    uint32_t words[32];
    void prepare(const Operand& key, int64_t r, int64_t entry) {
        if (r == row && entry == first) return;
        row = r, first = entry;
        uint32_t blocks[4][8];
        philox<8>(Stream(key.i64(r), gumbel_domain), static_cast<uint32_t>(entry / 4), blocks);
        for (int j = 0; j < 32; ++j) words[j] = blocks[j % 4][j / 4];
    }
};
// The same for logits/T + Gumbel; `first` is a multiple of 16.
void choose_noisy(Best& best, const float* logits, int64_t first, int64_t count, double temperature, const Noise& noise) {
    const uint32_t* const words = noise.words + (first - noise.first);
    double highest = best.score;
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t word = words[j];
        const double base = static_cast<double>(logits[j]) / temperature;
        if (!(gumbel_bound(base, word) >= highest)) continue;
        const double score = gumbel_score(base, word);
        if (best.beaten_by(score, first + j)) best = {score, first + j}, highest = score;
    }
}

int run_head_sample(const RunArgs& a) {
    const Operand &ids = a.t[0], &x = a.t[1], &w = a.t[2], &key = a.t[3], &temperature = a.t[4];
    const float* bias = a.n_t == 6 ? a.t[5].f32() : nullptr;
    const int64_t entries = a.i[0], k = x.cols, n = x.rows;
    const float alpha = static_cast<float>(a.f[0]);
    const bool scaling = a.f[0] != 1, capping = a.f[1] > 0;
    const v16 cap = splat(static_cast<float>(a.f[1])), uncap = splat(capping ? static_cast<float>(1.0 / a.f[1]) : 0.0f);
    for (int64_t r = 0; r < n; ++r)
        if (!(temperature.f32(r)[0] >= 0.0f)) return bad_index;

    const Packed matrix(w, k);
    const int threads = a.par.threads();
    const Layout at(n, k, scaling, matrix.rows.bytes(), threads);
    const auto scaled = [&](int64_t r) { return reinterpret_cast<float*>(a.scratch + at.scaled) + r * at.row_floats; };
    const auto plain = [&](int64_t r) -> const float* { return scaling ? scaled(r) : x.f32(r); };
    if (scaling)
        a.par.split(n, n * k, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; ++r)
                for (int64_t c = 0; c < k; c += 16) store_n(scaled(r) + c, splat(alpha) * load_n(x.f32(r) + c, k - c), k - c);
        });
    if (matrix.rows.rounded()) matrix.rows.round_rows(a.par, n, a.scratch + at.codes, plain);
    Best* const found = reinterpret_cast<Best*>(a.scratch + at.found);
    std::fill(found, found + at.found_row * threads, Best{-std::numeric_limits<double>::infinity(), 0});

    constexpr int64_t chunk = 64;
    a.par.split(blocks16(entries), n * entries * k, [&](int64_t begin, int64_t end, int thread) {
        Best* const mine = found + thread * at.found_row;
        Noise noise;
        for (int64_t r0 = 0; r0 < n; r0 += chunk) {
            const float* rows[chunk];
            const int64_t count = std::min(chunk, n - r0);
            for (int64_t r = 0; r < count; ++r)
                rows[r] = matrix.rows.rounded()
                              ? reinterpret_cast<const float*>(a.scratch + at.codes + (r0 + r) * at.code_bytes)
                              : plain(r0 + r);
            for_tiles<1>(rows, count, begin, end, matrix, 0, [&](int64_t r, int64_t b, auto& sums) {
                const int64_t first = b * 16, here = std::min<int64_t>(16, entries - first);
                v16 v = load(sums[0]);
                if (bias != nullptr) v = v + load_n(bias + first, here);
                if (capping) v = cap * tanh16(v * uncap);
                alignas(64) float logits[16];
                store(logits, v);
                const float t = temperature.f32(r0 + r)[0];
                if (t == 0.0f) return choose_highest(mine[r0 + r], logits, first, here);
                noise.prepare(key, r0 + r, first & ~int64_t{31});
                choose_noisy(mine[r0 + r], logits, first, here, t, noise);
            });
        }
    });
    for (int64_t r = 0; r < n; ++r) {
        Best best = found[r];
        for (int thread = 1; thread < threads; ++thread) {
            const Best& other = found[thread * at.found_row + r];
            if (best.beaten_by(other.score, other.entry)) best = other;
        }
        ids.i32(r)[0] = static_cast<int32_t>(best.entry);
    }
    return ok;
}

const OpDef table[] = {
    {"head_sample", check_head_sample, scratch_head_sample, run_head_sample, 1},
};

}  // namespace

OpTable head_sample_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
