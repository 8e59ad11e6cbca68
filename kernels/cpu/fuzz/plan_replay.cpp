// Runs plans read from standard input through a kernel library, with every operand behind a guard: what the sweeps of
// sizes and the run of another machine's library under an emulator are made of.
// Usage: plan_replay LIBRARY heap|pages PORTABLE THREADS [OUTPUT] < CASES
//
// Each weight, state, input and output gets memory of its own that ends where it ends: `heap` for a sanitized build (the
// bytes between operands are poisoned), `pages` for any build (the next page is out of bounds for every instruction, also
// for those that a sanitizer does not see). The results (outputs of each call, then the slot) go to OUTPUT as they are.
// tests/kernels/kernel_cases.py writes the cases.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

bool pages = false;
std::string case_name = "none";

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "%s\nin case %s\n", what.c_str(), case_name.c_str());
    std::exit(1);
}

struct Part {  // one session of a call: its positions and its slot
    int64_t n;
    void* slot;
};

// The C interface of the library (api.cpp).
struct Library {
    int (*fused)();
    void* (*pool_create)(int threads);
    void (*pool_destroy)(void* pool);
    void* (*plan_create)(const int64_t* words, int64_t n_words, const void* weights, int64_t weight_bytes, int threads,
                         char* error, int64_t error_len);
    void (*portable_bits)(void* plan, int on);
    int (*plan_run)(void* plan, void* pool, int method, const Part* parts, int64_t n_parts, int64_t slot_bytes,
                    const void* const* inputs, const int64_t* input_bytes, void* const* outputs, const int64_t* output_bytes,
                    int64_t* part, char* error, int64_t error_len);
    void (*plan_destroy)(void* plan);

    explicit Library(const char* path) {
        void* handle = dlopen(path, RTLD_NOW);
        if (handle == nullptr) die(dlerror());
        const auto find = [&](auto& function, const char* name) {
            void* at = dlsym(handle, name);
            if (at == nullptr) die(dlerror());
            std::memcpy(&function, &at, sizeof function);
        };
        find(fused, "tmlc_fused");
        find(pool_create, "tmlc_pool_create");
        find(pool_destroy, "tmlc_pool_destroy");
        find(plan_create, "tmlc_plan_create");
        find(portable_bits, "tmlc_plan_portable_bits");
        find(plan_run, "tmlc_plan_run");
        find(plan_destroy, "tmlc_plan_destroy");
    }
};

int64_t read_number(bool may_end = false) {
    int64_t v;
    if (std::fread(&v, 8, 1, stdin) != 1) {
        if (may_end && std::feof(stdin)) return -1;
        die("the cases are cut short");
    }
    return v;
}
std::vector<uint8_t> read_block(int64_t bytes) {
    std::vector<uint8_t> data(static_cast<size_t>((bytes + 7) / 8 * 8));
    if (!data.empty() && std::fread(data.data(), data.size(), 1, stdin) != 1) die("the cases are cut short");
    data.resize(static_cast<size_t>(bytes));
    return data;
}

struct Piece {
    int64_t at, bytes;
};

