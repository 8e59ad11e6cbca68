// Reading memory for its own sake.
#pragma once
#include "op.h"

namespace tmlc {

// The sum of the 64-bit words in the whole 64 KiB units of `data` (64-byte aligned): every byte of them is read once.
// Prefetches up to 2 KiB past the end, which touches nothing.
uint64_t read_memory(Parallel& par, const uint8_t* data, int64_t bytes);

}  // namespace tmlc
