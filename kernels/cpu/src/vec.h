// Sixteen floats at a time, from one source for every instruction set.
//
// `v16` is one native vector where the machine has 512-bit registers, and a tree of native vectors elsewhere (a
// 64-byte GCC vector would live on the stack there). All kernels compute every element through v16, tails padded, so
// that an element's bits depend neither on its column nor on how many rows a call has. The library is compiled without
// contraction: `fma` is the only multiply-add that rounds once, and it is spelled out wherever one is wanted. It does so
// on every machine but x86 without FMA, where it multiplies and adds unless TMLC_EXACT_FMA is defined (exact_fma.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(TMLC_EXACT_FMA)
#include "exact_fma.h"
#endif

#define TMLC_INLINE inline __attribute__((always_inline))
#define TMLC_LAMBDA_INLINE __attribute__((always_inline))

namespace tmlc {

#if defined(__AVX512F__)
constexpr int native_lanes = 16;
#elif defined(__AVX__)
constexpr int native_lanes = 8;
#else
constexpr int native_lanes = 4;
#endif

typedef float f32n __attribute__((vector_size(native_lanes * 4)));
typedef int32_t i32n __attribute__((vector_size(native_lanes * 4)));
typedef uint16_t u16n __attribute__((vector_size(native_lanes * 2)));

// Whether `fma` rounds once in this build.
#if defined(__AVX512F__) || defined(__FMA__) || (defined(__ARM_FEATURE_FMA) && defined(__ARM_NEON)) || defined(TMLC_EXACT_FMA)
constexpr bool fused = true;
#else
constexpr bool fused = false;
#endif

// Whether it multiplies pairs of bf16 numbers (`vdpbf16ps`), which rounds in a way that no other instruction set has.
#if defined(__AVX512BF16__)
constexpr bool bf16_dots = true;
#else
constexpr bool bf16_dots = false;
#endif

template <class T>
struct Two {
    T lo, hi;
};

#define TMLC_TWO(op) \
    template <class T> TMLC_INLINE auto operator op(Two<T> a, Two<T> b) -> Two<decltype(a.lo op b.lo)> { \
        return {a.lo op b.lo, a.hi op b.hi}; \
    }
TMLC_TWO(+) TMLC_TWO(-) TMLC_TWO(*) TMLC_TWO(/) TMLC_TWO(&) TMLC_TWO(|) TMLC_TWO(^) TMLC_TWO(<) TMLC_TWO(<=)
#undef TMLC_TWO

template <class V> struct Lanes;  // how many, and the integer vector of the same shape
template <> struct Lanes<f32n> { static constexpr int count = native_lanes; typedef i32n ints; };
template <> struct Lanes<i32n> { static constexpr int count = native_lanes; typedef i32n ints; };
template <class T> struct Lanes<Two<T>> {
    static constexpr int count = 2 * Lanes<T>::count;
    typedef Two<typename Lanes<T>::ints> ints;
};

#if defined(__AVX512F__)
typedef f32n v16;
#elif defined(__AVX__)
typedef Two<f32n> v16;
#else
typedef Two<Two<f32n>> v16;
#endif
typedef Lanes<v16>::ints w16;  // sixteen 32-bit integers

namespace detail {

TMLC_INLINE void load(f32n& v, const float* p) { std::memcpy(&v, p, sizeof v); }
TMLC_INLINE void load(i32n& v, const int32_t* p) { std::memcpy(&v, p, sizeof v); }
TMLC_INLINE void store(float* p, f32n v) { std::memcpy(p, &v, sizeof v); }
TMLC_INLINE void store(int32_t* p, i32n v) { std::memcpy(p, &v, sizeof v); }
TMLC_INLINE void widen(i32n& v, const uint16_t* p) {
    u16n half;
    std::memcpy(&half, p, sizeof half);
    v = __builtin_convertvector(half, i32n);
}
TMLC_INLINE void splat(f32n& v, float x) { v = x - f32n{}; }
TMLC_INLINE void splat(i32n& v, int32_t x) { v = x + i32n{}; }
TMLC_INLINE void fma(f32n& r, f32n a, f32n b, f32n c) {
#if defined(__AVX512F__)
    r = _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    r = _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA) && defined(__ARM_NEON)
    r = vfmaq_f32(c, a, b);
#elif defined(TMLC_EXACT_FMA)
    r = exact_fma(a, b, c);
#else
    r = a * b + c;
#endif
}
TMLC_INLINE f32n bits(i32n v) { return reinterpret_cast<f32n>(v); }
TMLC_INLINE i32n bits(f32n v) { return reinterpret_cast<i32n>(v); }
TMLC_INLINE f32n choose(i32n mask, f32n a, f32n b) { return mask ? a : b; }
TMLC_INLINE i32n shift_left(i32n v, int k) { return v << k; }
TMLC_INLINE i32n shift_right(i32n v, int k) { return v >> k; }
TMLC_INLINE f32n reverse(f32n v) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#elif defined(__AVX__)
    return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
#else
    return __builtin_shufflevector(v, v, 3, 2, 1, 0);
#endif
}

