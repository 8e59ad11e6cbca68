// Every tile shape of gemm.h, compiled once.
#include "gemm.h"

#include <array>
#include <utility>

namespace tmlc {
namespace {

constexpr int shape(int rows, int blocks) { return rows * (max_blocks + 1) + blocks; }
constexpr int shapes = (tile_rows + 1) * (max_blocks + 1);

template <int S, bool BF16>
constexpr TileFn pick() {
    constexpr int r = S / (max_blocks + 1), b = S % (max_blocks + 1);
    if constexpr (r >= 1 && b >= 1 && b <= blocks_for_rows[r]) return tile_store<r, b, BF16>;
    else return nullptr;
}
template <bool BF16, int... S>
constexpr std::array<TileFn, shapes> table(std::integer_sequence<int, S...>) {
    return {pick<S, BF16>()...};
}

constexpr auto f32_tiles = table<false>(std::make_integer_sequence<int, shapes>());
constexpr auto bf16_tiles = table<true>(std::make_integer_sequence<int, shapes>());

}  // namespace

TileFn tile_function(int rows, int blocks, bool bf16) {
    if (rows < 1 || rows > tile_rows || blocks < 1 || blocks > max_blocks) return nullptr;
    return (bf16 ? bf16_tiles : f32_tiles)[static_cast<size_t>(shape(rows, blocks))];
}

}  // namespace tmlc
