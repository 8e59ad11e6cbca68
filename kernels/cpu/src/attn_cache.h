// The caches of keys and values: how a block of 16 positions is laid out in each form, and how new rows get there
// (docs/plan-format.md, "Caches").
#pragma once
#include "check.h"
#include "op.h"

namespace tmlc {

enum class KV { f32, bf16, int8 };

inline bool is_cache(const TensorInfo& t) {
    return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::u8;
}
inline KV kv_form(DType t) { return t == DType::f32 ? KV::f32 : t == DType::bf16 ? KV::bf16 : KV::int8; }

// Bytes of 16 keys or values of d columns. int8: codes of d columns, rounded up to quads, then 16 float32 scales.
inline int64_t kv_block_bytes(KV form, int64_t d) {
    return form == KV::f32 ? 64 * d : form == KV::bf16 ? 32 * d : 16 * round_up(d, 4) + 64;
}

// The caches of one kv head.
struct HeadCache {
    uint8_t *k, *v;
    int64_t k_block, v_block;  // bytes
};

// Writes one key and one value of a head to cache index `at`.
void put_key(KV form, const HeadCache& cache, int64_t at, const float* x, int64_t d);
void put_value(KV form, const HeadCache& cache, int64_t at, const float* x, int64_t dv);

}  // namespace tmlc
