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
        ask_ahead<Form::f32, R>(p + i * 16);
        const v16 v = load(p + i * 16);
        for (int r = 0; r < R; ++r) acc[r] = fma(splat(x[r][i]), v, acc[r]);
    }
    for (int r = 0; r < R; ++r) store(out + r * 16, acc[r]);
}

// Rows rounded to bf16_floats. Pairs along K: the even inputs have one sum, the odd ones another, which keeps two chains of additions going for a row
// alone; together at the end.
template <int R>
void bf16_tile(const float* const* x, const void* w, int64_t k, float* out) {
    const uint16_t* p = static_cast<const uint16_t*>(w);
    v16 first[R], second[R];
    for (int r = 0; r < R; ++r) first[r] = second[r] = zero16();
    const int64_t pairs = k / 2;
    v16 even, odd;
    for (int64_t i = 0; i < pairs; ++i) {
        ask_ahead<Form::bf16, R>(p + i * 32);
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

#if defined(__AVX512BF16__)

// sums += 16 pairs of weights x the pair at p, broadcast as part of the instruction (see dot_bytes of quant.h).
TMLC_INLINE v16 dot_pairs(v16 sums, v16 pairs, const uint8_t* p) {
    typedef int32_t pair __attribute__((aligned(1), may_alias));
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(pairs), "m"(*reinterpret_cast<const pair*>(p)));
    return sums;
}

// Rows rounded to bf16_pairs: one instruction for two inputs. Every other pair has a sum of its own, so that a row alone
// does not wait for each of its additions; together at the end.
//
// The rows are a pack of numbers: as loops over an array, gcc keeps the sums in memory.
template <int... R>
void bf16_dot_rows(const float* const* x, const void* w, int64_t k, float* out, std::integer_sequence<int, R...>) {
    const float* p = static_cast<const float*>(w);
    const uint8_t* const row[] = {reinterpret_cast<const uint8_t*>(x[R])...};
    v16 first[] = {(static_cast<void>(R), zero16())...}, second[] = {(static_cast<void>(R), zero16())...};
    const int64_t bytes = (k + 1) / 2 * 4;  // of a row
    int64_t at = 0;
    for (; at + 8 <= bytes; at += 8) {
        ask_ahead<Form::bf16, sizeof...(R)>(p + at * 4);
        ask_ahead<Form::bf16, sizeof...(R)>(p + at * 4 + 16);
        const v16 even = load(p + at * 4), odd = load(p + at * 4 + 16);
        ((first[R] = dot_pairs(first[R], even, row[R] + at)), ...);
        ((second[R] = dot_pairs(second[R], odd, row[R] + at + 4)), ...);
    }
    if (at < bytes) {
        const v16 last = load(p + at * 4);
        ((first[R] = dot_pairs(first[R], last, row[R] + at)), ...);
    }
    (store(out + R * 16, first[R] + second[R]), ...);
}
template <int R>
void bf16_dot_tile(const float* const* x, const void* w, int64_t k, float* out) {
    bf16_dot_rows(x, w, k, out, std::make_integer_sequence<int, R>());
}

template <int... R>
constexpr std::array<TileFn, most_rows + 1> dot_table(std::integer_sequence<int, R...>) {
    return {nullptr, bf16_dot_tile<R + 1>...};
}
constexpr auto dot_tiles = dot_table(std::make_integer_sequence<int, most_rows>());

#endif

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

TileFn tile_function(int rows, Form form, [[maybe_unused]] Rounding rounding) {
    if (rows < 1 || rows > most_rows) return nullptr;
    const auto at = static_cast<size_t>(rows);
#if defined(__AVX512BF16__)
    if (rounding == Rounding::bf16_pairs) return dot_tiles[at];
#endif
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