template <class T, class P> TMLC_INLINE void load(Two<T>& v, const P* p) {
    load(v.lo, p);
    load(v.hi, p + Lanes<T>::count);
}
template <class T, class P> TMLC_INLINE void store(P* p, Two<T> v) {
    store(p, v.lo);
    store(p + Lanes<T>::count, v.hi);
}
template <class T> TMLC_INLINE void widen(Two<T>& v, const uint16_t* p) {
    widen(v.lo, p);
    widen(v.hi, p + Lanes<T>::count);
}
template <class T, class S> TMLC_INLINE void splat(Two<T>& v, S x) {
    splat(v.lo, x);
    splat(v.hi, x);
}
template <class T> TMLC_INLINE void fma(Two<T>& r, Two<T> a, Two<T> b, Two<T> c) {
    fma(r.lo, a.lo, b.lo, c.lo);
    fma(r.hi, a.hi, b.hi, c.hi);
}
template <class T> TMLC_INLINE auto bits(Two<T> v) {
    auto lo = bits(v.lo);
    return Two<decltype(lo)>{lo, bits(v.hi)};
}
template <class M, class T> TMLC_INLINE Two<T> choose(Two<M> mask, Two<T> a, Two<T> b) {
    return {choose(mask.lo, a.lo, b.lo), choose(mask.hi, a.hi, b.hi)};
}
template <class T> TMLC_INLINE Two<T> shift_left(Two<T> v, int k) { return {shift_left(v.lo, k), shift_left(v.hi, k)}; }
template <class T> TMLC_INLINE Two<T> shift_right(Two<T> v, int k) { return {shift_right(v.lo, k), shift_right(v.hi, k)}; }
template <class T> TMLC_INLINE Two<T> reverse(Two<T> v) { return {reverse(v.hi), reverse(v.lo)}; }

}  // namespace detail

TMLC_INLINE v16 splat(float x) { v16 v; detail::splat(v, x); return v; }
TMLC_INLINE w16 splat_int(int32_t x) { w16 v; detail::splat(v, x); return v; }
TMLC_INLINE w16 lane_numbers() {
    constexpr int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    w16 v;
    detail::load(v, numbers);
    return v;
}
TMLC_INLINE v16 zero16() { return splat(0.0f); }

// Sixteen floats from or to any address.
TMLC_INLINE v16 load(const float* p) { v16 v; detail::load(v, p); return v; }
TMLC_INLINE void store(float* p, v16 v) { detail::store(p, v); }

// The first `count` (1..16) floats, the rest zero; nothing beyond them is touched.
TMLC_INLINE v16 load_n(const float* p, int64_t count) {
    if (count >= 16) return load(p);
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
    float tmp[16] = {};
    std::memcpy(tmp, p, static_cast<size_t>(count) * 4);
    return load(tmp);
#endif
}
TMLC_INLINE void store_n(float* p, v16 v, int64_t count) {
    if (count >= 16) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#else
    float tmp[16];
    store(tmp, v);
    std::memcpy(p, tmp, static_cast<size_t>(count) * 4);
#endif
}

