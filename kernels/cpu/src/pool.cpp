// The thread pool of pool.h.
#include "pool.h"

#include <algorithm>
#include <cerrno>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace tmlc {
namespace {

constexpr int64_t small_work = 32768;  // multiply-adds (1-4 us) below which a hand-over (0.2-0.8 us) saves nothing
constexpr int spins = 4000;            // about 50 us
constexpr int64_t parts_each = 2;      // parts a thread gets when all are free: a late one then costs half its share

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The ticket: [round 32][parts 16][taken 16].
constexpr uint64_t pack(uint64_t round, uint64_t parts) { return round << 32 | parts << 16; }
constexpr uint64_t round_of(uint64_t ticket) { return ticket >> 32; }
constexpr int64_t parts_of(uint64_t ticket) { return static_cast<int64_t>(ticket >> 16 & 0xffff); }
constexpr int64_t taken_of(uint64_t ticket) { return static_cast<int64_t>(ticket & 0xffff); }

}  // namespace

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
        try {
            workers_.emplace_back([this, i] { worker(i); });
        } catch (...) {  // the system gives no more threads: work with those that came
            break;
        }
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true, std::memory_order_seq_cst);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
}

int Pool::pin(const int* cores, int count) {
#if defined(__linux__)
    if (count < threads()) return EINVAL;
    for (size_t i = 0; i < workers_.size(); ++i) {
        const int core = cores[i + 1];
        if (core < 0 || core >= CPU_SETSIZE) return EINVAL;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(static_cast<size_t>(core), &set);
        if (const int error = pthread_setaffinity_np(workers_[i].native_handle(), sizeof set, &set)) return error;
    }
    return 0;
#else
    static_cast<void>(cores), static_cast<void>(count);
    return ENOSYS;
#endif
}

void Pool::take_parts(uint64_t round, int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (round_of(ticket) == round && taken_of(ticket) < parts_of(ticket)) {
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
            continue;
        const int64_t parts = parts_of(ticket), part = taken_of(ticket);
        (*fn_)(units_ * part / parts, units_ * (part + 1) / parts, thread);
        done_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
    }
}

void Pool::worker(int index) {
    uint64_t seen = 0;
    const auto news = [&](std::memory_order order) {
        return round_of(ticket_.load(order)) != seen || stop_.load(order);
    };
    for (;;) {
        for (int i = 0; i < spins && !news(std::memory_order_acquire); ++i) pause_cpu();
        if (!news(std::memory_order_acquire)) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return news(std::memory_order_seq_cst); });
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
        if (stop_.load(std::memory_order_acquire)) return;
        seen = round_of(ticket_.load(std::memory_order_acquire));
        take_parts(seen, index);
    }
}

void Pool::split(int64_t units, int64_t work, const RangeFn& fn) {
    if (units <= 0) return;
    bool expected = false;
    if (workers_.empty() || units == 1 || work < small_work ||
        !taken_.compare_exchange_strong(expected, true, std::memory_order_acquire)) {
        fn(0, units, 0);
        return;
    }
    const int64_t parts = std::min<int64_t>(units, parts_each * threads());  // threads are at most 1024
    const uint64_t round = (round_of(ticket_.load(std::memory_order_relaxed)) + 1) & 0xffffffff;
    fn_ = &fn;
    units_ = units;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(pack(round, static_cast<uint64_t>(parts)), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that is about to sleep has seen the new round or waits
        wake_.notify_all();
    }
    take_parts(round, 0);
    for (int i = 0; done_.load(std::memory_order_acquire) < parts; ++i) {
        pause_cpu();
        if (i >= spins) std::this_thread::yield();
    }
    taken_.store(false, std::memory_order_release);
}

}  // namespace tmlc
