// Kernels at the edge between media and the model: mel levels of sound, patches of video, overlap-add of speech, and
// the bag of embeddings that turns levels into an activation.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "fft.h"
#include "op.h"
#include "real.h"

namespace tmlc {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

bool is(const TensorInfo& t, DType dtype) { return t.dtype == dtype; }

int64_t no_scratch(const Call&, int) { return 0; }

// ---- bag_embedding: out[n,d] levels[n,B] table[B·L,d], i = L

constexpr int64_t max_levels = 65536;
constexpr int64_t bag_tile = 256;   // columns summed at a time, so that the sums stay in registers and L1

const char* bag_check(const Call& c) {
    if (c.n_t != 3 || c.n_i != 1 || c.n_f != 0) return "bag_embedding takes 3 operands and the number of levels";
    const TensorInfo &out = *c.t[0], &levels = *c.t[1], &table = *c.t[2];
    if (!is(out, DType::f32) || !is(levels, DType::i32)) return "bag_embedding maps i32 levels to f32";
    if (!is(table, DType::f32) && !is(table, DType::bf16)) return "the table of bag_embedding is f32 or bf16";
    if (c.i[0] < 1 || c.i[0] > max_levels) return "bag_embedding has 1 to 65536 levels";
    if (!out.same_rows(levels)) return "bag_embedding gives a row for each row of levels";
    if (table.a != 0 || table.b != levels.cols * c.i[0]) return "the table of bag_embedding has bins x levels rows";
    if (table.cols != out.cols) return "the rows of the table of bag_embedding are as wide as its output";
    return nullptr;
}

template <class Row, class Widen>
void bag_sum(const RunArgs& a, const Row& row, const Widen& widen) {
    const Operand &out = a.t[0], &levels = a.t[1];
    const int64_t L = a.i[0], bins = levels.cols, tiles = (out.cols + bag_tile - 1) / bag_tile;
    a.par.split(out.rows * tiles, out.rows * out.cols * bins, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t r = unit / tiles, first = unit % tiles * bag_tile;
            const int64_t width = std::min(bag_tile, out.cols - first);
            const int32_t* level = levels.i32(r);
            float sum[bag_tile] = {};
            for (int64_t b = 0; b < bins; ++b) {
                const auto* from = row(b * L + level[b]) + first;
                for (int64_t j = 0; j < width; ++j) sum[j] += widen(from[j]);
            }
            std::memcpy(out.f32(r) + first, sum, static_cast<size_t>(width) * sizeof(float));
        }
    });
}

// All levels are checked before the first sum is written, and no sum can change them: what is written never overlaps.
int bag_run(const RunArgs& a) {
    const Operand &levels = a.t[1], &table = a.t[2];
    for (int64_t r = 0; r < levels.rows; ++r)
        for (int64_t b = 0; b < levels.cols; ++b)
            if (levels.i32(r)[b] < 0 || levels.i32(r)[b] >= a.i[0]) return bad_index;
    if (table.dtype == DType::f32)
        bag_sum(a, [&](int64_t r) { return table.f32(r); }, [](float x) { return x; });
    else
        bag_sum(
            a, [&](int64_t r) { return table.bf16(r); },
            [](uint16_t x) {
                const uint32_t bits = static_cast<uint32_t>(x) << 16;
                float wide;
                std::memcpy(&wide, &bits, sizeof wide);
                return wide;
            });
    return ok;
}

// ---- dmel: levels[n,B] pcm[n,hop] window[1,W] filters[B,W/2+1] tail[1,W-hop], i = levels, f = lo hi

constexpr int64_t max_window = 16384;   // bounds the table below, and a second at 16 kHz is far beyond any use

// The transform of `size` samples. Tables are made when a plan is checked, and live as long as the process: run() only
// looks them up, and there are few window lengths in the world.
const RealFft& transform(int64_t size) {
    static std::mutex mutex;
    static auto& made = *new std::map<int64_t, std::unique_ptr<const RealFft>>;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = made.find(size);
    if (found != made.end()) return *found->second;
    return *made.emplace(size, std::make_unique<const RealFft>(size)).first->second;
}

