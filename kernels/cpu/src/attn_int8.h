// Inner products of attention for int8 caches: exact integer sums of codes x 15-bit factors, scaled afterwards.
//
// Factors (queries; weights of values) are whole numbers of -32512..32512 times one scale for a group: two bytes each,
// where activations of quantised weights have one (quant.h), because a cache is small beside the weights and its products
// are few. Codes are unsigned bytes in quads: [16 lanes][4 inputs]. A group is 128 inputs, so that its sum fits 32 bits.
#pragma once
#include "attn_dots.h"
#include "quant.h"

namespace tmlc {

constexpr int64_t factor_group = 128;
constexpr float factor_peak = 32512.0f;  // 127 * 256: both bytes of a factor stay signed bytes

// A row of factors takes 2 bytes each: the high bytes, then (`plane` bytes on) the low ones where there is VNNI, else
// 16-bit numbers. `plane` is the number of factors, rounded up to 16.
#if defined(__AVX512VNNI__)
constexpr int int8_rows = 4;
constexpr int64_t quad_bytes = 4;
struct Codes { __m512i all; };
struct IntSums { __m512i hi, lo; };
TMLC_INLINE void clear(IntSums& s) { s.hi = s.lo = _mm512_setzero_si512(); }
TMLC_INLINE Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
TMLC_INLINE void add_quad(IntSums& s, const Codes& c, const uint8_t* x, int64_t plane) {
    s.hi = dot_bytes(s.hi, c.all, x);
    s.lo = dot_bytes(s.lo, c.all, x + plane);
}
TMLC_INLINE w16 total_of(const IntSums& s) { return (reinterpret_cast<w16>(s.hi) << 8) + reinterpret_cast<w16>(s.lo); }
TMLC_INLINE void store_codes(uint8_t* row, int64_t at, int64_t plane, w16 c) {
    const __m512i all = reinterpret_cast<__m512i>(c);
    const __m512i hi = reinterpret_cast<__m512i>((c + splat_int(128)) >> 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + at), _mm512_maskz_cvtepi32_epi8(0xffff, hi));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + plane + at), _mm512_maskz_cvtepi32_epi8(0xffff, all));
}
#else
constexpr int64_t quad_bytes = 8;
TMLC_INLINE void store_codes(uint8_t* row, int64_t at, int64_t, w16 c) {
    int32_t wide[16];
    int16_t narrow[16];
    detail::store(wide, c);
    for (int i = 0; i < 16; ++i) narrow[i] = static_cast<int16_t>(wide[i]);
    std::memcpy(row + 2 * at, narrow, sizeof narrow);
}
#if defined(__AVX2__)
constexpr int int8_rows = 1;
struct Codes { __m256i part[4]; };  // four rows of 16 lanes each, 4 inputs a lane, as 16-bit numbers
struct IntSums { __m256i part[4]; };  // two sums of pairs a lane
TMLC_INLINE void clear(IntSums& s) { for (auto& p : s.part) p = _mm256_setzero_si256(); }
TMLC_INLINE Codes load_codes(const uint8_t* p) {
    Codes c;
    for (int i = 0; i < 4; ++i)
        c.part[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
    return c;
}
TMLC_INLINE void add_quad(IntSums& s, const Codes& c, const uint8_t* x, int64_t) {
    int64_t four;
    std::memcpy(&four, x, 8);
    const __m256i values = _mm256_set1_epi64x(four);
    for (int i = 0; i < 4; ++i) s.part[i] = _mm256_add_epi32(s.part[i], _mm256_madd_epi16(c.part[i], values));
}
TMLC_INLINE w16 total_of(const IntSums& s) {
    const auto pairs = [](__m256i a, __m256i b) {
        return reinterpret_cast<i32n>(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8));
    };
    return {pairs(s.part[0], s.part[1]), pairs(s.part[2], s.part[3])};
}
#elif defined(__SSE2__)
constexpr int int8_rows = 1;
struct Codes { __m128i part[8]; };
struct IntSums { __m128i part[8]; };
TMLC_INLINE void clear(IntSums& s) { for (auto& p : s.part) p = _mm_setzero_si128(); }
TMLC_INLINE Codes load_codes(const uint8_t* p) {
    Codes c;
    for (int i = 0; i < 4; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
        c.part[2 * i] = _mm_unpacklo_epi8(bytes, _mm_setzero_si128());
        c.part[2 * i + 1] = _mm_unpackhi_epi8(bytes, _mm_setzero_si128());
    }
    return c;
}
TMLC_INLINE void add_quad(IntSums& s, const Codes& c, const uint8_t* x, int64_t) {
    int64_t four;
    std::memcpy(&four, x, 8);
    const __m128i values = _mm_set1_epi64x(four);
    for (int i = 0; i < 8; ++i) s.part[i] = _mm_add_epi32(s.part[i], _mm_madd_epi16(c.part[i], values));
}
TMLC_INLINE w16 total_of(const IntSums& s) {
    const auto pairs = [](__m128i a, __m128i b) {
        const __m128 p = _mm_castsi128_ps(a), q = _mm_castsi128_ps(b);
        const __m128i even = _mm_castps_si128(_mm_shuffle_ps(p, q, 0x88)), odd = _mm_castps_si128(_mm_shuffle_ps(p, q, 0xdd));
        return reinterpret_cast<i32n>(_mm_add_epi32(even, odd));
    };
    return {{pairs(s.part[0], s.part[1]), pairs(s.part[2], s.part[3])}, {pairs(s.part[4], s.part[5]), pairs(s.part[6], s.part[7])}};
}
#else
constexpr int int8_rows = 1;
struct Codes { const uint8_t* p; };
struct IntSums { int32_t lane[16]; };
TMLC_INLINE void clear(IntSums& s) { std::memset(&s, 0, sizeof s); }
TMLC_INLINE Codes load_codes(const uint8_t* p) { return {p}; }
TMLC_INLINE void add_quad(IntSums& s, const Codes& c, const uint8_t* x, int64_t) {
    int16_t values[4];
    std::memcpy(values, x, sizeof values);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) s.lane[i] += c.p[4 * i + j] * values[j];
}
TMLC_INLINE w16 total_of(const IntSums& s) {
    w16 v;
    detail::load(v, s.lane);
    return v;
}
#endif
#endif

