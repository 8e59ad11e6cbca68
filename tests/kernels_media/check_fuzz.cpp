// Shows that what `check` of the media and random kernels accepts also runs inside its operands: valid calls are made
// at random, a few of their numbers are changed, and every call that is still accepted runs on blocks of exactly its
// size, under the sanitizers. Prints how many calls each operation refused and ran.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "op.h"

using namespace tmlc;

namespace {

std::mt19937_64 engine(1);

int64_t pick(int64_t lo, int64_t hi) {
    return lo + static_cast<int64_t>(engine() % static_cast<uint64_t>(hi - lo + 1));
}

struct Case {
    std::vector<TensorInfo> t;
    std::vector<int64_t> i;
    std::vector<double> f;
    int64_t max_n;
};

TensorInfo tensor(Space space, DType dtype, int64_t a, int64_t b, int64_t cols) {
    const bool weight = space == Space::weight;
    return {space, dtype, 0, a, b, cols, cols + (weight || b == 1 ? 0 : pick(0, 3))};
}

TensorInfo rows(DType dtype, int64_t a, int64_t b, int64_t cols) { return tensor(Space::arena, dtype, a, b, cols); }
TensorInfo fixed(DType dtype, int64_t b, int64_t cols) { return tensor(Space::weight, dtype, 0, b, cols); }
TensorInfo kept(int64_t cols) { return tensor(Space::slot, DType::f32, 0, 1, cols); }

Case valid(const std::string& name) {
    const int64_t a = pick(0, 3), b = pick(0, 2), n = pick(1, 9);
    const DType f32 = DType::f32;
    if (name == "bag_embedding") {
        const int64_t bins = pick(1, 9), levels = pick(1, 6), d = pick(1, 600);
        const DType dtype = pick(0, 1) ? f32 : DType::bf16;
        return {{rows(f32, a, b, d), rows(DType::i32, a, b, bins), fixed(dtype, bins * levels, d)}, {levels}, {}, n};
    }
    if (name == "dmel") {
        const int64_t window = pick(2, 130), hop = pick(1, window - 1), bins = pick(1, 9);
        return {{rows(DType::i32, a, b, bins), rows(f32, a, b, hop), fixed(f32, 1, window),
                 fixed(f32, bins, window / 2 + 1), kept(window - hop)},
                {pick(1, 40)}, {-7.0, 2.0}, n};
    }
    if (name == "patchify") {
        const int64_t folds = pick(1, 3);
        int64_t depth = 1, side = 1, leaf = 0, leaves = 1;
        std::vector<int64_t> fold;
        for (int64_t k = 0; k < folds; ++k) {
            const int64_t t = pick(1, 2), s = pick(1, 3);
            fold.insert(fold.end(), {t, s});
            depth *= t;
            side *= s;
            if (k == 0) leaf = 3 * t * s * s;
            else leaves *= t * s * s;
        }
        const int64_t high = pick(1, 3), wide = pick(1, 3), H = side * high, out = high * wide * leaves;
        std::vector<int64_t> i{depth, H, side, folds};
        i.insert(i.end(), fold.begin(), fold.end());
        return {{rows(f32, a * out, b * out, leaf), rows(DType::u8, a * depth * H, b * depth * H, side * wide * 3)},
                i, {0.5, 0.4, 0.3, 0.2, 0.3, 0.4}, n};
    }
    if (name == "overlap_add") {
        const int64_t window = pick(2, 60), hop = pick(1, window - 1);
        return {{rows(f32, a, b, hop), rows(f32, a, b, window), fixed(f32, 1, window), kept(window - hop)}, {}, {}, n};
    }
    if (name == "philox_normal") return {{rows(f32, a, b, pick(1, 90)), rows(DType::i64, a, b, 3)}, {}, {}, n};
    return {{rows(DType::i32, a, b, 1), rows(f32, a, b, pick(1, 9000)), rows(DType::i64, a, b, 3), rows(f32, a, b, 1)},
            {}, {}, n};
}

int64_t odd_number(int64_t value) {
    const int64_t choices[] = {0, 1, -1, 2, value / 2 + value / 3, value - value / 3, value ^ 1, value / 2, 65536,
                               65537, int64_t{1} << 31, int64_t{1} << 62, INT64_MIN, INT64_MAX, pick(0, 64)};
    return choices[pick(0, sizeof choices / sizeof *choices - 1)];
}

template <class T>
T& any(std::vector<T>& list) {
    return list[static_cast<size_t>(pick(0, static_cast<int64_t>(list.size()) - 1))];
}

template <class T>
void longer_or_shorter(std::vector<T>& list) {
    if (list.size() > 1 && pick(0, 1))
        list.pop_back();
    else
        list.push_back(list.empty() ? T{} : T(list[0]));
}

// Tensor fields stay in the range that the executor guarantees before it calls check.
void change(Case& c) {
    TensorInfo& t = any(c.t);
    const int64_t most = int64_t{1} << 24;
    switch (pick(0, 10)) {
        case 0: t.dtype = DType(pick(0, 4)); break;
        case 1: t.a = std::min(most, std::max<int64_t>(0, odd_number(t.a))); break;
        case 2: t.b = std::min(most, std::max<int64_t>(0, odd_number(t.b))); break;
        case 3: t.cols = std::min(int64_t{1} << 31, std::max<int64_t>(1, odd_number(t.cols))); break;
        case 4: t.stride = t.cols + pick(0, 9); break;
        case 5: t.space = Space(pick(0, 2)); break;
        case 6:
            if (!c.i.empty()) {
                int64_t& number = any(c.i);
                number = odd_number(number);
            }
            break;
        case 7:
            if (!c.f.empty()) any(c.f) = pick(0, 1) ? NAN : 1e300;
            break;
        case 8: longer_or_shorter(c.i); return;
        case 9: longer_or_shorter(c.f); return;
        default: longer_or_shorter(c.t); return;
    }
    t.stride = std::max(t.stride, t.cols);
}

struct ThreeInTurn : Parallel {
    int threads() const override { return 3; }
    void split(int64_t units, int64_t, const RangeFn& fn) override {
        for (int k = 2; k >= 0; --k)
            if (units * k / 3 < units * (k + 1) / 3) fn(units * k / 3, units * (k + 1) / 3, k);
    }
};

int64_t bytes(const TensorInfo& t, int64_t n) {
    const int64_t r = t.rows(n);
    return r <= 0 ? 0 : ((r - 1) * t.stride + t.cols) * size_of(t.dtype);
}

void fill(uint8_t* data, int64_t count, DType dtype) {
    for (int64_t k = 0; k + size_of(dtype) <= count; k += size_of(dtype)) {
        if (dtype == DType::f32) {
            const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-40f};
            const float x = pick(0, 999) < 3 ? odd[pick(0, 4)] : static_cast<float>(pick(0, 1000)) / 500.0f;
            std::memcpy(data + k, &x, 4);
        } else if (dtype == DType::i32) {
            const int32_t x = static_cast<int32_t>(pick(0, 999) < 2 ? odd_number(3) : pick(0, 1));
            std::memcpy(data + k, &x, 4);
        } else {
            for (int64_t j = 0; j < size_of(dtype); ++j) data[k + j] = static_cast<uint8_t>(engine());
        }
    }
}