TMLC_INLINE v16 fma(v16 a, v16 b, v16 c) { v16 r; detail::fma(r, a, b, c); return r; }
TMLC_INLINE v16 bits_to_float(w16 v) { return detail::bits(v); }
TMLC_INLINE w16 float_to_bits(v16 v) { return detail::bits(v); }
TMLC_INLINE v16 choose(w16 mask, v16 a, v16 b) { return detail::choose(mask, a, b); }  // lane by lane, mask 0 or -1
TMLC_INLINE v16 max16(v16 a, v16 b) { return choose(a < b, b, a); }
TMLC_INLINE v16 min16(v16 a, v16 b) { return choose(b < a, b, a); }
TMLC_INLINE v16 reverse(v16 v) { return detail::reverse(v); }
TMLC_INLINE v16 abs16(v16 v) { return bits_to_float(float_to_bits(v) & splat_int(0x7fffffff)); }

// bfloat16: the upper half of a float32.
TMLC_INLINE v16 load_bf16(const uint16_t* p) {
    w16 v;
    detail::widen(v, p);
    return bits_to_float(detail::shift_left(v, 16));
}
TMLC_INLINE v16 load_bf16_n(const uint16_t* p, int64_t count) {
    if (count >= 16) return load_bf16(p);
    uint16_t tmp[16] = {};
    std::memcpy(tmp, p, static_cast<size_t>(count) * 2);
    return load_bf16(tmp);
}
inline float bf16_to_float(uint16_t v) {
    const uint32_t u = static_cast<uint32_t>(v) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
TMLC_INLINE v16 round_bf16(v16 x) {  // the same for sixteen, which stay floats
    const w16 u = float_to_bits(x);
    const w16 odd = detail::shift_right(u, 16) & splat_int(1);
    const v16 rounded = bits_to_float((u + splat_int(0x7fff) + odd) & splat_int(static_cast<int32_t>(0xffff0000u)));
    return choose(x <= x, rounded, x);
}
// Sixteen pairs of bf16 (the packed weight layout): the even and the odd elements.
TMLC_INLINE void load_bf16_pairs(const uint16_t* p, v16& even, v16& odd) {
    w16 v;
    detail::load(v, reinterpret_cast<const int32_t*>(p));
    even = bits_to_float(detail::shift_left(v, 16));
    odd = bits_to_float(v & splat_int(static_cast<int32_t>(0xffff0000u)));
}

// Sums of lanes in one fixed tree.
inline float sum_lanes(v16 v) {
    float t[16];
    store(t, v);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
}
inline float max_lanes(v16 v) {
    float t[16];
    store(t, v);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) t[i] = t[i] < t[i + half] ? t[i + half] : t[i];
    return t[0];
}

// e^x to about 1 ulp; overflows to infinity, underflows to 0 below about -104; NaN stays NaN.
TMLC_INLINE v16 exp16(v16 x) {
    x = choose(x < splat(-110.0f), splat(-110.0f), x);
    x = choose(splat(89.0f) < x, splat(89.0f), x);
    const v16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const v16 shifted = fma(x, splat(1.44269504f), magic);
    const w16 n = float_to_bits(shifted) - float_to_bits(magic);
    const v16 k = shifted - magic;
    v16 r = fma(k, splat(-0.693359375f), x);
    r = fma(k, splat(2.12194440e-4f), r);
    v16 p = splat(0.00139345345f);
    p = fma(p, r, splat(0.00836376939f));
    p = fma(p, r, splat(0.0416664556f));
    p = fma(p, r, splat(0.166665733f));
    p = fma(p, r, splat(0.5f));
    p = fma(p * r, r, r) + splat(1.0f);
    const w16 half = detail::shift_right(n, 1);  // two steps, so that results near the limits stay right
    const w16 bias = splat_int(127);
    const v16 s1 = bits_to_float(detail::shift_left(half + bias, 23));
    const v16 s2 = bits_to_float(detail::shift_left(n - half + bias, 23));
    return p * s1 * s2;
}

