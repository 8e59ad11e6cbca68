// A clock for kernel calls, which take from a microsecond up: the processor's own counter where it runs at one rate whatever
// the core does, else the system's monotonic clock.
//
// Reading the counter takes a few nanoseconds and keeps no order with what is around it, so a call can be told some ten
// nanoseconds of its neighbour's. What the counter's unit is worth is measured, not believed: `Timing` reads both clocks when
// it starts and when it is asked, and the time between is much longer than a kernel call.
#pragma once
#include <chrono>
#include <cstdint>
#if defined(__x86_64__)
#include <cpuid.h>
#include <x86intrin.h>
#endif

namespace tmlc {

inline uint64_t monotonic_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

#if defined(__x86_64__)
// The processor says that its time stamp counter keeps one rate in all its states.
inline bool has_counter() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(0x80000007, &a, &b, &c, &d) != 0 && (d & (1u << 8)) != 0;
}
inline uint64_t read_counter() { return __rdtsc(); }
#elif defined(__aarch64__)
inline bool has_counter() { return true; }  // the architecture promises one rate
inline uint64_t read_counter() {
    uint64_t value;
    asm volatile("mrs %0, cntvct_el0" : "=r"(value));
    return value;
}
#else
inline bool has_counter() { return false; }
inline uint64_t read_counter() { return monotonic_ns(); }
#endif

class Timing {
public:
    void start() {
        began_ = now();
        began_ns_ = monotonic_ns();
    }
    uint64_t now() const { return counter_ ? read_counter() : monotonic_ns(); }
    // Nanoseconds of one unit of `now`, from what passed since `start`.
    double unit_ns() const {
        if (!counter_) return 1.0;
        const uint64_t units = now() - began_, ns = monotonic_ns() - began_ns_;
        return units == 0 ? 1.0 : static_cast<double>(ns) / static_cast<double>(units);
    }

private:
    bool counter_ = has_counter();
    uint64_t began_ = 0, began_ns_ = 0;
};

}  // namespace tmlc
