// The instruction roofline of docs/performance.md: sums in registers, as many as hide the latency, and nothing else.
//
// Each instruction set multiplies with what its product kernels use (gemm.cpp, quant.h): bf16 without `vdpbf16ps` by float32
// products, bytes without VNNI by pairs of 16-bit integers.
#include "peak.h"

#include <atomic>

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace tmlc {
namespace {

#if defined(__AVX512F__)
constexpr int sums = 16;
#else
constexpr int sums = 12 / (16 / native_lanes) > 0 ? 12 / (16 / native_lanes) : 1;  // of sixteen lanes each
#endif

// What the compiler must believe may have changed, so that it neither folds rounds together nor leaves them out.
template <class T>
TMLC_INLINE void keep(T& v) {
    asm volatile("" : "+m"(v));
}

float run_f32(int64_t rounds) {
    float one = 1.0f, tiny = 1e-30f;
    keep(one), keep(tiny);
    const v16 a = splat(one), b = splat(tiny);
    v16 acc[sums];
    for (v16& v : acc) v = zero16();
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < sums; ++i) acc[i] = fma(a, b, acc[i]);
    }
    v16 all = zero16();
    for (const v16& v : acc) all = all + v;
    return sum_lanes(all);
}
constexpr int64_t per_round_f32 = sums * 16;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr int chains = 16;
#define TMLC_EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define TMLC_ZERO(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n\t"
#define TMLC_DOTS(i) "vdpbf16ps %%zmm20, %%zmm21, %%zmm" #i "\n\t"
#define TMLC_BYTES(i) "vpdpbusd %%zmm20, %%zmm21, %%zmm" #i "\n\t"
#define TMLC_ROUNDS(DOT)                                                                                              \
    asm volatile("vpxord %%zmm20, %%zmm20, %%zmm20\n\tvpxord %%zmm21, %%zmm21, %%zmm21\n\t" TMLC_EACH(TMLC_ZERO)        \
                 "1:\n\t" TMLC_EACH(DOT) "dec %0\n\tjnz 1b\n\tvmovss %%xmm0, %1\n\t"                                     \
                 : "+r"(rounds), "=m"(lane)                                                                           \
                 :                                                                                                    \
                 : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",      \
                   "zmm12", "zmm13", "zmm14", "zmm15", "zmm20", "zmm21", "cc")
float run_bf16(int64_t rounds) {
    float lane;
    TMLC_ROUNDS(TMLC_DOTS);
    return lane;
}
float run_int8(int64_t rounds) {
    float lane;
    TMLC_ROUNDS(TMLC_BYTES);
    return lane;
}
constexpr int64_t per_round_bf16 = chains * 32, per_round_int8 = chains * 64;
#else
float run_bf16(int64_t rounds) { return run_f32(rounds); }
constexpr int64_t per_round_bf16 = per_round_f32;

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int chains = 12, macs = 16;
float run_int8(int64_t rounds) {
    int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(0);
    keep(a), keep(b);
    int32x4_t acc[chains];
    for (auto& v : acc) v = vdupq_n_s32(0);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < chains; ++i) acc[i] = vdotq_s32(acc[i], a, b);
#pragma GCC unroll 16
        for (int i = 0; i < chains; ++i) keep(acc[i]);
    }
    int32_t all = 0;
    for (const auto& v : acc) all += vaddvq_s32(v);
    return static_cast<float>(all);
}
constexpr int64_t per_round_int8 = chains * macs;
#elif defined(__SSE2__)
#if defined(__AVX2__)
typedef __m256i Words;
TMLC_INLINE Words add_products(Words sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
TMLC_INLINE Words all_of(int16_t x) { return _mm256_set1_epi16(x); }
#else
typedef __m128i Words;
TMLC_INLINE Words add_products(Words sum, Words a, Words b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
TMLC_INLINE Words all_of(int16_t x) { return _mm_set1_epi16(x); }
#endif
constexpr int chains = 8;
float run_int8(int64_t rounds) {
    Words acc[chains], b = all_of(0);
    asm volatile("" : "+x"(b));  // the compiler must not know that these are zeros
    for (Words& v : acc) v = all_of(0);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) {
            Words a = b;
            asm volatile("" : "+x"(a));  // another one each time, as far as the compiler knows
            acc[i] = add_products(acc[i], a, b);
        }
    }
    int32_t lane = 0;
    for (const Words& v : acc) {
        int32_t first;
        std::memcpy(&first, &v, sizeof first);
        lane += first;
    }
    return static_cast<float>(lane);
}
constexpr int64_t per_round_int8 = chains * static_cast<int64_t>(sizeof(Words)) / 2;
#else
float run_int8(int64_t rounds) { return run_f32(rounds); }
constexpr int64_t per_round_int8 = per_round_f32;
#endif
#endif

}  // namespace

int64_t multiply_adds(Parallel& par, Product product, int64_t units, int64_t rounds, float& sink) {
    const auto run = product == Product::f32 ? run_f32 : product == Product::bf16 ? run_bf16 : run_int8;
    const int64_t per_round = product == Product::f32 ? per_round_f32 : product == Product::bf16 ? per_round_bf16 : per_round_int8;
    std::atomic<float> last{0.0f};
    par.split(units, units * rounds * per_round, [&](int64_t begin, int64_t end, int) {
        for (int64_t u = begin; u < end; ++u) last.store(run(rounds), std::memory_order_relaxed);
    });
    sink = last.load();
    return units * rounds * per_round;
}

}  // namespace tmlc