const char* dmel_check(const Call& c) {
    if (c.n_t != 5 || c.n_i != 1 || c.n_f != 2) return "dmel takes 5 operands, the number of levels and two bounds";
    const TensorInfo &out = *c.t[0], &pcm = *c.t[1], &window = *c.t[2], &filters = *c.t[3], &tail = *c.t[4];
    if (!is(out, DType::i32)) return "dmel writes i32 levels";
    if (!is(pcm, DType::f32) || !is(window, DType::f32) || !is(filters, DType::f32) || !is(tail, DType::f32))
        return "dmel reads f32 samples, window, filters and tail";
    if (tail.space != Space::slot) return "the tail of dmel lives in the slot";
    const int64_t W = window.cols, hop = pcm.cols;
    if (W > max_window) return "the window of dmel has at most 16384 samples";
    if (hop >= W) return "the window of dmel is longer than its hop";
    if (!window.fixed(1, W) || !tail.fixed(1, W - hop)) return "dmel takes window [1,W] and tail [1,W-hop]";
    if (!out.same_rows(pcm)) return "dmel gives a row for each row of samples";
    if (!filters.fixed(out.cols, W / 2 + 1)) return "the filters of dmel are [bins, W/2+1]";
    if (c.i[0] < 1 || c.i[0] > max_levels) return "dmel has 1 to 65536 levels";
    if (!(std::fabs(c.f[0]) <= 1e6 && std::fabs(c.f[1]) <= 1e6 && c.f[0] < c.f[1]))
        return "dmel needs finite bounds lo < hi";
    try {
        transform(W);
    } catch (const std::bad_alloc&) {
        return "no memory for the transform of dmel";
    }
    return nullptr;
}

struct DmelLayout {
    int64_t centres, power, work, per_thread;   // bytes
    DmelLayout(const RealFft& fft, int64_t levels)
        : centres(round_up(levels * int64_t{sizeof(float)})),
          power(round_up(fft.bins() * int64_t{sizeof(double)})),
          work(round_up(fft.work_size() * int64_t{sizeof(Complex)})),
          per_thread(power + work) {}
};

int64_t dmel_scratch(const Call& c, int threads) {
    const DmelLayout layout(transform(c.t[2]->cols), c.i[0]);
    return layout.centres + threads * layout.per_thread;
}

// linspace(lo, hi) in double from both ends, as PyTorch does, then rounded: the ends are exact.
void level_centres(float* out, int64_t count, double lo, double hi) {
    const double step = count > 1 ? (hi - lo) / static_cast<double>(count - 1) : 0.0;
    for (int64_t i = 0; i < count; ++i) {
        const bool lower = count == 1 || i < count / 2;
        out[i] = static_cast<float>(lower ? lo + step * static_cast<double>(i)
                                          : hi - step * static_cast<double>(count - 1 - i));
    }
}

// The nearest centre, the lowest of equally near ones. Anything not above the lowest centre, NaN too, gives 0.
int32_t nearest_level(double value, const float* centres, int64_t count) {
    if (!(value > centres[0])) return 0;
    const float* above = std::lower_bound(centres, centres + count, value,
                                          [](float centre, double v) { return static_cast<double>(centre) < v; });
    const float* pick = above;
    if (above == centres + count || value - above[-1] <= *above - value) pick = above - 1;
    return static_cast<int32_t>(std::lower_bound(centres, pick, *pick) - centres);
}

