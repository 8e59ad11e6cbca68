// The tiles of gemm.h, compiled once for every number of rows and form.
#include "gemm.h"

#include <array>
#include <utility>

namespace tmlc {
namespace {

template <int R>
void f32_tile(const float* const* x, const void* w, int64_t k, float* out) {
    const float* p = static_cast<const float*>(w);
    v16 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = zero16();
    for (int64_t i = 0; i < k; ++i) {
        ask_ahead(p + i * 16);
        const v16 v = load(p + i * 16);
        for (int r = 0; r < R; ++r) acc[r] = fma(splat(x[r][i]), v, acc[r]);
    }
    for (int r = 0; r < R; ++r) store(out + r * 16, acc[r]);
}

// Pairs along K: the even inputs have one sum, the odd ones another, which keeps two chains of additions going for a row
// alone; together at the end.
template <int R>
void bf16_tile(const float* const* x, const void* w, int64_t k, float* out) {
    const uint16_t* p = static_cast<const uint16_t*>(w);
    v16 first[R], second[R];
    for (int r = 0; r < R; ++r) first[r] = second[r] = zero16();
    const int64_t pairs = k / 2;
    v16 even, odd;
    for (int64_t i = 0; i < pairs; ++i) {
        ask_ahead(p + i * 32);
        load_bf16_pairs(p + i * 32, even, odd);
        for (int r = 0; r < R; ++r) {
            first[r] = fma(splat(x[r][2 * i]), even, first[r]);
            second[r] = fma(splat(x[r][2 * i + 1]), odd, second[r]);
        }
    }
    if (k % 2 != 0) {
        load_bf16_pairs(p + pairs * 32, even, odd);
        for (int r = 0; r < R; ++r) first[r] = fma(splat(x[r][2 * pairs]), even, first[r]);
    }
    for (int r = 0; r < R; ++r) store(out + r * 16, first[r] + second[r]);
}

template <Form F, int R>
constexpr TileFn pick() {
    if constexpr (R < 1 || R > rows_of_tile(F)) return nullptr;
    else if constexpr (F == Form::f32) return f32_tile<R>;
    else if constexpr (F == Form::bf16) return bf16_tile<R>;
    else return quant_tile<R, F>;
}
template <Form F, int... R>
constexpr std::array<TileFn, most_rows + 1> table(std::integer_sequence<int, R...>) {
    return {pick<F, R>()...};
}
template <Form F>
constexpr auto tiles = table<F>(std::make_integer_sequence<int, most_rows + 1>());

}  // namespace

TileFn tile_function(int rows, Form form) {
    if (rows < 1 || rows > most_rows) return nullptr;
    const auto at = static_cast<size_t>(rows);
    switch (form) {
        case Form::f32: return tiles<Form::f32>[at];
        case Form::bf16: return tiles<Form::bf16>[at];
        case Form::int8: return tiles<Form::int8>[at];
        case Form::int4: return tiles<Form::int4>[at];
        case Form::int4_64: return tiles<Form::int4_64>[at];
        case Form::none: break;
    }
    return nullptr;
}

}  // namespace tmlc
