// A mixed-radix discrete Fourier transform of real frames in double precision, for any length.
//
// Stockham's autosort form (decimation in frequency): each stage reads one buffer and writes the other, and the result
// comes out in natural order. Factors 2, 3, 4 and 5 have their own butterflies; any other prime p costs p
// multiplications per point. Even lengths N are done as a complex transform of N/2 points.
#pragma once
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace tmlc {

struct Complex {
    double re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
inline Complex minus_i(Complex a) { return {a.im, -a.re}; }

// exp(-2*pi*i*k/n) for k = 0 … count-1, n <= 2^20. In whole numbers (60 bits behind the point), so that the tables are the
// same on every machine and no error accumulates.
inline std::vector<Complex> unit_roots(int64_t n, int64_t count) {
    constexpr int64_t one = int64_t{1} << 60, half_pi = 0x1921fb54442d1846;
    const auto product = [](int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<__int128>(a) * b >> 60); };
    std::vector<Complex> roots(static_cast<size_t>(count));
    for (int64_t k = 0; k < count; ++k) {
        const int64_t quadrant = 4 * k / n % 4, rest = 4 * k % n, near = 2 * rest > n ? n - rest : rest;
        const int64_t x = static_cast<int64_t>(static_cast<__int128>(half_pi) * near / n), u = product(x, x);  // x <= pi/4
        int64_t s = one, c = one;
        for (int64_t j = 21; j >= 3; j -= 2) s = one - product(s, u) / (j * (j - 1));
        for (int64_t j = 20; j >= 2; j -= 2) c = one - product(c, u) / (j * (j - 1));
        s = product(s, x);
        if (near != rest) std::swap(c, s);
        const auto real = [](int64_t v) { return static_cast<double>(v) * 0x1p-60; };
        const double cosine = real(quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s);
        roots[static_cast<size_t>(k)] = {cosine, -real(quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c)};
    }
    return roots;
}

// The complex transform X[k] = sum_j x[j]·exp(-2*pi*i*j*k/n). Building it allocates; running it does not.
class Fft {
    int64_t size_;
    std::vector<int64_t> factors_;
    std::vector<Complex> roots_;

    // One stage: `m` butterflies of `radix` points, each repeated for `s` interleaved transforms.
    template <int P>
    void stage(const Complex* x, Complex* y, int64_t m, int64_t s) const {
        Complex unit[P];
        for (int j = 0; j < P; ++j) unit[j] = roots_[static_cast<size_t>(j * (size_ / P))];
        for (int64_t q = 0; q < m; ++q) {
            Complex turn[P];
            for (int k = 0; k < P; ++k) turn[k] = roots_[static_cast<size_t>(q * k * s)];
            for (int64_t i = 0; i < s; ++i) {
                const Complex* from = x + q * s + i;
                Complex* to = y + q * P * s + i;
                if constexpr (P == 2) {
                    const Complex a = from[0], b = from[m * s];
                    to[0] = a + b;
                    to[s] = (a - b) * turn[1];
                } else if constexpr (P == 4) {
                    const Complex a = from[0], b = from[m * s], c = from[2 * m * s], d = from[3 * m * s];
                    const Complex ac = a + c, a_c = a - c, bd = b + d, b_d = minus_i(b - d);
                    to[0] = ac + bd;
                    to[s] = (a_c + b_d) * turn[1];
                    to[2 * s] = (ac - bd) * turn[2];
                    to[3 * s] = (a_c - b_d) * turn[3];
                } else {
                    Complex v[P];
                    for (int j = 0; j < P; ++j) v[j] = from[j * m * s];
                    for (int k = 0; k < P; ++k) {
                        Complex sum = v[0];
                        for (int j = 1; j < P; ++j) sum = sum + v[j] * unit[j * k % P];
                        to[k * s] = sum * turn[k];
                    }
                }
            }
        }
    }

    void stage_of(int64_t p, const Complex* x, Complex* y, int64_t m, int64_t s) const {
        const int64_t unit = size_ / p;
        for (int64_t q = 0; q < m; ++q)
            for (int64_t k = 0; k < p; ++k)
                for (int64_t i = 0; i < s; ++i) {
                    Complex sum = x[q * s + i];
                    for (int64_t j = 1, jk = k; j < p; ++j, jk = jk + k < p ? jk + k : jk + k - p)
                        sum = sum + x[(q + m * j) * s + i] * roots_[static_cast<size_t>(jk * unit)];
                    y[(q * p + k) * s + i] = sum * roots_[static_cast<size_t>(q * k * s)];
                }
    }

public:
    explicit Fft(int64_t size) : size_(size), roots_(unit_roots(size, size)) {
        int64_t rest = size;
        for (const int64_t p : {4, 2, 3, 5})
            for (; rest % p == 0; rest /= p) factors_.push_back(p);
        for (int64_t p = 7; rest > 1; p = p * p > rest ? rest : p + 2)
            for (; rest % p == 0; rest /= p) factors_.push_back(p);
    }

    int64_t size() const { return size_; }

    // Transforms `data` (size() points), using `work` (as many): returns the one of the two that holds the result.
    Complex* run(Complex* data, Complex* work) const {
        int64_t n = size_, s = 1;
        for (const int64_t p : factors_) {
            const int64_t m = n / p;
            switch (p) {
                case 2: stage<2>(data, work, m, s); break;
                case 3: stage<3>(data, work, m, s); break;
                case 4: stage<4>(data, work, m, s); break;
                case 5: stage<5>(data, work, m, s); break;
                default: stage_of(p, data, work, m, s);
            }
            std::swap(data, work);
            n = m;
            s *= p;
        }
        return data;
    }
};

// |X[k]|², k = 0 … n/2, of a real frame of n ≥ 1 samples.
class RealFft {
    int64_t size_;
    Fft inner_;
    std::vector<Complex> half_roots_;

public:
    explicit RealFft(int64_t size)
        : size_(size), inner_(size % 2 ? size : size / 2), half_roots_(unit_roots(size, size % 2 ? 0 : size / 2)) {}

    int64_t size() const { return size_; }
    int64_t bins() const { return size_ / 2 + 1; }
    int64_t work_size() const { return 2 * inner_.size(); }   // in Complex

    // Puts sample j of the frame into `work` before power(): pairs of samples share a point when the length is even.
    void put(Complex* work, int64_t j, double sample) const {
        if (size_ % 2)
            work[j] = {sample, 0.0};
        else if (j % 2)
            work[j / 2].im = sample;
        else
            work[j / 2].re = sample;
    }

    // Reads the frame put into `work` (work_size() points, overwritten); writes bins() values.
    void power(Complex* work, double* out) const {
        const int64_t half = inner_.size();
        const Complex* z = inner_.run(work, work + half);
        if (size_ % 2) {
            for (int64_t k = 0; k < bins(); ++k) out[k] = z[k].re * z[k].re + z[k].im * z[k].im;
            return;
        }
        out[0] = (z[0].re + z[0].im) * (z[0].re + z[0].im);
        out[half] = (z[0].re - z[0].im) * (z[0].re - z[0].im);
        for (int64_t k = 1; k < half; ++k) {
            const Complex a = z[k], b = {z[half - k].re, -z[half - k].im};
            const Complex x = (a + b) + half_roots_[static_cast<size_t>(k)] * minus_i(a - b);   // twice the bin
            out[k] = 0.25 * (x.re * x.re + x.im * x.im);
        }
    }
};

}  // namespace tmlc
