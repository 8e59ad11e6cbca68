// A validated plan: what plan.cpp makes of the loader's words, and how it runs (docs/plan-format.md).
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "op.h"
#include "timing.h"
#include "touched.h"

namespace tmlc {

int op_count();
const OpDef* op_at(int opcode);  // nullptr when there is none

// Statuses beyond those of op.h: the call itself is wrong (n, buffer sizes, alignment, a busy plan), or a session's slot
// holds what no session can hold. As with context_full, nothing was changed then.
constexpr int bad_call = 3;
constexpr int bad_slot = 4;

struct Buffer {
    const void* data;
    int64_t bytes;
};

// What one session brings to a call: n positions, which follow those of the session before it, and its slot.
struct Part {
    int64_t n;
    uint8_t* slot;
};

class Plan {
public:
    // Checks everything for every n. Returns nullptr and says why in `error`.
    static std::unique_ptr<Plan> create(const int64_t* words, int64_t n_words, const void* weights,
                                        int64_t weight_bytes, int threads, std::string& error);

    // What a run that failed has to say. `part` is the session that the call was refused for, -1 where it is no
    // session's fault; nothing was changed unless the status is bad_index.
    struct Fault {
        char* text;
        int64_t length;
        int64_t part = -1;
    };

    // Runs one method on the positions of all parts together. Every session gets the bits that it would get alone.
    // Never allocates; `fault` is written only when the result is not ok.
    int run(Parallel& par, int method, const Part* parts, int64_t n_parts, int64_t slot_bytes, const Buffer* inputs,
            const Buffer* outputs, Fault& fault);

    struct Code {
        const OpDef* op;
        bool by_session = false;  // has a state in the slot, and the kernel takes one session at a time
        std::vector<int64_t> tensors;
        std::vector<const TensorInfo*> info;
        std::vector<int64_t> ints;
        std::vector<double> floats;
        uint64_t units = 0;  // of the clock of `Timing`, spent here since profiling was switched on
        Touched touched;     // since then
        void (Plan::*count)(Code&, const RunArgs&) = nullptr;  // of what only a run can tell
    };
    struct Method {
        int64_t max_n = 0;
        std::vector<int64_t> inputs, outputs;  // tensor numbers
        std::vector<Code> code;
        std::vector<const Code*> advances;     // those with a limit
        std::vector<int64_t> positions;        // where the slot holds a position
        const char* unbatched = nullptr;       // why it takes one session at a time; nullptr: it takes several
        int64_t calls = 0, rows = 0;           // runs since profiling was switched on, and their positions
    };

    const std::vector<Method>& methods() const { return methods_; }
    const TensorInfo& tensor(int64_t id) const { return tensors_[static_cast<size_t>(id)]; }
    int64_t arena_bytes() const { return arena_.bytes(); }
    int64_t slot_bytes() const { return slot_bytes_; }
    int64_t scratch_bytes() const { return scratch_.bytes(); }
    const Block& arena() const { return arena_; }
    const Block& scratch() const { return scratch_; }
    void profile(bool on);  // from zero; on: every call is timed
    double unit_ns() const { return timing_.unit_ns(); }
    void portable_bits(bool on) { portable_ = on; }  // RunArgs::portable of every call from here on

private:
    struct Reader;
    bool read(Reader& in, std::string& error);
    bool read_tensors(Reader& in, int64_t count, std::string& error);
    bool read_method(Reader& in, int64_t index, std::string& error);
    const char* check_space(const TensorInfo& t, const Method& m) const;
    const char* check_call(const Code& c, const Method& m) const;
    const char* check_linear_caches(const Method& m) const;
    const char* check_batch(const Method& m) const;
    Operand resolve(const TensorInfo& t, int64_t n, const Buffer* inputs, const Buffer* outputs) const;
    int check_parts(const Method& m, const Part* parts, int64_t n_parts, int64_t slot_bytes, Fault& fault);
    int check_buffers(const Method& m, int64_t n, const Buffer* inputs, const Buffer* outputs, Fault& fault) const;
    int check_positions(const Method& m, Fault& fault) const;
    int run_code(Parallel& par, int method, Method& m, int64_t n, const Buffer* inputs, const Buffer* outputs, Fault& fault);
    int run_by_session(const Code& c, const RunArgs& all);
    void count_experts_of(Code& c, const RunArgs& args) { count_experts(args, experts_, c.touched); }
    void count_keys_of(Code& c, const RunArgs& args) { count_keys(args, c.touched); }

    std::vector<TensorInfo> tensors_;
    std::vector<Method> methods_;
    std::vector<Operand> operands_, cut_;  // reused by every call of a run: of all sessions, and of one
    std::vector<Span> spans_;              // the sessions of this run, the first n_spans_ of them
    int n_spans_ = 0;
    std::vector<uintptr_t> slots_;         // their slots by address
    Block arena_, scratch_;
    const uint8_t* weights_ = nullptr;
    int64_t weight_bytes_ = 0, arena_wanted_ = 0, slot_bytes_ = 0, scratch_wanted_ = 0;
    std::vector<uint64_t> experts_;        // a bit for each that any call can name
    Timing timing_;
    int threads_ = 1;
    bool profiling_ = false, portable_ = false;
    std::atomic<bool> running_{false};
};

// Bytes from the first to past the last element of t for n positions (0 when it has no rows).
__int128 extent(const TensorInfo& t, int64_t n);

}  // namespace tmlc
