// Multiplying for its own sake: how fast the instruction behind each form of product is when nothing has to be fetched.
#pragma once
#include "op.h"

namespace tmlc {

enum class Product { f32, bf16, int8 };  // by what the weights are multiplied as; 4-bit weights are multiplied as int8

// Runs `rounds` rounds of independent multiply-adds on each of so many units shared out to the threads. Returns how many
// multiply-adds that were in all; `sink` gets a number made of the sums, so that none of them can be left out.
int64_t multiply_adds(Parallel& par, Product product, int64_t units, int64_t rounds, float& sink);

}  // namespace tmlc