// The largest magnitude, any NaN above infinity above numbers (as bits they are in that order).
TMLC_INLINE v16 larger_size(v16 top, v16 x) {
    const v16 size = abs16(x);
    return choose(float_to_bits(top) < float_to_bits(size), size, top);
}
TMLC_INLINE float largest_size(v16 top) { return first_lane<float>(fold_lanes(top, [](v16 a, v16 b) { return larger_size(a, b); })); }
TMLC_INLINE int32_t sum_ints(w16 v) { return first_lane<int32_t>(fold_lanes(v, [](w16 a, w16 b) { return a + b; })); }

// What a group of rounded factors needs beside its codes. NaN where a factor was not a finite number.
struct Rounded { float scale; int32_t sum; };

// Rounds sixteen factors at a time, x(0) .. x(vectors - 1), to the codes [at, at + 16 * vectors) of a row.
template <class X>
TMLC_INLINE Rounded round_factors(int64_t vectors, uint8_t* row, int64_t at, int64_t plane, float peak, const X& x) {
    const bool usable = peak <= 3.4028235e38f, flat = peak < 1e-30f;
    const v16 to_code = splat(usable && !flat ? factor_peak / peak : 0.0f), magic = splat(12582912.0f);
    w16 sum = splat_int(0);
    for (int64_t i = 0; i < vectors; ++i) {
        const w16 c = usable ? float_to_bits(fma(x(i), to_code, magic)) - float_to_bits(magic) : splat_int(0);
        store_codes(row, at + 16 * i, plane, c);
        sum = sum + c;
    }
    return {!usable ? NAN : flat ? 0.0f : peak / factor_peak, sum_ints(sum)};
}

// A query: its codes, then one scale, then the sums of codes of its groups.
struct IntQuery {
    int64_t plane, groups;
    explicit IntQuery(int64_t d) : plane(round_up(d, 16)), groups((d + factor_group - 1) / factor_group) {}
    int64_t bytes() const { return round_up(2 * plane + 4 + 4 * groups, 64); }
    float& scale(uint8_t* q) const { return *reinterpret_cast<float*>(q + 2 * plane); }
    int32_t* sums(uint8_t* q) const { return reinterpret_cast<int32_t*>(q + 2 * plane + 4); }
    float scale(const uint8_t* q) const { return *reinterpret_cast<const float*>(q + 2 * plane); }
    const int32_t* sums(const uint8_t* q) const { return reinterpret_cast<const int32_t*>(q + 2 * plane + 4); }
};
inline void round_query(const float* x, int64_t d, uint8_t* q) {
    const IntQuery form(d);
    v16 top = zero16();
    for (int64_t i = 0; i < d; i += 16) top = larger_size(top, load_n(x + i, d - i));
    const float peak = largest_size(top);
    for (int64_t g = 0; g < form.groups; ++g) {
        const int64_t at = g * factor_group, count = d - at < factor_group ? d - at : factor_group;
        const auto part = [&](int64_t i) { return load_n(x + at + 16 * i, count - 16 * i); };
        const Rounded r = round_factors((count + 15) / 16, q, at, form.plane, peak, part);
        form.scale(q) = r.scale;
        form.sums(q)[g] = r.sum;
    }
}

