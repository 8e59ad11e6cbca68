// The contract between the plan executor and the kernels: how a kernel declares its checks, scratch and work.
//
// A kernel is three functions. `check` runs once at load, for all n at once (row counts are a*n + b), and must refuse
// everything that could read or write out of bounds later. `scratch` says how many bytes of shared workspace the call
// needs at the method's max_n. `run` does the work; it may only fail on data (an id out of range).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tmlc {

enum class Space : int64_t { arena = 0, slot = 1, weight = 2, input = 3, output = 4 };
enum class DType : int64_t { f32 = 0, bf16 = 1, i32 = 2, i64 = 3, u8 = 4 };

inline int64_t size_of(DType t) {
    switch (t) {
        case DType::f32: case DType::i32: return 4;
        case DType::bf16: return 2;
        case DType::i64: return 8;
        case DType::u8: return 1;
    }
    return 0;
}

// One row of the plan's tensor table. The executor has already checked that the bytes it names lie inside its space
// for every n, that 0 <= a, b <= 2^24, 1 <= cols <= 2^31, cols <= stride <= 2^31, that a = 0 in slot and weights, that
// weights and inputs are never written, and that nothing written shares bytes with another operand of its call.
struct TensorInfo {
    Space space;
    DType dtype;
    int64_t offset, a, b, cols, stride;
    int64_t rows(int64_t n) const { return a * n + b; }
    bool same_rows(const TensorInfo& o) const { return a == o.a && b == o.b; }
    bool fixed(int64_t r, int64_t c) const { return a == 0 && b == r && cols == c; }
};

// What `check` and `scratch` see: the call as written in the plan.
struct Call {
    const TensorInfo* const* t;
    int n_t;
    const int64_t* i;
    int n_i;
    const double* f;
    int n_f;
    int64_t max_n;
};

// What `run` sees: operands resolved to memory for this call's n.
struct Operand {
    void* data;
    int64_t rows, cols, stride;
    DType dtype;
    float* f32(int64_t r = 0) const { return static_cast<float*>(data) + r * stride; }
    int32_t* i32(int64_t r = 0) const { return static_cast<int32_t*>(data) + r * stride; }
    int64_t* i64(int64_t r = 0) const { return static_cast<int64_t*>(data) + r * stride; }
    uint8_t* u8(int64_t r = 0) const { return static_cast<uint8_t*>(data) + r * stride; }
    uint16_t* bf16(int64_t r = 0) const { return static_cast<uint16_t*>(data) + r * stride; }
};

// Splits `units` of independent work over the pool's threads: fn(begin, end, thread). Which thread takes which unit
// must never change a result. `work` is a rough count of multiply-adds in all: small work stays on the caller.
// RangeFn refers to a callable without owning it (std::function would allocate, and a tick must not).
class RangeFn {
    void* object_;
    void (*call_)(void*, int64_t, int64_t, int);

public:
    template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, RangeFn>>>
    RangeFn(F&& f)
        : object_(const_cast<void*>(static_cast<const void*>(&f))),
          call_([](void* o, int64_t a, int64_t b, int t) { (*static_cast<std::remove_reference_t<F>*>(o))(a, b, t); }) {}
    void operator()(int64_t begin, int64_t end, int thread) const { call_(object_, begin, end, thread); }
};
struct Parallel {
    virtual int threads() const = 0;
    virtual void split(int64_t units, int64_t work, const RangeFn& fn) = 0;
    virtual ~Parallel() = default;
};

// One session's part of a call: positions [begin, begin + n) of the call's n are its, and so is the slot.
struct Span {
    int64_t begin, n;
    uint8_t* slot;
};

struct RunArgs {
    const Operand* t;
    int n_t;
    const int64_t* i;
    int n_i;
    const double* f;
    int64_t n;           // the call's n
    uint8_t* scratch;    // 64-byte aligned, as many bytes as `scratch` asked for
    Parallel& par;
    const TensorInfo* const* info;  // of the operands
    const Span* spans;              // the sessions of this call, in the order of their positions
    int n_spans;
    // Asks for bits that every machine can make: no instruction that rounds in a way which another instruction set does not have
    // (bf16 dot products), only `fma` of vec.h, exact integer sums and the functions of vec.h and real.h.
    bool portable = false;

    // Operand j as session s has it: its own state, its own rows of what has rows for each position, or the whole.
    Operand at(int j, int s) const {
        Operand o = t[j];
        const TensorInfo& x = *info[j];
        if (x.space == Space::slot) o.data = spans[s].slot + x.offset;
        if (x.a == 0) return o;
        o.data = static_cast<uint8_t*>(o.data) + x.a * spans[s].begin * x.stride * size_of(x.dtype);
        o.rows = x.rows(spans[s].n);
        return o;
    }
};

constexpr int ok = 0;                 // status of run
constexpr int bad_index = 1;          // an id, level or expert number out of range
constexpr int context_full = 2;       // an `advance` limit would be passed

struct OpDef {
    const char* name;
    const char* (*check)(const Call&);          // nullptr: fine; else one line that says what is wrong
    int64_t (*scratch)(const Call&, int threads);
    int (*run)(const RunArgs&);
    int n_outputs;                              // the first n_outputs operands (and slot operands) are written
    bool in_place = false;                      // an output may be exactly one of the inputs (no other overlap ever)
    // A call with a state in the slot runs once for each session, unless the op says that it takes all of them at once
    // (RunArgs::spans): then it must use RunArgs::at for whatever lies in the slot.
    bool all_spans = false;
};

// The tables that the kernel files define; plan.cpp chains them into one numbering.
struct OpTable { const OpDef* ops; int count; };
OpTable dense_ops();       // dense.cpp: copy, norms, elementwise, embedding
OpTable linear_ops();      // linear.cpp: linear
OpTable attention_ops();   // attention.cpp: attention, advance, short_conv
OpTable head_ops();        // heads.cpp: rope, head_columns, concat_heads
OpTable moe_ops();         // moe.cpp: sink_router, router, moe
OpTable topk_ops();        // topk.cpp: topk_router
OpTable media_ops();       // media.cpp: bag_embedding, dmel, patchify, overlap_add
OpTable block_ops();       // blocks.cpp: sigmoid, softcap, l2_clip, concat_columns, mix_blocks, dynamic_conv
OpTable random_ops();      // random.cpp: philox_normal, sample
OpTable head_sample_ops(); // head.cpp: head_sample

}  // namespace tmlc