void run(const OpDef& op, const Case& c, const Call& call) {
    ThreeInTurn par;
    const int64_t scratch_bytes = op.scratch(call, par.threads());
    const auto block = [](int64_t size) {
        return std::unique_ptr<uint8_t, decltype(&std::free)>(
            static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size + 63) / 64 * 64 + 64)), &std::free);
    };
    const auto exact = [](int64_t size) { return std::unique_ptr<uint8_t[]>(new uint8_t[static_cast<size_t>(size)]); };
    auto scratch = block(scratch_bytes);
    for (const int64_t n : {int64_t{1}, c.max_n}) {
        std::vector<std::unique_ptr<uint8_t[]>> own, before;
        std::vector<Operand> operands;
        for (const TensorInfo& t : c.t) {
            const int64_t size = bytes(t, n);
            own.push_back(exact(size));
            fill(own.back().get(), size, t.dtype);
            before.push_back(exact(size));
            std::memcpy(before.back().get(), own.back().get(), static_cast<size_t>(size));
            operands.push_back({own.back().get(), t.rows(n), t.cols, t.stride, t.dtype});
        }
        const int count = static_cast<int>(operands.size());
        const Span span{0, n, nullptr};  // states of one session, given as operands: none of these kernels asks for its slot
        const int status = op.run({operands.data(), count, c.i.data(), static_cast<int>(c.i.size()), c.f.data(), n,
                                   scratch.get(), par, call.t, &span, 1});
        if (status != ok && status != bad_index) std::abort();
        for (size_t k = static_cast<size_t>(op.n_outputs); k < c.t.size(); ++k) {
            const size_t size = static_cast<size_t>(bytes(c.t[k], n));
            if (c.t[k].space == Space::slot || !std::memcmp(before[k].get(), own[k].get(), size)) continue;
            std::fprintf(stderr, "%s wrote to operand %zu\n", op.name, k);
            std::abort();
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 1000;
    for (const OpTable table : {media_ops(), random_ops()})
        for (int k = 0; k < table.count; ++k) {
            const OpDef& op = table.ops[k];
            int64_t refused = 0, ran = 0, refused_valid = 0;
            for (int64_t round = 0; round < rounds; ++round) {
                Case c = valid(op.name);
                const int64_t changes = pick(0, 3);
                for (int64_t j = 0; j < changes; ++j) change(c);
                std::vector<const TensorInfo*> t;
                for (const TensorInfo& x : c.t) t.push_back(&x);
                // Copies of exactly their length: reading past a list is a finding, too.
                std::vector<int64_t> i(c.i);
                std::vector<double> f(c.f);
                i.shrink_to_fit();
                f.shrink_to_fit();
                const Call call{t.data(), static_cast<int>(t.size()), i.data(), static_cast<int>(i.size()),
                                f.data(), static_cast<int>(f.size()), c.max_n};
                if (op.check(call)) {
                    ++refused;
                    refused_valid += changes == 0;
                    continue;
                }
                __int128 total = op.scratch(call, 3);
                for (const TensorInfo& x : c.t)
                    total += (static_cast<__int128>(x.a) * c.max_n + x.b) * x.stride * size_of(x.dtype);
                if (total > 1 << 22) continue;
                run(op, c, call);
                ++ran;
            }
            std::printf("%s refused %lld ran %lld refused-valid %lld\n", op.name, static_cast<long long>(refused),
                        static_cast<long long>(ran), static_cast<long long>(refused_valid));
        }
}
