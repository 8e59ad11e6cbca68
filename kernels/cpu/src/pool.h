// A persistent thread pool: parts that whoever is free takes, workers that spin for a moment and then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "op.h"

namespace tmlc {

// Runs everything on the caller.
struct Serial final : Parallel {
    int threads() const override { return 1; }
    void split(int64_t units, int64_t, const RangeFn& fn) override {
        if (units > 0) fn(0, units, 0);
    }
};

// `threads` counts the caller. A split is cut into a few equal parts; callers and workers take parts until none is left,
// so a worker that the system has not given a core to holds nothing up (on a busy machine it often has none). Which
// thread computes a part changes no result. Between two splits of a tick the workers keep spinning (a wake-up costs more
// than most operations); after about 50 us without work they sleep. Two callers may share a pool: whoever finds it taken
// runs its split alone.
class Pool final : public Parallel {
public:
    explicit Pool(int threads);
    ~Pool() override;
    int threads() const override { return static_cast<int>(workers_.size()) + 1; }
    void split(int64_t units, int64_t work, const RangeFn& fn) override;

    // Ties worker i to core `cores[i]`; the caller's own thread (cores[0]) is left alone. 0, or the error number of the
    // first that could not be tied.
    int pin(const int* cores, int count);

private:
    void worker(int index);
    void take_parts(uint64_t round, int thread);

    std::vector<std::thread> workers_;
    std::atomic<bool> taken_{false};
    // The round, how many parts it has and how many are taken, in one word: a part can be taken only of the round that
    // a thread has seen, and the rest of that round's fields cannot change before the part is done.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<bool> stop_{false};
    const RangeFn* fn_ = nullptr;
    int64_t units_ = 0;
};

}  // namespace tmlc
