// Elementary functions in double precision, with the same bits on every machine.
//
// The C library's differ in their last bits from one version or processor to another (it picks variants with fused
// multiply-add at run time). These are made of +, -, * and / alone, which IEEE 754 defines to the last bit, and the library is
// compiled without contraction: what depends on them has the same bits wherever it runs. Errors are about 2 ulp.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace tmlc {

// ln x. Zero gives -infinity, anything below or NaN gives NaN. With x = 2^e·m, m in [√½, √2), and s = (m-1)/(m+1):
// ln m = 2·(s + s³/3 + s⁵/5 + …).
inline double log_real(double x) {
    constexpr double ln2_high = 0x1.62e42fef8p-1, ln2_low = 0x1.1cf79abc9e3b4p-36;  // the high part has 34 bits
    if (!(x > 0.0)) return x == 0.0 ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    if (x > std::numeric_limits<double>::max()) return x;
    int64_t exponent = 0;
    if (x < std::numeric_limits<double>::min()) x *= 0x1p54, exponent = -54;
    int64_t bits;
    std::memcpy(&bits, &x, 8);
    constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
    const int64_t steps = (bits - root_half) >> 52;
    bits -= static_cast<int64_t>(static_cast<uint64_t>(steps) << 52);
    double m;
    std::memcpy(&m, &bits, 8);
    const double f = m - 1.0, s = f / (m + 1.0), z = s * s;
    double series = 0.0;
    for (const double share : {1. / 23, 1. / 21, 1. / 19, 1. / 17, 1. / 15, 1. / 13, 1. / 11, 1. / 9, 1. / 7, 1. / 5, 1. / 3})
        series = series * z + share;
    const double e = static_cast<double>(exponent + steps);
    // 2s = f - s·f: the large part is exact.
    return e * ln2_high + (f - (s * (f - 2.0 * (z * series)) - e * ln2_low));
}

// log10 x, by ln x.
inline double log10_real(double x) { return log_real(x) * 0.43429448190325182765; }

// Cosine and sine of an angle of up to a million turns, either way.
inline void cos_sin_real(double angle, double& cosine, double& sine) {
    // pi/2 in three parts of 33 bits: their products with a whole number below 2^20 are exact.
    constexpr double part1 = 0x1.921fb544p+0, part2 = 0x1.0b4611a6p-34, part3 = 0x1.3198a2e037073p-69;
    const double shifted = angle * 0.63661977236758134308 + 6755399441055744.0;  // 1.5 * 2^52: rounds to a whole number
    const double turns = shifted - 6755399441055744.0;
    int64_t quadrant;
    std::memcpy(&quadrant, &shifted, 8);
    const double x = ((angle - turns * part1) - turns * part2) - turns * part3, u = x * x;
    double s = 0.0, c = 0.0;
    for (const double share : {1. / 342, 1. / 272, 1. / 210, 1. / 156, 1. / 110, 1. / 72, 1. / 42, 1. / 20, 1. / 6})
        s = (1.0 - s) * u * share;
    for (const double share : {1. / 306, 1. / 240, 1. / 182, 1. / 132, 1. / 90, 1. / 56, 1. / 30, 1. / 12, 1. / 2})
        c = (1.0 - c) * u * share;
    s = x - x * s;
    c = 1.0 - c;
    const double along = (quadrant & 1) != 0 ? s : c, across = (quadrant & 1) != 0 ? c : s;
    cosine = ((quadrant + 1) & 2) != 0 ? -along : along;
    sine = (quadrant & 2) != 0 ? -across : across;
}

}  // namespace tmlc
