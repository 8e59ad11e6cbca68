// Philox4x32-10 and the noise of sampling, which `sample` and the fused head share (docs/plan-format.md, "Philox").
#pragma once
#include <cstdint>

#include "real.h"

namespace tmlc {

constexpr uint32_t normal_domain = 0, gumbel_domain = 0x80000000u;

// The words of one key row (seed, tick, position); word 0 of the counter is the block.
struct Stream {
    uint32_t key[2], counter[3];
    Stream(const int64_t* row, uint32_t domain) {
        const uint64_t seed = static_cast<uint64_t>(row[0]), tick = static_cast<uint64_t>(row[1]);
        key[0] = static_cast<uint32_t>(seed);
        key[1] = static_cast<uint32_t>(seed >> 32);
        counter[0] = static_cast<uint32_t>(row[2]) | domain;
        counter[1] = static_cast<uint32_t>(tick);
        counter[2] = static_cast<uint32_t>(tick >> 32);
    }
};

// Words 0 to 3 of the blocks first ... first+LANES-1, computed side by side: words[w][block - first].
template <int LANES>
inline void philox(const Stream& stream, uint32_t first, uint32_t words[4][LANES]) {
    uint32_t key0 = stream.key[0], key1 = stream.key[1];
    for (int j = 0; j < LANES; ++j) {
        words[0][j] = first + static_cast<uint32_t>(j);
        for (int w = 0; w < 3; ++w) words[w + 1][j] = stream.counter[w];
    }
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
        for (int j = 0; j < LANES; ++j) {
            const uint64_t a = uint64_t{0xD2511F53u} * words[0][j], b = uint64_t{0xCD9E8D57u} * words[2][j];
            words[0][j] = static_cast<uint32_t>(b >> 32) ^ words[1][j] ^ key0;
            words[1][j] = static_cast<uint32_t>(b);
            words[2][j] = static_cast<uint32_t>(a >> 32) ^ words[3][j] ^ key1;
            words[3][j] = static_cast<uint32_t>(a);
        }
}

// The middle of the word's cell of (0, 1): never 0, never 1.
inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// base + Gumbel noise, and a cheap number that it cannot exceed, so that most entries need no logarithm: with q = 1 - u,
// Gumbel = -ln(-ln u) < -ln q, and q is at least 2^-(z+1) where z counts the leading zeros of q's word.
inline double gumbel_score(double base, uint32_t word) { return base - log_real(-log_real(uniform(word))); }
inline double gumbel_bound(double base, uint32_t word) {
    constexpr double above_ln2 = 0.6931471806;
    const int zeros = ~word == 0 ? 32 : __builtin_clz(~word);
    return base + (zeros + 1) * above_ln2;
}

// An entry of the vocabulary and its score. The best is the one with the highest score, of equal ones the lowest entry.
struct Best {
    double score;
    int64_t entry;
    bool beaten_by(double other, int64_t at) const { return other > score || (other == score && at < entry); }
};

}  // namespace tmlc
