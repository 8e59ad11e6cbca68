// Every tile shape of gemm.h, compiled once.
#include "gemm.h"

#include <array>
#include <utility>

namespace tmlc {
namespace {

constexpr int shape(int rows, int blocks) { return rows * (max_blocks + 1) + blocks; }
constexpr int shapes = (tile_rows + 1) * (max_blocks + 1);

template <int S, Form F>
constexpr TileFn pick() {
    constexpr int r = S / (max_blocks + 1), b = S % (max_blocks + 1);
    if constexpr (r < 1 || b < 1) return nullptr;
    else if constexpr (F == Form::f32 || F == Form::bf16) {
        if constexpr (b <= blocks_for_rows[r]) return tile_store<r, b, F == Form::bf16>;
        else return nullptr;
    } else if constexpr (r <= quant_tile_rows) {
        if constexpr (b <= quant_blocks_for_rows[r]) return quant_tile<r, b, F>;
        else return nullptr;
    } else return nullptr;
}
template <Form F, int... S>
constexpr std::array<TileFn, shapes> table(std::integer_sequence<int, S...>) {
    return {pick<S, F>()...};
}

constexpr auto f32_tiles = table<Form::f32>(std::make_integer_sequence<int, shapes>());
constexpr auto bf16_tiles = table<Form::bf16>(std::make_integer_sequence<int, shapes>());
constexpr auto int8_tiles = table<Form::int8>(std::make_integer_sequence<int, shapes>());
constexpr auto int4_tiles = table<Form::int4>(std::make_integer_sequence<int, shapes>());
constexpr auto int4_64_tiles = table<Form::int4_64>(std::make_integer_sequence<int, shapes>());

}  // namespace

TileFn tile_function(int rows, int blocks, Form form) {
    if (rows < 1 || rows > tile_rows || blocks < 1 || blocks > max_blocks) return nullptr;
    const auto at = static_cast<size_t>(shape(rows, blocks));
    switch (form) {
        case Form::f32: return f32_tiles[at];
        case Form::bf16: return bf16_tiles[at];
        case Form::int8: return int8_tiles[at];
        case Form::int4: return int4_tiles[at];
        case Form::int4_64: return int4_64_tiles[at];
        case Form::none: break;
    }
    return nullptr;
}

}  // namespace tmlc
