// Products of rows with packed weights: the inner loops that linear, router and moe share.
//
// Weights come in blocks of 16 output columns, K-major (docs/plan-format.md). A tile is R rows by B blocks with one
// accumulator for each; each accumulator runs over K in order, so every output element has the same bits whatever the
// tile it was computed in. One row takes many blocks at once (to keep enough independent sums and streams in flight),
// many rows take few blocks (each weight is loaded, and a bf16 one unpacked, once for all of them).
#pragma once
#include "form.h"
#include "quant.h"
#include "vec.h"

namespace tmlc {

// Packed weights over k inputs, and where block number b begins. The rows that meet quantised weights are quantised too
// (quantise_rows): the row pointers of a tile then point to those.
struct Packed {
    const uint8_t* data;
    int64_t block_bytes;
    int64_t k;
    Form form;
    Packed(const Operand& w, int64_t inputs)
        : data(static_cast<const uint8_t*>(w.data)), k(inputs), form(form_of(w.dtype, w.cols, inputs)) {
        block_bytes = form_cols(form, k) * form_item_bytes(form);
    }
    const void* block(int64_t b) const { return data + b * block_bytes; }
    bool quantised() const { return tmlc::quantised(form); }
    int tile_rows() const;
    int blocks_for_rows(int rows) const;
};

#if defined(__AVX512F__)
constexpr int tile_rows = 8;
constexpr int blocks_for_rows[tile_rows + 1] = {0, 8, 6, 4, 4, 4, 4, 3, 3};
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int tile_rows = 4;
constexpr int blocks_for_rows[tile_rows + 1] = {0, 6, 2, 2, 1};
#else
constexpr int tile_rows = 2;
constexpr int blocks_for_rows[tile_rows + 1] = {0, 2, 1};
#endif
constexpr int max_blocks = 8;
static_assert(quant_tile_rows <= tile_rows, "a tile's results must fit");

inline int Packed::tile_rows() const { return quantised() ? quant_tile_rows : tmlc::tile_rows; }
inline int Packed::blocks_for_rows(int rows) const {
    return (quantised() ? quant_blocks_for_rows : tmlc::blocks_for_rows)[rows];
}

// acc[r][b] = sum over k of x[r][k] * w[b][k], the sum taken in order of k.
template <int R, int B, bool BF16>
TMLC_INLINE void tile_dot(const float* const* x, const void* const* w, int64_t k_count, v16 (&acc)[R][B]) {
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) acc[r][b] = zero16();
    constexpr int64_t ahead = R <= 2 ? 1024 : 0;  // bytes; rows that share weights hide the latency by themselves
    if constexpr (BF16) {
        const uint16_t* p[B];
        for (int b = 0; b < B; ++b) p[b] = static_cast<const uint16_t*>(w[b]);
        const int64_t pairs = k_count / 2;
        for (int64_t i = 0; i < pairs; ++i) {
            v16 even[B], odd[B];
            for (int b = 0; b < B; ++b) {
                if constexpr (ahead > 0) __builtin_prefetch(reinterpret_cast<const char*>(p[b] + i * 32) + ahead);
                load_bf16_pairs(p[b] + i * 32, even[b], odd[b]);
            }
            for (int r = 0; r < R; ++r) {
                const v16 x0 = splat(x[r][2 * i]), x1 = splat(x[r][2 * i + 1]);
                for (int b = 0; b < B; ++b) acc[r][b] = fma(x0, even[b], acc[r][b]);
                for (int b = 0; b < B; ++b) acc[r][b] = fma(x1, odd[b], acc[r][b]);
            }
        }
        if (k_count % 2 != 0)
            for (int b = 0; b < B; ++b) {
                v16 even, odd;
                load_bf16_pairs(p[b] + pairs * 32, even, odd);
                for (int r = 0; r < R; ++r) acc[r][b] = fma(splat(x[r][2 * pairs]), even, acc[r][b]);
            }
    } else {
        const float* p[B];
        for (int b = 0; b < B; ++b) p[b] = static_cast<const float*>(w[b]);
        for (int64_t i = 0; i < k_count; ++i) {
            v16 wv[B];
            for (int b = 0; b < B; ++b) {
                if constexpr (ahead > 0) __builtin_prefetch(reinterpret_cast<const char*>(p[b] + i * 16) + ahead);
                wv[b] = load(p[b] + i * 16);
            }
            for (int r = 0; r < R; ++r) {
                const v16 xv = splat(x[r][i]);
                for (int b = 0; b < B; ++b) acc[r][b] = fma(xv, wv[b], acc[r][b]);
            }
        }
    }
}

// One tile, its results stored as [R][B][16] floats (noinline: one copy of each shape in the library).
template <int R, int B, bool BF16>
__attribute__((noinline)) void tile_store(const float* const* x, const void* const* w, int64_t k_count, float* out) {
    v16 acc[R][B];
    tile_dot<R, B, BF16>(x, w, k_count, acc);
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) store(out + (r * B + b) * 16, acc[r][b]);
}

typedef void (*TileFn)(const float* const* x, const void* const* w, int64_t k_count, float* out);
TileFn tile_function(int rows, int blocks, Form form);  // gemm.cpp; rows 1..tile_rows, blocks 1..blocks_for_rows

// For `rows` rows x[0..rows) and the blocks [begin, end) of `group(i, w)` (which fills w with G pointers for unit i;
// a tile takes several units at once), calls sink(row, unit, values) with values = G * 16 sums. Row tiles are the inner
// loop: a strip of weights stays in the cache while all rows pass.
template <int G, class Group, class Sink>
inline void for_tiles(const float* const* x, int64_t rows, int64_t begin, int64_t end, const Packed& p, Group group,
                      Sink sink) {
    if (rows <= 0) return;
    const int64_t tiles = (rows + p.tile_rows() - 1) / p.tile_rows();
    const int most = static_cast<int>((rows + tiles - 1) / tiles);  // even tiles: 9 rows are 5 + 4
    int strip = p.blocks_for_rows(most) / G;
    if (strip < 1) strip = 1;
    const void* w[max_blocks];
    alignas(64) float out[tile_rows * max_blocks * 16];
    for (int64_t unit = begin; unit < end;) {
        int64_t take = end - unit < strip ? end - unit : strip;
        for (int64_t u = 0; u < take; ++u) group(unit + u, w + u * G);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t r0 = rows * t / tiles, count = rows * (t + 1) / tiles - r0;
            const int blocks = static_cast<int>(take) * G;
            // A tile shape that does not exist (two blocks where the registers hold one) is done block by block.
            if (TileFn tile = tile_function(static_cast<int>(count), blocks, p.form)) {
                tile(x + r0, w, p.k, out);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t u = 0; u < take; ++u) sink(r0 + r, unit + u, out + (r * blocks + u * G) * 16);
            } else {
                TileFn one = tile_function(static_cast<int>(count), 1, p.form);
                alignas(64) float part[tile_rows * 16];
                for (int b = 0; b < blocks; ++b) {
                    one(x + r0, w + b, p.k, part);
                    for (int64_t r = 0; r < count; ++r) std::memcpy(out + (r * blocks + b) * 16, part + r * 16, 64);
                }
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t u = 0; u < take; ++u) sink(r0 + r, unit + u, out + (r * blocks + u * G) * 16);
            }
        }
        unit += take;
    }
}

}  // namespace tmlc