// ln x for normal x > 0, to about 1 ulp.
TMLC_INLINE v16 log16(v16 x) {
    const w16 b = float_to_bits(x);
    const w16 e = detail::shift_right(b - splat_int(0x3f3504f3), 23);  // x = m * 2^e, m in [sqrt(1/2), sqrt(2))
    const v16 m = bits_to_float(b - detail::shift_left(e, 23));
    const v16 k = bits_to_float(e + splat_int(0x4b400000)) - splat(12582912.0f);
    const v16 f = m - splat(1.0f);
    v16 p = splat(0.0715135932f);
    p = fma(p, f, splat(-0.115730077f));
    p = fma(p, f, splat(0.116617613f));
    p = fma(p, f, splat(-0.124108292f));
    p = fma(p, f, splat(0.14249891f));
    p = fma(p, f, splat(-0.166684881f));
    p = fma(p, f, splat(0.200007096f));
    p = fma(p, f, splat(-0.249999896f));
    p = fma(p, f, splat(0.333333313f));
    const v16 f2 = f * f;
    v16 y = p * f * f2;
    y = fma(k, splat(-2.12194440e-4f), y);
    y = fma(f2, splat(-0.5f), y);
    return fma(k, splat(0.693359375f), f + y);
}

// ln(1 + x) for 0 <= x, without losing small x.
TMLC_INLINE v16 log1p16(v16 x) {
    const v16 w = x + splat(1.0f);
    return log16(w) + (x - (w - splat(1.0f))) / w;
}

// tanh x to about 2 ulp: an odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
TMLC_INLINE v16 tanh16(v16 x) {
    const v16 a = abs16(x), u = x * x;
    v16 p = splat(-0.00561808236f);
    p = fma(p, u, splat(0.020566579f));
    p = fma(p, u, splat(-0.0537195653f));
    p = fma(p, u, splat(0.133312345f));
    p = fma(p, u, splat(-0.333332747f));
    const v16 big = splat(1.0f) - splat(2.0f) / (exp16(a + a) + splat(1.0f));
    const v16 signed_big = bits_to_float(float_to_bits(big) | (float_to_bits(x) & splat_int(INT32_MIN)));
    const v16 y = choose(a < splat(0.625f), fma(p * u, x, x), signed_big);
    return choose(x <= x, y, x);  // NaN in, NaN out
}
TMLC_INLINE v16 sigmoid16(v16 x) { return splat(1.0f) / (splat(1.0f) + exp16(zero16() - x)); }
TMLC_INLINE v16 silu16(v16 x) { return x / (splat(1.0f) + exp16(zero16() - x)); }
// ln sigmoid(x) = min(x, 0) - ln(1 + e^-|x|)
TMLC_INLINE v16 log_sigmoid16(v16 x) { return min16(x, zero16()) - log1p16(exp16(zero16() - abs16(x))); }

// erf x to about 2 ulp: an odd polynomial below 1, 1 - e^(-x^2) q(1 / (1 + x/2)) above.
TMLC_INLINE v16 erf16(v16 x) {
    const v16 a = min16(abs16(x), splat(4.2f));
    const v16 u = a * a;
    v16 p = splat(-9.67359119e-06f);
    p = fma(p, u, splat(0.000112682537f));
    p = fma(p, u, splat(-0.000848439639f));
    p = fma(p, u, splat(0.00522105349f));
    p = fma(p, u, splat(-0.0268654376f));
    p = fma(p, u, splat(0.112837829f));
    p = fma(p, u, splat(-0.376126379f));
    p = fma(p, u, splat(1.12837923f));
    const v16 t = splat(1.0f) / fma(a, splat(0.5f), splat(1.0f));
    v16 q = splat(0.119259045f);
    q = fma(q, t, splat(-0.47088179f));
    q = fma(q, t, splat(0.562773108f));
    q = fma(q, t, splat(-0.10317263f));
    q = fma(q, t, splat(0.347565025f));
    q = fma(q, t, splat(0.259765804f));
    q = fma(q, t, splat(0.284898221f));
    q = fma(q, t, splat(-0.000153064801f));
    const v16 big = splat(1.0f) - exp16(zero16() - u) * q;
    const v16 y = choose(a < splat(1.0f), p * a, big);
    const v16 signed_y = bits_to_float(float_to_bits(y) | (float_to_bits(x) & splat_int(INT32_MIN)));
    return choose(x <= x, signed_y, x);  // NaN in, NaN out
}

}  // namespace tmlc
