// The blocks of memory.h.
#include "memory.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tmlc {
namespace {

constexpr int64_t huge_page = int64_t{1} << 21;
constexpr int64_t large = int64_t{1} << 20;  // a block from here on is worth a huge page

// Hints: a system that refuses them works the same, in small pages that come when they are used.
void prepare(uint8_t* data, int64_t bytes) {
    if (bytes < large) {
        for (int64_t at = 0; at < bytes; at += 4096) static_cast<volatile uint8_t*>(data)[at] = 0;
        return;
    }
#if defined(__linux__)
    const auto size = static_cast<size_t>((bytes + huge_page - 1) / huge_page * huge_page);
    static_cast<void>(madvise(data, size, MADV_HUGEPAGE));
#if defined(MADV_POPULATE_WRITE)
    constexpr int64_t most_touched = int64_t{1} << 28;  // more is left to the day on which a call uses it
    if (bytes <= most_touched) static_cast<void>(madvise(data, size, MADV_POPULATE_WRITE));
#endif
#endif
}

}  // namespace

bool Block::reserve(int64_t bytes) {
    bytes_ = bytes;
    const int64_t unit = bytes < large ? 64 : huge_page;
    // calloc hands out untouched zero pages, so a large block costs nothing until it is used.
    const int64_t room = (bytes + unit - 1) / unit * unit + unit;
    raw_ = {static_cast<uint8_t*>(std::calloc(1, static_cast<size_t>(room))), std::free};
    if (!raw_) return false;
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(raw_.get()));
    data_ = raw_.get() + (unit - address % unit) % unit;
    prepare(data_, bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data_ + bytes, static_cast<size_t>(raw_.get() + room - (data_ + bytes)));
#endif
    return true;
}

}  // namespace tmlc
