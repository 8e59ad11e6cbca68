// Kernels that draw random numbers with Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), keyed by (seed, tick, position): a draw depends on where in the conversation it happens, on nothing else.
#include <algorithm>
#include <cmath>
#include <limits>

#include "op.h"
#include "philox.h"
#include "real.h"

namespace tmlc {
namespace {

constexpr int lanes = 8;   // Philox blocks computed side by side

bool is_key(const TensorInfo& t) { return t.dtype == DType::i64 && t.cols == 3; }

// ---- philox_normal: out[n,D] key[n,3]

const char* normal_check(const Call& c) {
    if (c.n_t != 2 || c.n_i != 0 || c.n_f != 0) return "philox_normal takes 2 operands";
    if (c.t[0]->dtype != DType::f32) return "philox_normal writes f32";
    if (!is_key(*c.t[1])) return "the key of philox_normal is i64 [n,3]: seed, tick, position";
    if (!c.t[0]->same_rows(*c.t[1])) return "philox_normal gives a row for each key";
    return nullptr;
}

int64_t no_scratch(const Call&, int) { return 0; }

int normal_run(const RunArgs& a) {
    const Operand &out = a.t[0], &key = a.t[1];
    a.par.split(out.rows, out.rows * out.cols * 32, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const Stream stream(key.i64(r), normal_domain);
            float* const to = out.f32(r);
            uint32_t words[4][lanes];
            for (int64_t first = 0; first < out.cols; first += 4 * lanes) {
                philox<lanes>(stream, static_cast<uint32_t>(first / 4), words);
                for (int64_t pair = 0; pair < 2 * lanes && first + 2 * pair < out.cols; ++pair) {
                    const int64_t block = pair / 2, word = pair % 2 * 2, at = first + 2 * pair;
                    const double radius = std::sqrt(-2.0 * log_real(uniform(words[word][block])));
                    const double angle = 2.0 * 3.14159265358979323846 * uniform(words[word + 1][block]);
                    double cosine, sine;
                    cos_sin_real(angle, cosine, sine);
                    to[at] = static_cast<float>(radius * cosine);
                    if (at + 1 < out.cols) to[at + 1] = static_cast<float>(radius * sine);
                }
            }
        }
    });
    return ok;
}

// ---- sample: ids[n,1] logits[n,V] key[n,3] temperature[n,1]

constexpr int64_t chunk = 4096;   // entries of the vocabulary that one thread searches at a time

int64_t chunks(int64_t vocabulary) { return (vocabulary + chunk - 1) / chunk; }

const char* sample_check(const Call& c) {
    if (c.n_t != 4 || c.n_i != 0 || c.n_f != 0) return "sample takes 4 operands";
    const TensorInfo &ids = *c.t[0], &logits = *c.t[1], &key = *c.t[2], &temperature = *c.t[3];
    if (ids.dtype != DType::i32 || ids.cols != 1) return "sample writes i32 [n,1]";
    if (logits.dtype != DType::f32) return "the logits of sample are f32";
    if (logits.cols > int64_t{1} << 31) return "sample chooses among at most 2^31 entries";
    if (!is_key(key)) return "the key of sample is i64 [n,3]: seed, tick, position";
    if (temperature.dtype != DType::f32 || temperature.cols != 1) return "the temperature of sample is f32 [n,1]";
    if (!ids.same_rows(logits) || !ids.same_rows(key) || !ids.same_rows(temperature))
        return "sample takes logits, key and temperature for each row";
    const __int128 rows = static_cast<__int128>(ids.a) * c.max_n + ids.b;
    if (rows * chunks(logits.cols) > int64_t{1} << 24) return "sample is asked for too many rows at once";
    return nullptr;
}

int64_t sample_scratch(const Call& c, int) {
    return c.t[0]->rows(c.max_n) * chunks(c.t[1]->cols) * int64_t{sizeof(Best)};
}

// The best entry of logits[first, last), the lowest of equal ones; NaN counts as -inf.
Best greedy(const float* logits, int64_t first, int64_t last) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    float lane[16], highest = lowest;
    std::fill(lane, lane + 16, lowest);
    int64_t v = first;
    for (; v + 16 <= last; v += 16)
        for (int j = 0; j < 16; ++j) lane[j] = logits[v + j] > lane[j] ? logits[v + j] : lane[j];
    for (; v < last; ++v) highest = logits[v] > highest ? logits[v] : highest;
    for (const float x : lane) highest = x > highest ? x : highest;
    v = first;
    if (highest > lowest)
        while (v + 1 < last && logits[v] != highest) ++v;
    return {highest, v};
}

// The same for logits/T + Gumbel.
Best gumbel(const float* logits, int64_t first, int64_t last, double temperature, const Stream& stream) {
    Best best{-std::numeric_limits<double>::infinity(), first};
    uint32_t words[4][lanes];
    for (int64_t v = first; v < last; ++v) {
        const int64_t in_batch = (v - first) % (4 * lanes);
        if (in_batch == 0) philox<lanes>(stream, static_cast<uint32_t>(v / 4), words);
        const uint32_t word = words[in_batch % 4][in_batch / 4];
        const double base = static_cast<double>(logits[v]) / temperature;
        if (!(gumbel_bound(base, word) > best.score)) continue;
        const double score = gumbel_score(base, word);
        if (score > best.score) best = {score, v};
    }
    return best;
}

int sample_run(const RunArgs& a) {
    const Operand &ids = a.t[0], &logits = a.t[1], &key = a.t[2], &temperature = a.t[3];
    for (int64_t r = 0; r < ids.rows; ++r)
        if (!(temperature.f32(r)[0] >= 0.0f)) return bad_index;
    const int64_t parts = chunks(logits.cols);
    Best* const found = reinterpret_cast<Best*>(a.scratch);
    a.par.split(ids.rows * parts, ids.rows * logits.cols * 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t r = unit / parts, first = unit % parts * chunk;
            const int64_t last = first + chunk < logits.cols ? first + chunk : logits.cols;
            const float t = temperature.f32(r)[0];
            found[unit] = t == 0.0f ? greedy(logits.f32(r), first, last)
                                    : gumbel(logits.f32(r), first, last, t, Stream(key.i64(r), gumbel_domain));
        }
    });
    for (int64_t r = 0; r < ids.rows; ++r) {
        Best best = found[r * parts];
        for (int64_t part = 1; part < parts; ++part)
            if (found[r * parts + part].score > best.score) best = found[r * parts + part];
        ids.i32(r)[0] = static_cast<int32_t>(best.entry);
    }
    return ok;
}

const OpDef ops[] = {
    {"philox_normal", normal_check, no_scratch, normal_run, 1},
    {"sample", sample_check, sample_scratch, sample_run, 1},
};

}  // namespace

OpTable random_ops() { return {ops, static_cast<int>(sizeof ops / sizeof ops[0])}; }

}  // namespace tmlc
