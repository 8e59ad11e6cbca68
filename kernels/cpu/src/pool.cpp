// The thread pool of pool.h.
#include "pool.h"

namespace tmlc {
namespace {

constexpr int64_t small_work = 32768;  // multiply-adds below which a hand-over costs more than it saves
constexpr int spins = 4000;            // about 50 us

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

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
        stop_ = true;
        round_.fetch_add(1, std::memory_order_seq_cst);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
}

void Pool::worker(int index) {
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < spins && round_.load(std::memory_order_acquire) == seen; ++i) pause_cpu();
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
            sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        }
        seen = round_.load(std::memory_order_acquire);
        if (stop_) return;
        const int64_t n = threads(), begin = units_ * index / n, end = units_ * (index + 1) / n;
        if (begin < end) (*fn_)(begin, end, index);
        pending_.fetch_sub(1, std::memory_order_release);
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
    fn_ = &fn;
    units_ = units;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that is about to sleep has seen the new round or waits
        wake_.notify_all();
    }
    fn(0, units / threads(), 0);
    for (int i = 0; pending_.load(std::memory_order_acquire) > 0; ++i) {
        pause_cpu();
        if (i >= spins) std::this_thread::yield();
    }
    taken_.store(false, std::memory_order_release);
}

}  // namespace tmlc
