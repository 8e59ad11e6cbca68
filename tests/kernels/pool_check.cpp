// Splits of every size on a pool, from one caller and from two at once: each unit must be done exactly once.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

int play(tmlc::Pool& pool, int rounds) {
    int wrong = 0;
    for (int round = 0; round < rounds; ++round) {
        std::vector<int> done(static_cast<size_t>(1 + round % 37), 0);
        pool.split(static_cast<int64_t>(done.size()), 1 << 20, [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) ++done[static_cast<size_t>(unit)];
        });
        for (int times : done) wrong += times != 1;
        if (round % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the workers fall asleep
    }
    return wrong;
}

}  // namespace

int main(int, char** argv) {
    tmlc::Pool pool(std::atoi(argv[1]));
    const int rounds = std::atoi(argv[2]);
    int other = 0;
    std::thread second([&] { other = play(pool, rounds); });
    const int wrong = play(pool, rounds) + (second.join(), other);
    std::printf("%d units wrong\n", wrong);
    return wrong != 0;
}