// filters · magnitude in eight interleaved partial sums: a fixed order, and one that vectorises.
double weighted_sum(const float* filter, const double* magnitude, int64_t count) {
    double lane[8] = {};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (int j = 0; j < 8; ++j) lane[j] += static_cast<double>(filter[k + j]) * magnitude[k + j];
    for (int j = 0; k + j < count; ++j) lane[j] += static_cast<double>(filter[k + j]) * magnitude[k + j];
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

int dmel_run(const RunArgs& a) {
    const Operand &out = a.t[0], &pcm = a.t[1], &window = a.t[2], &filters = a.t[3], &tail = a.t[4];
    const int64_t W = window.cols, hop = pcm.cols, kept = W - hop, count = a.i[0];
    const double lo = a.f[0], hi = a.f[1];
    const RealFft& fft = transform(W);
    const DmelLayout layout(fft, count);
    float* const centres = reinterpret_cast<float*>(a.scratch);
    level_centres(centres, count, lo, hi);
    const int64_t work = out.rows * (fft.bins() * out.cols + 64 * W);
    a.par.split(out.rows, work, [&](int64_t begin, int64_t end, int thread) {
        uint8_t* const mine = a.scratch + layout.centres + thread * layout.per_thread;
        double* const power = reinterpret_cast<double*>(mine);
        Complex* const points = reinterpret_cast<Complex*>(mine + layout.power);
        const float* shape = window.f32();
        for (int64_t r = begin; r < end; ++r) {
            // The frame is samples r·hop … r·hop+W-1 of the tail followed by the rows of pcm.
            int64_t j = 0;
            for (int64_t at = r * hop; j < W && at + j < kept; ++j)
                fft.put(points, j, static_cast<double>(shape[j]) * tail.f32()[at + j]);
            while (j < W) {
                const int64_t index = r * hop + j - kept, row = index / hop, column = index % hop;
                const int64_t run = std::min(hop - column, W - j);
                const float* from = pcm.f32(row) + column;
                for (int64_t k = 0; k < run; ++k, ++j) fft.put(points, j, static_cast<double>(shape[j]) * from[k]);
            }
            fft.power(points, power);
            for (int64_t k = 0; k < fft.bins(); ++k) power[k] = std::sqrt(power[k] < 1e-10 ? 1e-10 : power[k]);
            for (int64_t b = 0; b < out.cols; ++b) {
                const double mel = weighted_sum(filters.f32(b), power, fft.bins());
                const double value = log10_real(mel < 1e-10 ? 1e-10 : mel);
                out.i32(r)[b] = nearest_level(std::min(std::max(value, lo), hi), centres, count);
            }
        }
    });
    // The tail becomes the last W-hop samples of all that was heard.
    const int64_t heard = pcm.rows * hop, old = std::max<int64_t>(0, kept - heard);
    float* const keep = tail.f32();
    if (old > 0) std::memmove(keep, keep + (kept - old), static_cast<size_t>(old) * sizeof(float));
    for (int64_t j = old; j < kept;) {
        const int64_t index = heard - kept + j, column = index % hop, run = std::min(hop - column, kept - j);
        std::memmove(keep + j, pcm.f32(index / hop) + column, static_cast<size_t>(run) * sizeof(float));
        j += run;
    }
    return ok;
}

// ---- patchify: out[n·P·leaves, leaf] video[n·T·H, width·3], i = T H patch nfolds (t s)…, f = mean×3 std×3

constexpr int64_t max_side = 65536, max_folds = 16;

const char* patchify_check(const Call& c) {
    if (c.n_t != 2 || c.n_i < 4 || c.n_f != 6) return "patchify takes 2 operands, its geometry, mean x 3 and std x 3";
    const TensorInfo &out = *c.t[0], &video = *c.t[1];
    if (!is(out, DType::f32) || !is(video, DType::u8)) return "patchify maps u8 pixels to f32";
    const int64_t T = c.i[0], H = c.i[1], patch = c.i[2], folds = c.i[3];
    if (T < 1 || T > max_side || H < 1 || H > max_side || patch < 1 || patch > max_side)
        return "patchify needs frames, height and patch between 1 and 65536";
    if (folds < 1 || folds > max_folds || c.n_i != 4 + 2 * folds)
        return "patchify has 1 to 16 folds of two numbers each";
    int64_t depth = 1, side = 1, leaf = 3, leaves = 1;
    for (int64_t k = 0; k < folds; ++k) {
        const int64_t t = c.i[4 + 2 * k], s = c.i[5 + 2 * k];
        if (t < 1 || t > T || s < 1 || s > patch) return "a fold of patchify is at least 1 and at most the patch";
        depth *= t;
        side *= s;
        if (depth > T || side > patch) return "the folds of patchify multiply to more than the patch";
        (k == 0 ? leaf : leaves) *= t * s * s;   // at most 3·2^48: depth and side are bounded
    }
    if (depth != T || side != patch) return "the folds of patchify multiply to the patch";
    if (video.cols % 3 != 0 || video.cols / 3 % patch != 0 || H % patch != 0)
        return "height and width of patchify are multiples of the patch";
    if (out.cols != leaf) return "a row of patchify is one leaf of its innermost fold";
    const int64_t frame_rows = T * H;   // ≤ 2^32
    if (video.a % frame_rows != 0 || video.b % frame_rows != 0) return "patchify takes whole clips of frames";
    const __int128 per_clip = static_cast<__int128>(H / patch) * (video.cols / 3 / patch) * leaves;
    if (out.a != per_clip * (video.a / frame_rows) || out.b != per_clip * (video.b / frame_rows))
        return "patchify gives patches x leaves rows for each clip";
    for (int k = 0; k < 6; ++k)
        if (!(std::fabs(c.f[k]) <= 1e6)) return "mean and std of patchify are finite";
    for (int k = 3; k < 6; ++k)
        if (!(c.f[k] >= 1e-6)) return "the std of patchify is above zero";
    return nullptr;
}

int64_t patchify_scratch(const Call&, int) { return 3 * 256 * int64_t{sizeof(float)}; }

int patchify_run(const RunArgs& a) {
    const Operand &out = a.t[0], &video = a.t[1];
    const int64_t T = a.i[0], H = a.i[1], patch = a.i[2], folds = a.i[3];
    const int64_t* fold = a.i + 4;
    const int64_t t1 = fold[0], s1 = fold[1], across = video.cols / 3 / patch, patches = H / patch * across;
    float(*const normal)[256] = reinterpret_cast<float(*)[256]>(a.scratch);
    for (int channel = 0; channel < 3; ++channel) {
        const float mean = static_cast<float>(a.f[channel]), std = static_cast<float>(a.f[3 + channel]);
        for (int v = 0; v < 256; ++v) normal[channel][v] = (static_cast<float>(v) / 255.0f - mean) / std;
    }
    const int64_t leaves = T * patch * patch / (t1 * s1 * s1);
    const int64_t units = video.rows / (T * H) * patches;
    a.par.split(units, units * leaves * out.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t clip = unit / patches, top = unit % patches / across * patch, left = unit % across * patch;
            for (int64_t leaf = 0; leaf < leaves; ++leaf) {
                // The leaf's place in the patch: its number's digits, innermost fold last.
                int64_t t0 = 0, y0 = top, x0 = left, depth = t1, side = s1, rest = leaf;
                for (int64_t k = 1; k < folds; ++k) {
                    const int64_t t = fold[2 * k], s = fold[2 * k + 1], digit = rest % (t * s * s);
                    rest /= t * s * s;
                    x0 += digit % s * side;
                    y0 += digit / s % s * side;
                    t0 += digit / (s * s) * depth;
                    depth *= t;
                    side *= s;
                }
                float* to = out.f32(unit * leaves + leaf);
                for (int64_t t = t0; t < t0 + t1; ++t)
                    for (int64_t y = y0; y < y0 + s1; ++y) {
                        const uint8_t* from = video.u8((clip * T + t) * H + y) + x0 * 3;
                        for (int64_t x = 0; x < s1; ++x, from += 3, to += 3)
                            for (int channel = 0; channel < 3; ++channel) to[channel] = normal[channel][from[channel]];
                    }
            }
        }
    });
    return ok;
}