// out[t][b] = q[t] . keys of block b, as float_scores.
template <int T, int B>
__attribute__((noinline)) void int8_scores(const uint8_t* q, int64_t q_bytes, int64_t d, const uint8_t* const* k, float* out,
                                           int64_t out_stride) {
    constexpr int64_t ahead = 6144;
    const IntQuery form(d);
    const int64_t quads = (d + 3) / 4;
    for (int b = 0; b < B; ++b) __builtin_prefetch(k[b] + 64 * quads + ahead, 0, 2);  // the scales
    v16 acc[T][B];
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = zero16();
    for (int64_t g = 0; g < form.groups; ++g) {
        IntSums sums[T][B];
        TMLC_UNROLL for (int t = 0; t < T; ++t)
            TMLC_UNROLL for (int b = 0; b < B; ++b) clear(sums[t][b]);
        const int64_t end = quads < (g + 1) * (factor_group / 4) ? quads : (g + 1) * (factor_group / 4);
        for (int64_t i = g * (factor_group / 4); i < end; ++i)
            TMLC_UNROLL for (int b = 0; b < B; ++b) {
                __builtin_prefetch(k[b] + 64 * i + ahead, 0, 2);
                const Codes codes = load_codes(k[b] + 64 * i);
                TMLC_UNROLL for (int t = 0; t < T; ++t) add_quad(sums[t][b], codes, q + t * q_bytes + quad_bytes * i, form.plane);
            }
        TMLC_UNROLL for (int t = 0; t < T; ++t) {
            const w16 offset = splat_int(128 * form.sums(q + t * q_bytes)[g]);
            TMLC_UNROLL for (int b = 0; b < B; ++b) acc[t][b] = acc[t][b] + to_float(total_of(sums[t][b]) - offset);
        }
    }
    TMLC_UNROLL for (int b = 0; b < B; ++b) {
        const v16 scale = load(reinterpret_cast<const float*>(k[b] + 64 * quads));
        TMLC_UNROLL for (int t = 0; t < T; ++t)
            store(out + t * out_stride + b * 16, acc[t][b] * (splat(form.scale(q + t * q_bytes)) * scale));
    }
}

// acc[t] += the weighted values of one group of positions: n blocks of 16 whose values begin at v[i] and whose weights are
// the codes at x[t] + i * 16 inputs. C vectors of 16 columns.
template <int T, int C>
__attribute__((noinline)) void int8_values(const uint8_t* x, int64_t x_bytes, int64_t plane, const Rounded* groups,
                                           int64_t groups_stride, const uint8_t* const* v, int64_t n, int64_t dv,
                                           int64_t column, float* acc, int64_t acc_stride) {
    constexpr int64_t ahead = 6144;
    const int64_t wide = round_up(dv, 4), lines = column == 0 ? 4 * wide : 0;  // the first columns fetch all of a row
    IntSums sums[T][C];
    TMLC_UNROLL for (int t = 0; t < T; ++t)
        TMLC_UNROLL for (int c = 0; c < C; ++c) clear(sums[t][c]);
    for (int64_t i = 0; i < n; ++i) {
        if (v[i] == nullptr) continue;  // no row of the tile sees these positions: their weights are zero
        for (int64_t quad = 0; quad < 4; ++quad) {
            const uint8_t* row = v[i] + (quad * wide + column) * 4;
            for (int64_t line = 0; line < lines; line += 64) __builtin_prefetch(row + line + ahead, 0, 2);
            TMLC_UNROLL for (int c = 0; c < C; ++c) {
                uint8_t padded[64];
                const uint8_t* from = row + 64 * c;
                if (C == 1 && wide - column < 16) {
                    std::memset(padded, 0, sizeof padded);
                    std::memcpy(padded, from, static_cast<size_t>(4 * (wide - column)));
                    from = padded;
                }
                const Codes codes = load_codes(from);
                TMLC_UNROLL for (int t = 0; t < T; ++t) add_quad(sums[t][c], codes, x + t * x_bytes + quad_bytes * (4 * i + quad), plane);
            }
        }
    }
    TMLC_UNROLL for (int t = 0; t < T; ++t) {
        const Rounded& r = groups[t * groups_stride];
        TMLC_UNROLL for (int c = 0; c < C; ++c) {
            float* to = acc + t * acc_stride + column + 16 * c;
            store(to, fma(splat(r.scale), to_float(total_of(sums[t][c]) - splat_int(128 * r.sum)), load(to)));
        }
    }
}

}  // namespace tmlc
