// Reads memory as fast as a pool's threads can: the bandwidth that every floor in docs/performance.md is made of.
#include "bandwidth.h"

#include <atomic>

namespace tmlc {
namespace {

typedef uint64_t Wide __attribute__((vector_size(64), may_alias));

constexpr int64_t line = 64, unit = 1 << 16;
constexpr int64_t ahead = 6144;  // bytes: further than the hardware's own prefetch gets by itself

// Eight sums, so that neither one chain of adds nor one of loads is what is measured.
uint64_t read_unit(const uint8_t* p) {
    Wide sum[8] = {};
    for (int64_t at = 0; at < unit; at += 8 * line)
        for (int k = 0; k < 8; ++k) {
            __builtin_prefetch(p + at + k * line + ahead, 0, 2);  // as form.h, ask_ahead
            sum[k] += *reinterpret_cast<const Wide*>(p + at + k * line);
        }
    uint64_t all = 0;
    for (int k = 1; k < 8; ++k) sum[0] += sum[k];
    for (int lane = 0; lane < 8; ++lane) all += sum[0][lane];
    return all;
}

}  // namespace

uint64_t read_memory(Parallel& par, const uint8_t* data, int64_t bytes) {
    std::atomic<uint64_t> all{0};
    par.split(bytes / unit, bytes, [&](int64_t begin, int64_t end, int) {
        uint64_t sum = 0;
        for (int64_t u = begin; u < end; ++u) sum += read_unit(data + u * unit);
        all.fetch_add(sum, std::memory_order_relaxed);
    });
    return all.load();
}

}  // namespace tmlc
