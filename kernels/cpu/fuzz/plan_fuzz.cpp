// Feeds mutated copies of a plan to the library, with every buffer exactly as large as the plan says, so that a
// sanitizer sees any step outside. Usage: plan_fuzz WORDS WEIGHTS FIRST COUNT (tests/kernels/test_sanitized.py).
//
// Iteration 0 of a seed runs it unchanged; iteration k is the same on every machine. Prints how the copies fared.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <sanitizer/common_interface_defs.h>
#include <string>
#include <vector>

#include "../src/plan.h"
#include "../src/pool.h"

namespace {

constexpr int64_t small = 1 << 20;  // larger plans are only created: running them would take long, not find more
constexpr int sessions = 3;             // the most that one call brings
int64_t iteration = 0;

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
};

// A heap block of exactly `bytes`, 64-byte aligned.
struct Exact {
    void* data = nullptr;
    explicit Exact(int64_t bytes) {
        if (posix_memalign(&data, 64, static_cast<size_t>(bytes)) != 0) std::abort();
    }
    ~Exact() { std::free(data); }
    Exact(Exact&& o) noexcept : data(o.data) { o.data = nullptr; }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;
};

std::vector<char> read_file(const char* path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
        std::fprintf(stderr, "cannot read %s\n", path);
        std::exit(2);
    }
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

const int64_t edges[] = {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 127, 1 << 10, 1 << 16, 1 << 20, 1 << 24,
                         (1 << 24) + 1, int64_t{1} << 31, (int64_t{1} << 31) - 1, int64_t{1} << 32, int64_t{1} << 36,
                         int64_t{1} << 62, INT64_MAX, INT64_MIN, -1, -2, -16, 0x7ff0000000000000, 0x7ff8000000000000,
                         0x3ff0000000000000};

// Edits of the words. A third of the copies get more room in arena and slot; half change one value everywhere (so that
// shapes still agree and kernels run at sizes nobody chose), the rest break single words, some cut or shift the rest.
void mutate(std::vector<int64_t>& words, Random& random) {
    const auto somewhere = [&] { return static_cast<size_t>(random.below(static_cast<int64_t>(words.size()))); };
    const auto wrap = [](int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); };
    if (random.below(3) == 0) {
        words[2] *= 1 + random.below(8);
        words[3] *= 1 + random.below(8);
    }
    for (int64_t edits = 1 + random.below(2); edits > 0 && !words.empty(); --edits) {
        const size_t at = somewhere();
        const int64_t old = words[at], step = random.below(9) - 4;
        switch (random.below(16)) {
            case 0: words.resize(at); break;
            case 1: words.erase(words.begin() + static_cast<ptrdiff_t>(at)); break;
            case 2: words.insert(words.begin() + static_cast<ptrdiff_t>(at), old); break;
            case 3: words[at] ^= static_cast<int64_t>(uint64_t{1} << random.below(64)); break;
            case 4: words[at] = words[somewhere()]; break;
            case 5: words[at] = wrap(old, step); break;
            case 6: words[at] = wrap(old, old); break;
            case 7: words[at] = edges[random.below(static_cast<int64_t>(std::size(edges)))]; break;
            default: {  // every word of this value, from the tensor table on
                const int64_t fresh = random.below(4) == 0 ? edges[random.below(20)] : wrap(old, step);
                for (size_t i = 6; i < words.size(); ++i)
                    if (words[i] == old) words[i] = fresh;
            }
        }
    }
}

// Mostly values that operations accept (small numbers), sometimes noise, sometimes a constant such as all ones.
void fill(void* data, int64_t bytes, tmlc::DType dtype, Random& random) {
    auto* p = static_cast<uint8_t*>(data);
    const int64_t mode = random.below(8);
    if (mode == 0) {
        for (int64_t i = 0; i < bytes; ++i) p[i] = static_cast<uint8_t>(random.next());
    } else if (mode == 1) {
        std::memset(p, 0xff, static_cast<size_t>(bytes));
    } else {
        std::memset(p, 0, static_cast<size_t>(bytes));
        const int64_t size = tmlc::size_of(dtype);
        for (int64_t i = 0; i + size <= bytes; i += size) {
            const int64_t whole = random.below(4);
            const float real = static_cast<float>(random.below(2001) - 1000) * 0.001f;
            if (dtype == tmlc::DType::f32) std::memcpy(p + i, &real, 4);
            else if (dtype == tmlc::DType::bf16) { /* zeros */ }
            else std::memcpy(p + i, &whole, static_cast<size_t>(size));
        }
    }
}

