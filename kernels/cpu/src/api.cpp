// The C interface of the library: everything that the Python binding calls. Nothing throws across it.
#include <cstdio>
#include <string>

#include "bandwidth.h"
#include "peak.h"
#include "plan.h"
#include "pool.h"
#include "vec.h"

#define TMLC_API extern "C" __attribute__((visibility("default")))

using tmlc::Buffer;
using tmlc::Plan;
using tmlc::Pool;

TMLC_API int tmlc_abi() { return 3; }
TMLC_API const char* tmlc_isa() { return TMLC_ISA; }
TMLC_API int tmlc_op_count() { return tmlc::op_count(); }
TMLC_API const char* tmlc_op_name(int opcode) {
    const tmlc::OpDef* op = tmlc::op_at(opcode);
    return op == nullptr ? nullptr : op->name;
}

// NULL when the threads cannot be had.
TMLC_API void* tmlc_pool_create(int threads) {
    if (threads < 1 || threads > 1024) return nullptr;
    try {
        return new Pool(threads);
    } catch (...) {
        return nullptr;
    }
}
TMLC_API int tmlc_pool_threads(void* pool) { return static_cast<Pool*>(pool)->threads(); }
// Ties worker i to core cores[i]; 0, or the system's error number.
TMLC_API int tmlc_pool_pin(void* pool, const int* cores, int count) { return static_cast<Pool*>(pool)->pin(cores, count); }
TMLC_API void tmlc_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

TMLC_API void* tmlc_plan_create(const int64_t* words, int64_t n_words, const void* weights, int64_t weight_bytes,
                                int threads, char* err, int64_t err_len) {
    const auto say = [&](const char* what) {
        if (err != nullptr && err_len > 0) std::snprintf(err, static_cast<size_t>(err_len), "%s", what);
    };
    try {
        std::string error;
        auto plan = Plan::create(words, n_words, weights, weight_bytes, threads, error);
        if (!plan) say(error.c_str());
        return plan.release();
    } catch (...) {
        say("no memory for the plan");
        return nullptr;
    }
}
TMLC_API int64_t tmlc_plan_arena_bytes(void* plan) { return static_cast<Plan*>(plan)->arena_bytes(); }
TMLC_API int64_t tmlc_plan_slot_bytes(void* plan) { return static_cast<Plan*>(plan)->slot_bytes(); }
TMLC_API int64_t tmlc_plan_scratch_bytes(void* plan) { return static_cast<Plan*>(plan)->scratch_bytes(); }
// Where the arena and the scratch lie, for whoever wants to lock them in memory.
TMLC_API const void* tmlc_plan_arena(void* plan) { return static_cast<Plan*>(plan)->arena().data(); }
TMLC_API const void* tmlc_plan_scratch(void* plan) { return static_cast<Plan*>(plan)->scratch().data(); }
TMLC_API void tmlc_plan_destroy(void* plan) { delete static_cast<Plan*>(plan); }

// Whether this build's multiply-add rounds once, without which a plan cannot promise portable bits.
TMLC_API int tmlc_fused() { return tmlc::fused ? 1 : 0; }
TMLC_API void tmlc_plan_portable_bits(void* plan, int on) { static_cast<Plan*>(plan)->portable_bits(on != 0); }

// `inputs` and `outputs` have as many entries as the method declares, `parts` n_parts (the binding checks that); pool may
// be NULL. `part` gets the session that the call was refused for, or -1.
TMLC_API int tmlc_plan_run(void* plan, void* pool, int method, const tmlc::Part* parts, int64_t n_parts, int64_t slot_bytes,
                           const void* const* inputs, const int64_t* input_bytes, void* const* outputs,
                           const int64_t* output_bytes, int64_t* part, char* err, int64_t err_len) {
    Plan& p = *static_cast<Plan*>(plan);
    Buffer in[64] = {}, out[64] = {};
    if (method >= 0 && method < static_cast<int>(p.methods().size())) {
        const Plan::Method& m = p.methods()[static_cast<size_t>(method)];
        for (size_t k = 0; k < m.inputs.size(); ++k) in[k] = {inputs[k], input_bytes[k]};
        for (size_t k = 0; k < m.outputs.size(); ++k) out[k] = {outputs[k], output_bytes[k]};
    }
    tmlc::Serial serial;
    tmlc::Parallel& par = pool != nullptr ? *static_cast<tmlc::Parallel*>(static_cast<Pool*>(pool)) : serial;
    Plan::Fault fault{err, err_len};
    const int status = p.run(par, method, parts, n_parts, slot_bytes, in, out, fault);
    if (part != nullptr) *part = fault.part;
    return status;
}

