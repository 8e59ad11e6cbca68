// A kernel library that reads one byte too many of the operand that TMLC_OVERREAD names: proves that plan_replay sees it.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
const int64_t* words;
const uint8_t* weights;
volatile uint8_t seen;

int64_t bytes_of(int64_t space, int64_t& offset) {  // of the last f32 tensor of a space, whose rows do not depend on n
    int64_t bytes = 0;
    for (int64_t i = 0; i < words[4]; ++i) {
        const int64_t* t = words + 6 + 7 * i;
        if (t[0] == space && t[1] == 0) offset = t[2], bytes = t[4] * t[5] * 4;
    }
    return bytes;
}
}  // namespace

EXPORT int tmlc_fused() { return 1; }
EXPORT void* tmlc_pool_create(int) { return nullptr; }
EXPORT void tmlc_pool_destroy(void*) {}
EXPORT void* tmlc_plan_create(const int64_t* w, int64_t, const void* data, int64_t, int, char*, int64_t) {
    words = w;
    weights = static_cast<const uint8_t*>(data);
    return &words;
}
EXPORT void tmlc_plan_portable_bits(void*, int) {}
EXPORT void tmlc_plan_destroy(void*) {}
struct Part {
    int64_t n;
    void* slot;
};
EXPORT int tmlc_plan_run(void*, void*, int, const Part* parts, int64_t, int64_t, const void* const* inputs,
                         const int64_t* input_bytes, void* const* outputs, const int64_t* output_bytes, int64_t*, char*,
                         int64_t) {
    const char* which = std::getenv("TMLC_OVERREAD");
    int64_t at = 0;
    const uint8_t* from = nullptr;
    int64_t bytes = 0;
    if (std::strcmp(which, "input") == 0) from = static_cast<const uint8_t*>(inputs[0]), bytes = input_bytes[0];
    if (std::strcmp(which, "output") == 0) from = static_cast<const uint8_t*>(outputs[0]), bytes = output_bytes[0];
    if (std::strcmp(which, "weight") == 0) bytes = bytes_of(2, at), from = weights + at;
    if (std::strcmp(which, "slot") == 0) bytes = bytes_of(1, at), from = static_cast<const uint8_t*>(parts[0].slot) + at;
    for (int64_t i = 0; from != nullptr && i < bytes; ++i) seen = from[i];  // all that is the operand's own can be read
    if (from != nullptr) seen = from[bytes];
    return 0;
}
