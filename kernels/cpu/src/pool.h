// A persistent thread pool: static splits, workers that spin for a moment and then sleep.
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

// `threads` counts the caller. Between two splits of a tick the workers keep spinning (a wake-up costs more than most
// operations); after about 50 us without work they sleep. Two callers may share a pool: whoever finds it taken runs
// its split alone, which changes no result.
class Pool final : public Parallel {
public:
    explicit Pool(int threads);
    ~Pool() override;
    int threads() const override { return static_cast<int>(workers_.size()) + 1; }
    void split(int64_t units, int64_t work, const RangeFn& fn) override;

private:
    void worker(int index);

    std::vector<std::thread> workers_;
    std::atomic<bool> taken_{false};
    alignas(64) std::atomic<uint64_t> round_{0};
    alignas(64) std::atomic<int> pending_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stop_ = false;           // written before a round is announced, read after it was seen
    const RangeFn* fn_ = nullptr;
    int64_t units_ = 0;
};

}  // namespace tmlc