// Runs every method a few times on one session or several; returns how many runs ended well. A call that is refused for
// one session must have changed no slot.
int run(tmlc::Plan& plan, tmlc::Parallel& par, Random& random, int64_t& batches) {
    if (plan.arena_bytes() > small || plan.slot_bytes() > small || plan.scratch_bytes() > 16 * small) return 0;
    std::vector<Exact> slots;
    const auto bytes_of_slot = static_cast<size_t>(plan.slot_bytes());
    for (int s = 0; s < sessions; ++s) {
        slots.emplace_back(plan.slot_bytes());
        fill(slots.back().data, plan.slot_bytes(), tmlc::DType::i64, random);
        if (random.below(2) == 0) std::memset(slots.back().data, 0, bytes_of_slot);
    }
    int good = 0;
    for (int round = 0; round < 3; ++round)
        for (size_t m = 0; m < plan.methods().size(); ++m) {
            const tmlc::Plan::Method& method = plan.methods()[m];
            const int64_t most = std::min<int64_t>(method.max_n, 64), n = random.below(3) == 0 ? most : 1 + random.below(most);
            std::vector<tmlc::Part> parts;
            for (int64_t left = n; left > 0; left -= parts.back().n) {
                const bool last = static_cast<int>(parts.size()) == sessions - 1 || random.below(2) == 0;
                parts.push_back({last ? left : 1 + random.below(left), static_cast<uint8_t*>(slots[parts.size()].data)});
            }
            std::vector<Exact> held;
            std::vector<tmlc::Buffer> in, out;
            bool fits = true;
            const auto give = [&](const std::vector<int64_t>& ids, std::vector<tmlc::Buffer>& to) {
                for (int64_t id : ids) {
                    const tmlc::TensorInfo& t = plan.tensor(id);
                    const __int128 bytes = tmlc::extent(t, n);
                    if (bytes > small) return void(fits = false);
                    held.emplace_back(static_cast<int64_t>(bytes));
                    fill(held.back().data, static_cast<int64_t>(bytes), t.dtype, random);
                    to.push_back({held.back().data, static_cast<int64_t>(bytes)});
                }
            };
            give(method.inputs, in);
            give(method.outputs, out);
            if (!fits) continue;
            std::vector<std::vector<uint8_t>> before;
            for (const Exact& slot : slots) {
                const auto* bytes = static_cast<uint8_t*>(slot.data);
                before.emplace_back(bytes, bytes + bytes_of_slot);
            }
            char text[256];
            tmlc::Plan::Fault fault{text, sizeof text};
            const int status = plan.run(par, static_cast<int>(m), parts.data(), static_cast<int64_t>(parts.size()),
                                        plan.slot_bytes(), in.data(), out.data(), fault);
            good += status == tmlc::ok;
            batches += status == tmlc::ok && parts.size() > 1;
            if (status == tmlc::ok || status == tmlc::bad_index) continue;
            for (size_t s = 0; s < slots.size(); ++s)
                if (!std::equal(before[s].begin(), before[s].end(), static_cast<uint8_t*>(slots[s].data))) {
                    std::fprintf(stderr, "a refused call changed slot %zu in iteration %lld\n", s, static_cast<long long>(iteration));
                    std::exit(1);
                }
        }
    return good;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: plan_fuzz WORDS WEIGHTS FIRST COUNT\n");
        return 2;
    }
    __sanitizer_set_death_callback([] { std::fprintf(stderr, "in iteration %lld\n", static_cast<long long>(iteration)); });
    const std::vector<char> raw = read_file(argv[1]), weights = read_file(argv[2]);
    std::vector<int64_t> seed(raw.size() / 8);
    std::memcpy(seed.data(), raw.data(), seed.size() * 8);
    Exact weight_copy(static_cast<int64_t>(weights.size()));
    if (!weights.empty()) std::memcpy(weight_copy.data, weights.data(), weights.size());
    tmlc::Serial serial;
    tmlc::Pool pool(2);
    const int64_t first = std::atoll(argv[3]), count = std::atoll(argv[4]);
    int64_t accepted = 0, refused = 0, good = 0, batches = 0;
    for (iteration = first; iteration < first + count; ++iteration) {
        Random random{static_cast<uint64_t>(iteration) * 0x2545f4914f6cdd1dull + 1};
        std::vector<int64_t> words = seed;
        if (iteration > 0) mutate(words, random);
        // A vector keeps spare room that would hide a read past the end.
        std::unique_ptr<int64_t[]> exact(new int64_t[words.size()]);
        std::copy(words.begin(), words.end(), exact.get());
        std::string error;
        auto plan = tmlc::Plan::create(exact.get(), static_cast<int64_t>(words.size()), weight_copy.data,
                                       static_cast<int64_t>(weights.size()), 2, error);
        if (!plan) {
            ++refused;
            if (error.empty()) return std::fprintf(stderr, "refused without a reason\n"), 1;
            continue;
        }
        ++accepted;
        good += iteration % 2 == 0 ? run(*plan, serial, random, batches) : run(*plan, pool, random, batches);
    }
    std::printf("accepted %lld refused %lld runs %lld batches %lld\n", static_cast<long long>(accepted),
                static_cast<long long>(refused), static_cast<long long>(good), static_cast<long long>(batches));
    return 0;
}
