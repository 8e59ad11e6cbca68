// Products of rows with packed weights: the inner loops that linear, router and moe share.
//
// Weights come in blocks of 16 output columns, K-major (docs/plan-format.md). A tile is R rows by one block, each row
// with accumulators of its own that run over K in order, so every output element has the same bits whatever the tile it
// was computed in. Blocks follow each other in memory: a tile reads one stream, some lines ahead, past the end of its
// block into the next (eight streams at a time reached half of that from memory). Many rows take the tiles of a
// block one after the other, while the block is in the cache.
#pragma once
#include "form.h"
#include "rows.h"
#include "vec.h"

namespace tmlc {

// Packed weights over k inputs, where block number b begins, and how the rows that meet them are rounded: the row pointers
// of a tile point to the rounded rows. `portable` asks for sums that every instruction set makes alike.
struct Packed {
    const uint8_t* data;
    int64_t block_bytes;
    int64_t k;
    Form form;
    RowLayout rows;
    Packed(const Operand& w, int64_t inputs, bool portable = false)
        : data(static_cast<const uint8_t*>(w.data)), k(inputs), form(form_of(w.dtype, w.cols, inputs)),
          rows(form, inputs, portable) {
        block_bytes = form_cols(form, k) * form_item_bytes(form);
    }
    const void* block(int64_t b) const { return data + b * block_bytes; }
};

// How many rows a tile may have: as many as keep its accumulators in registers.
#if defined(__AVX512F__)
constexpr int most_rows = 8;
constexpr int rows_of_tile(Form) { return 8; }
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int most_rows = 4;
constexpr int rows_of_tile(Form f) { return f == Form::bf16 ? 2 : 4; }
#else
constexpr int most_rows = 2;
constexpr int rows_of_tile(Form f) { return f == Form::bf16 ? 1 : 2; }
#endif

// One tile: out[r][16] = the sums over k of row x[r] times the block w.
typedef void (*TileFn)(const float* const* x, const void* w, int64_t k, float* out);
TileFn tile_function(int rows, Form form, Rounding rounding);  // gemm.cpp; rows 1..rows_of_tile(form)

// For `rows` rows x[0..rows) and the units [begin, end), which are G blocks of p in turn, unit 0 beginning at block
// `first`: sink(r, unit, sums), where sums[g] points to the 16 sums of the unit's block g.
template <int G, class Sink>
inline void for_tiles(const float* const* x, int64_t rows, int64_t begin, int64_t end, const Packed& p,
                      int64_t first, Sink sink) {
    if (rows <= 0) return;
    const int64_t most = rows_of_tile(p.form), tiles = (rows + most - 1) / most;
    alignas(64) float out[G][most_rows * 16];
    for (int64_t u = begin; u < end; ++u) {
        for (int64_t t = 0; t < tiles; ++t) {  // even tiles: 9 rows are 5 + 4
            const int64_t r0 = rows * t / tiles, count = rows * (t + 1) / tiles - r0;
            const TileFn tile = tile_function(static_cast<int>(count), p.form, p.rows.rounding);
            for (int g = 0; g < G; ++g) tile(x + r0, p.block(first + u * G + g), p.k, out[g]);
            for (int64_t r = 0; r < count; ++r) {
                const float* sums[G];
                for (int g = 0; g < G; ++g) sums[g] = out[g] + r * 16;
                sink(r0 + r, u, sums);
            }
        }
    }
}

}  // namespace tmlc