// One stretch of memory that holds pieces, each ending at its guard.
class Guarded {
    uint8_t* base_ = nullptr;
    int64_t total_ = 0;
    std::vector<int64_t> starts_;

public:
    explicit Guarded(const std::vector<int64_t>& sizes) {
        const int64_t page = sysconf(_SC_PAGESIZE), gap = 512;
        const auto up = [](int64_t v, int64_t to) { return (v + to - 1) / to * to; };
        for (const int64_t bytes : sizes) {
            if (pages) {
                const int64_t end = total_ + up(bytes, page);
                starts_.push_back(end - bytes);
                total_ = end + page;
            } else {
                starts_.push_back(total_);
                total_ = up(total_ + bytes + gap, 64);
            }
        }
        if (pages) {
            if (total_ == 0) total_ = page;
            void* at = mmap(nullptr, static_cast<size_t>(total_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (at == MAP_FAILED) die("no memory");
            base_ = static_cast<uint8_t*>(at);
        } else {
            void* at = nullptr;
            if (posix_memalign(&at, 64, static_cast<size_t>(total_ + 64)) != 0) die("no memory");
            base_ = static_cast<uint8_t*>(at);
            std::memset(base_, 0, static_cast<size_t>(total_ + 64));
        }
        for (size_t k = 0; k < sizes.size(); ++k) {
            uint8_t* end = base_ + starts_[k] + sizes[k];
            if (pages && mprotect(end, static_cast<size_t>(page), PROT_NONE) != 0) die("no guard page");
#if defined(__SANITIZE_ADDRESS__)
            uint8_t* next = base_ + (k + 1 < sizes.size() ? starts_[k + 1] : total_ + 64);
            if (!pages) ASAN_POISON_MEMORY_REGION(end, static_cast<size_t>(next - end));
#endif
        }
    }
    ~Guarded() {
        if (pages) {
            munmap(base_, static_cast<size_t>(total_));
            return;
        }
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(base_, static_cast<size_t>(total_ + 64));
#endif
        std::free(base_);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    uint8_t* base() const { return base_; }
    int64_t bytes() const { return total_; }
    int64_t start(size_t k) const { return starts_[k]; }
};

// A row of the tensor table: space, dtype, offset, a, b, cols, stride.
int64_t extent(const int64_t* t, int64_t n) {
    constexpr int64_t sizes[] = {4, 2, 4, 8, 1};
    const int64_t rows = t[3] * n + t[4];
    return rows == 0 ? 0 : ((rows - 1) * t[6] + t[5]) * sizes[t[1]];
}

// The tensors of one space, moved from where the plan has them side by side to memory where each has its guard.
struct Moved {
    std::vector<Piece> pieces;  // as in the plan
    Guarded memory;

    Moved(std::vector<int64_t>& words, int64_t space, const std::vector<uint8_t>& content)
        : pieces(find(words, space)), memory(sizes(pieces)) {
        for (size_t k = 0; k < pieces.size(); ++k)
            std::memcpy(memory.base() + memory.start(k), content.data() + pieces[k].at, static_cast<size_t>(pieces[k].bytes));
        for (int64_t i = 0; i < words[4]; ++i) {
            int64_t* t = words.data() + 6 + 7 * i;
            for (size_t k = 0; t[0] == space && k < pieces.size(); ++k)
                if (t[2] == pieces[k].at) {
                    t[2] = memory.start(k);
                    break;
                }
        }
    }
    void copy_back(std::vector<uint8_t>& content) const {
        for (size_t k = 0; k < pieces.size(); ++k)
            std::memcpy(content.data() + pieces[k].at, memory.base() + memory.start(k), static_cast<size_t>(pieces[k].bytes));
    }

private:
    static std::vector<Piece> find(const std::vector<int64_t>& words, int64_t space) {
        std::vector<Piece> found;
        for (int64_t i = 0; i < words[4]; ++i) {
            const int64_t* t = words.data() + 6 + 7 * i;
            if (t[0] != space) continue;
            if (extent(t, 1) > 0) found.push_back({t[2], extent(t, 1)});
        }
        return found;
    }
    static std::vector<int64_t> sizes(const std::vector<Piece>& pieces) {
        std::vector<int64_t> all;
        for (const Piece& p : pieces) all.push_back(p.bytes);
        return all;
    }
};

void put(std::FILE* to, const void* data, int64_t bytes) {
    if (to != nullptr && bytes > 0 && std::fwrite(data, static_cast<size_t>(bytes), 1, to) != 1) die("cannot write the output");
}

void run_case(const Library& library, void* pool, int threads, bool portable, std::FILE* out) {
    std::vector<uint8_t> raw = read_block(read_number());
    std::vector<int64_t> words(raw.size() / 8);
    std::memcpy(words.data(), raw.data(), raw.size());
    const std::vector<uint8_t> weights = read_block(read_number());
    std::vector<uint8_t> slot = read_block(read_number());
    const Moved own_weights(words, 2, weights), own_slot(words, 1, slot);
    words[3] = own_slot.memory.bytes();
    char error[256] = "";
    void* plan = library.plan_create(words.data(), static_cast<int64_t>(words.size()), own_weights.memory.base(),
                                     own_weights.memory.bytes(), threads, error, sizeof error);
    if (plan == nullptr) die(std::string("refused: ") + error);
    library.portable_bits(plan, portable);
    const int64_t* method = words.data() + 6 + 7 * words[4];  // max_n, inputs, outputs, code, input ids, output ids
    for (int64_t call = 0, calls = read_number(); call < calls; ++call) {
        const int64_t n = read_number(), given = read_number();
        std::vector<std::vector<uint8_t>> inputs;
        std::vector<int64_t> sizes;
        for (int64_t k = 0; k < given; ++k) {
            inputs.push_back(read_block(read_number()));
            sizes.push_back(static_cast<int64_t>(inputs.back().size()));
        }
        for (int64_t k = 0; k < method[2]; ++k) sizes.push_back(extent(words.data() + 6 + 7 * method[4 + method[1] + k], n));
        const Guarded memory(sizes);
        std::vector<void*> places;
        for (size_t k = 0; k < sizes.size(); ++k) {
            places.push_back(memory.base() + memory.start(k));
            if (k >= inputs.size()) std::memset(places[k], 0xff, static_cast<size_t>(sizes[k]));
            else if (sizes[k] > 0) std::memcpy(places[k], inputs[k].data(), static_cast<size_t>(sizes[k]));
        }
        const Part part{n, own_slot.memory.base()};
        if (library.plan_run(plan, pool, 0, &part, 1, own_slot.memory.bytes(), places.data(), sizes.data(),
                             places.data() + given, sizes.data() + given, nullptr, error, sizeof error) != 0)
            die(error);
        for (size_t k = inputs.size(); k < sizes.size(); ++k) put(out, places[k], sizes[k]);
    }
    library.plan_destroy(plan);
    own_slot.copy_back(slot);
    put(out, slot.data(), static_cast<int64_t>(slot.size()));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 5 || argc > 6) {
        std::fprintf(stderr, "usage: plan_replay LIBRARY heap|pages PORTABLE THREADS [OUTPUT] < CASES\n");
        return 2;
    }
    const Library library(argv[1]);
    pages = std::strcmp(argv[2], "pages") == 0;
    const bool portable = std::atoi(argv[3]) != 0;
    const int threads = std::atoi(argv[4]);
    if (portable && library.fused() == 0) die("this library has no fused multiply-add");
    std::FILE* out = argc == 6 ? std::fopen(argv[5], "wb") : nullptr;
    if (argc == 6 && out == nullptr) die("cannot open the output");
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback([] { std::fprintf(stderr, "in case %s\n", case_name.c_str()); });
#endif
    void* pool = threads > 1 ? library.pool_create(threads) : nullptr;
    int64_t count = 0;
    for (int64_t bytes; (bytes = read_number(true)) >= 0; ++count) {
        const std::vector<uint8_t> name = read_block(bytes);
        case_name.assign(name.begin(), name.end());
        run_case(library, pool, threads, portable, out);
    }
    if (pool != nullptr) library.pool_destroy(pool);
    if (out != nullptr && std::fclose(out) != 0) die("cannot write the output");
    std::printf("%lld cases\n", static_cast<long long>(count));
    return 0;
}