// Why a method takes only one session a call; NULL where it takes several.
TMLC_API const char* tmlc_plan_unbatched(void* plan, int method) {
    const auto& m = static_cast<Plan*>(plan)->methods();
    return method < 0 || method >= static_cast<int>(m.size()) ? "there is no such method" : m[static_cast<size_t>(method)].unbatched;
}

// How many arguments a method takes; -1 where there is no such method.
TMLC_API int tmlc_plan_inputs(void* plan, int method) {
    const auto& m = static_cast<Plan*>(plan)->methods();
    return method < 0 || method >= static_cast<int>(m.size()) ? -1 : static_cast<int>(m[static_cast<size_t>(method)].inputs.size());
}
TMLC_API int tmlc_plan_outputs(void* plan, int method) {
    const auto& m = static_cast<Plan*>(plan)->methods();
    return method < 0 || method >= static_cast<int>(m.size()) ? -1 : static_cast<int>(m[static_cast<size_t>(method)].outputs.size());
}

// Starts (and zeroes) or stops the collection of times.
TMLC_API void tmlc_plan_profile(void* plan, int on) { static_cast<Plan*>(plan)->profile(on != 0); }

// Nanoseconds spent in each operation of a method since `profile`, and what they touched: `touched` has three numbers for each,
// different experts, cached positions and cached positions of each row (touched.h). `runs` gets the runs that made them, and
// all positions of these. Returns the number of operations, of which at most `count` are written; -1 for no such method.
TMLC_API int tmlc_plan_times(void* plan, int method, double* ns, int64_t* touched, int64_t count, int64_t* runs) {
    const Plan& p = *static_cast<Plan*>(plan);
    if (method < 0 || method >= static_cast<int>(p.methods().size())) return -1;
    const Plan::Method& m = p.methods()[static_cast<size_t>(method)];
    const double unit = p.unit_ns();
    for (size_t k = 0; k < m.code.size() && static_cast<int64_t>(k) < count; ++k) {
        const tmlc::Touched& t = m.code[k].touched;
        ns[k] = static_cast<double>(m.code[k].units) * unit;
        touched[3 * k] = t.experts;
        touched[3 * k + 1] = t.keys;
        touched[3 * k + 2] = t.row_keys;
    }
    if (runs != nullptr) {
        runs[0] = m.calls;
        runs[1] = m.rows;
    }
    return static_cast<int>(m.code.size());
}

// Reads whole 64 KiB units of `data` (64-byte aligned) once, on the pool's threads; returns the sum of their words, which
// proves that they were read.
TMLC_API uint64_t tmlc_read_memory(void* pool, const void* data, int64_t bytes) {
    return tmlc::read_memory(*static_cast<Pool*>(pool), static_cast<const uint8_t*>(data), bytes);
}

// Multiplies as products with weights of this kind do (0: f32, 1: bf16, 2: int8), `rounds` times in each of `units`, on the
// pool's threads. Returns the multiply-adds; -1 for another kind.
TMLC_API int64_t tmlc_multiply_adds(void* pool, int kind, int64_t units, int64_t rounds) {
    if (kind < 0 || kind > 2 || units < 1 || rounds < 1) return -1;
    volatile float sink = 0.0f;
    float lane = 0.0f;
    const int64_t done = tmlc::multiply_adds(*static_cast<Pool*>(pool), static_cast<tmlc::Product>(kind), units, rounds, lane);
    sink = lane;
    static_cast<void>(sink);
    return done;
}