// ---- overlap_add: pcm[n,hop] frames[n,W] window[1,W] overlap[1,W-hop]

const char* overlap_add_check(const Call& c) {
    if (c.n_t != 4 || c.n_i != 0 || c.n_f != 0) return "overlap_add takes 4 operands";
    const TensorInfo &pcm = *c.t[0], &frames = *c.t[1], &window = *c.t[2], &kept = *c.t[3];
    if (!is(pcm, DType::f32) || !is(frames, DType::f32) || !is(window, DType::f32) || !is(kept, DType::f32))
        return "overlap_add works on f32";
    if (kept.space != Space::slot) return "the overlap of overlap_add lives in the slot";
    const int64_t W = frames.cols, hop = pcm.cols;
    if (hop >= W) return "the frames of overlap_add are longer than its hop";
    if (!pcm.same_rows(frames)) return "overlap_add gives a row for each frame";
    if (!window.fixed(1, W) || !kept.fixed(1, W - hop)) return "overlap_add takes window [1,W] and overlap [1,W-hop]";
    return nullptr;
}

// Frames in order, on the caller: each sample is the sum of its frames from the oldest to the newest, however they
// were cut into calls.
int overlap_add_run(const RunArgs& a) {
    const Operand &pcm = a.t[0], &frames = a.t[1];
    const int64_t W = frames.cols, hop = pcm.cols, length = W - hop;
    const float* const window = a.t[2].f32();
    float* const kept = a.t[3].f32();
    const int64_t shared = std::min(hop, length), still = std::max<int64_t>(0, length - hop);
    for (int64_t r = 0; r < frames.rows; ++r) {
        const float* const frame = frames.f32(r);
        float* const out = pcm.f32(r);
        for (int64_t j = 0; j < shared; ++j) out[j] = kept[j] + frame[j] * window[j];
        for (int64_t j = shared; j < hop; ++j) out[j] = frame[j] * window[j];
        for (int64_t j = 0; j < still; ++j) kept[j] = kept[j + hop] + frame[j + hop] * window[j + hop];
        for (int64_t j = still; j < length; ++j) kept[j] = frame[j + hop] * window[j + hop];
    }
    return ok;
}

const OpDef ops[] = {
    {"bag_embedding", bag_check, no_scratch, bag_run, 1},
    {"dmel", dmel_check, dmel_scratch, dmel_run, 1},
    {"patchify", patchify_check, patchify_scratch, patchify_run, 1},
    {"overlap_add", overlap_add_check, no_scratch, overlap_add_run, 1},
};

}  // namespace

OpTable media_ops() { return {ops, static_cast<int>(sizeof ops / sizeof ops[0])}; }

}  // namespace tmlc
