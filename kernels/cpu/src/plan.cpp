// Reads, validates and runs plans. This is a trust boundary: a plan may come from a stranger.
//
// Whatever passes `create` can, for every n, touch only its own arena, slot, weights and the buffers of the call. The
// executor checks places (spaces, extents, alignment, overlaps); the kernels check shapes; data is checked as it is read.
//
// A call may bring several sessions. What touches no state runs once over all rows, so a weight is read once however
// many sessions there are; a call with a state runs once for each session on its own rows, or once with all of them
// where the kernel can do that (OpDef::all_spans). Whatever could refuse one of them is asked before anything changes.
#include "plan.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace tmlc {
namespace {

constexpr int64_t magic = 0x544d4c43504c414e, version = 2;
constexpr int64_t max_tensors = 1 << 20, max_methods = 1 << 10, max_code = 1 << 20, max_operands = 64;
constexpr int64_t max_numbers = 1 << 12, max_rows = 1 << 24, max_positions = 1 << 20;
constexpr int64_t max_cols = int64_t{1} << 31, max_space = int64_t{1} << 36;
constexpr int64_t max_parts = 1 << 16, last_position = int64_t{1} << 62;

struct Ops {
    std::vector<const OpDef*> all;
    Ops() {
        for (const OpTable& t : {dense_ops(), linear_ops(), attention_ops(), moe_ops(), media_ops(), random_ops(), head_ops(), topk_ops(),
                                block_ops(), head_sample_ops()})
            for (int i = 0; i < t.count; ++i) all.push_back(t.ops + i);
    }
};
const Ops& ops() {
    static const Ops table;
    return table;
}

bool named(const Plan::Code& c, const char* name) { return std::strcmp(c.op->name, name) == 0; }

// Do two tensors of one space share bytes? Interleaved columns of the same rows do not.
bool share_bytes(const TensorInfo& x, const TensorInfo& y, int64_t n) {
    if (x.space != y.space) return false;
    const bool indexed = x.space == Space::input || x.space == Space::output;
    if (indexed && x.offset != y.offset) return false;
    const int64_t x0 = indexed ? 0 : x.offset, y0 = indexed ? 0 : y.offset;
    const __int128 ex = extent(x, n), ey = extent(y, n);
    if (ex == 0 || ey == 0 || x0 + ex <= y0 || y0 + ey <= x0) return false;
    const int64_t px = x.stride * size_of(x.dtype), py = y.stride * size_of(y.dtype);
    if (px != py) return true;
    const int64_t delta = ((y0 - x0) % px + px) % px;
    return !(delta >= x.cols * size_of(x.dtype) && delta + y.cols * size_of(y.dtype) <= px);
}

bool identical(const TensorInfo& x, const TensorInfo& y) {
    return x.space == y.space && x.dtype == y.dtype && x.offset == y.offset && x.same_rows(y) && x.cols == y.cols &&
           x.stride == y.stride;
}

__attribute__((format(printf, 3, 4))) int fail(int status, Plan::Fault& fault, const char* format, ...) {
    if (fault.text == nullptr || fault.length <= 0) return status;
    va_list values;
    va_start(values, format);
    std::vsnprintf(fault.text, static_cast<size_t>(fault.length), format, values);
    va_end(values);
    return status;
}

}  // namespace

int op_count() { return static_cast<int>(ops().all.size()); }
const OpDef* op_at(int opcode) {
    return opcode >= 0 && opcode < op_count() ? ops().all[static_cast<size_t>(opcode)] : nullptr;
}

__int128 extent(const TensorInfo& t, int64_t n) {
    const __int128 rows = static_cast<__int128>(t.a) * n + t.b;
    return rows == 0 ? 0 : ((rows - 1) * t.stride + t.cols) * size_of(t.dtype);
}

struct Plan::Reader {
    const int64_t* words;
    int64_t count, at = 0;
    bool has(int64_t n) const { return n >= 0 && n <= count - at; }
    int64_t next() { return words[at++]; }
};

std::unique_ptr<Plan> Plan::create(const int64_t* words, int64_t n_words, const void* weights, int64_t weight_bytes,
                                   int threads, std::string& error) {
    std::unique_ptr<Plan> plan(new Plan);
    if (threads < 1 || threads > 1024) return error = "threads must be 1..1024", nullptr;
    if (weight_bytes < 0 || reinterpret_cast<uintptr_t>(weights) % 8 != 0)
        return error = "the weights are not 8-byte aligned", nullptr;
    plan->weights_ = static_cast<const uint8_t*>(weights);
    plan->weight_bytes_ = weight_bytes;
    plan->threads_ = threads;
    Reader in{words, n_words};
    if (!plan->read(in, error)) return nullptr;
    if (!plan->arena_.reserve(plan->arena_wanted_) || !plan->scratch_.reserve(plan->scratch_wanted_))
        return error = "no memory for the arena", nullptr;
    return plan;
}

bool Plan::read(Reader& in, std::string& error) {
    if (!in.has(6)) return error = "the plan is cut short", false;
    if (in.next() != magic) return error = "not a plan (wrong magic number)", false;
    if (in.next() != version) return error = "the plan has another version than this library", false;
    arena_wanted_ = in.next();
    slot_bytes_ = in.next();
    const int64_t n_tensors = in.next(), n_methods = in.next();
    if (arena_wanted_ < 0 || arena_wanted_ > max_space) return error = "absurd arena size", false;
    if (slot_bytes_ < 0 || slot_bytes_ > max_space) return error = "absurd slot size", false;
    if (n_methods < 0 || n_methods > max_methods) return error = "absurd number of methods", false;
    if (!read_tensors(in, n_tensors, error)) return false;
    for (int64_t m = 0; m < n_methods; ++m)
        if (!read_method(in, m, error)) {
            error = "method " + std::to_string(m) + ": " + error;
            return false;
        }
    if (in.at != in.count) return error = "words left over at the end", false;
    size_t most = 0, parts = 1;
    for (const Method& m : methods_) {
        for (const Code& c : m.code) most = std::max(most, c.tensors.size());
        if (m.unbatched == nullptr) parts = std::max(parts, static_cast<size_t>(std::min(m.max_n, max_parts)));
    }
    operands_.resize(most);
    cut_.resize(most);
    spans_.resize(parts);
    slots_.resize(parts);
    return true;
}

bool Plan::read_tensors(Reader& in, int64_t count, std::string& error) {
    if (count < 0 || count > max_tensors || !in.has(count * 7)) return error = "the tensor table is cut short", false;
    tensors_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t space = in.next(), dtype = in.next();
        TensorInfo t{};
        t.offset = in.next();
        t.a = in.next();
        t.b = in.next();
        t.cols = in.next();
        t.stride = in.next();
        const char* what = nullptr;
        if (space < 0 || space > 4) what = "unknown space";
        else if (dtype < 0 || dtype > 4) what = "unknown dtype";
        else if (t.offset < 0) what = "negative offset";
        else if (t.a < 0 || t.a > max_rows || t.b < 0 || t.b > max_rows) what = "absurd number of rows";
        else if (t.cols < 1 || t.cols > max_cols || t.stride < 0 || t.stride > max_cols) what = "absurd number of columns";
        else {
            t.space = static_cast<Space>(space);
            t.dtype = static_cast<DType>(dtype);
            const bool call = t.space == Space::input || t.space == Space::output;
            const bool fixed = t.space == Space::slot || t.space == Space::weight;
            if (t.stride < t.cols) {
                if (t.a > 0 || t.b > 1) what = "stride below the number of columns";
                t.stride = t.cols;
            }
            if (!call && t.offset % size_of(t.dtype) != 0) what = "offset not aligned to the dtype";
            if (fixed && t.a != 0) what = "a state or weight whose rows depend on n";
        }
        if (what != nullptr) {
            error = "tensor " + std::to_string(i) + ": " + what;
            return false;
        }
        tensors_.push_back(t);
    }
    return true;
}

bool Plan::read_method(Reader& in, int64_t, std::string& error) {
    if (!in.has(4)) return error = "cut short", false;
    Method m;
    m.max_n = in.next();
    const int64_t n_inputs = in.next(), n_outputs = in.next(), n_code = in.next();
    if (m.max_n < 1 || m.max_n > max_positions) return error = "absurd max_n", false;
    if (n_inputs < 0 || n_inputs > max_operands || n_outputs < 0 || n_outputs > max_operands ||
        !in.has(n_inputs + n_outputs))
        return error = "absurd number of inputs or outputs", false;
    if (n_code < 0 || n_code > max_code) return error = "absurd number of operations", false;
    const auto known = [&](int64_t id) { return id >= 0 && id < static_cast<int64_t>(tensors_.size()); };
    for (int64_t k = 0; k < n_inputs + n_outputs; ++k) {
        const bool is_input = k < n_inputs;
        const int64_t id = in.next(), index = is_input ? k : k - n_inputs;
        if (!known(id)) return error = "an input or output that is not in the tensor table", false;
        const TensorInfo& t = tensor(id);
        if (t.space != (is_input ? Space::input : Space::output) || t.offset != index)
            return error = "an input or output whose tensor names another argument", false;
        if (extent(t, m.max_n) > max_space) return error = "an absurdly large input or output", false;
        (is_input ? m.inputs : m.outputs).push_back(id);
    }
    for (int64_t k = 0; k < n_code; ++k) {
        const auto refuse = [&](const char* what, const char* op) {
            error = "operation " + std::to_string(k) + (*op ? std::string(" (") + op + "): " : ": ") + what;
            return false;
        };
        if (!in.has(4)) return refuse("cut short", "");
        const int64_t opcode = in.next(), n_t = in.next(), n_i = in.next(), n_f = in.next();
        if (opcode < 0 || opcode >= op_count()) return refuse("unknown opcode", "");
        Code c;
        c.op = op_at(static_cast<int>(opcode));
        if (n_t < 0 || n_t > max_operands || n_i < 0 || n_i > max_numbers || n_f < 0 || n_f > max_numbers ||
            !in.has(n_t + n_i + n_f))
            return refuse("absurd number of operands", c.op->name);
        for (int64_t j = 0; j < n_t; ++j) {
            const int64_t id = in.next();
            if (!known(id)) return refuse("an operand that is not in the tensor table", c.op->name);
            c.tensors.push_back(id);
            c.info.push_back(&tensor(id));
        }
        for (int64_t j = 0; j < n_i; ++j) c.ints.push_back(in.next());
        for (int64_t j = 0; j < n_f; ++j) {
            const int64_t word = in.next();
            double v;
            std::memcpy(&v, &word, 8);
            c.floats.push_back(v);
        }
        if (const char* what = check_call(c, m)) return refuse(what, c.op->name);
        const Call call{c.info.data(), static_cast<int>(n_t), c.ints.data(), static_cast<int>(n_i), c.floats.data(),
                        static_cast<int>(n_f), m.max_n};
        const int64_t scratch = c.op->scratch(call, threads_);
        if (scratch < 0 || scratch > max_space) return refuse("absurd scratch size", c.op->name);
        scratch_wanted_ = std::max(scratch_wanted_, scratch);
        for (const TensorInfo* t : c.info) {
            if (t->space != Space::slot) continue;
            c.by_session = !c.op->all_spans;
            if (t->dtype == DType::i64 && t->fixed(1, 1)) m.positions.push_back(t->offset);
        }
        if (named(c, "moe")) {
            c.count = &Plan::count_experts_of;
            experts_.resize(std::max(experts_.size(), static_cast<size_t>((c.ints[0] + 63) / 64)));
        } else if (named(c, "attention")) {
            c.count = &Plan::count_keys_of;
        }
        m.code.push_back(std::move(c));
    }
    std::sort(m.positions.begin(), m.positions.end());
    m.positions.erase(std::unique(m.positions.begin(), m.positions.end()), m.positions.end());
    for (const Code& c : m.code)
        if (named(c, "advance") && c.ints[0] > 0) m.advances.push_back(&c);
    if (const char* what = check_linear_caches(m)) return error = what, false;
    m.unbatched = check_batch(m);
    methods_.push_back(std::move(m));
    return true;
}

// The places of a call's operands, then the kernel's own view of shapes.
const char* Plan::check_call(const Code& c, const Method& m) const {
    if (static_cast<int>(c.info.size()) < c.op->n_outputs) return "too few operands";
    const auto written = [&](size_t i) { return static_cast<int>(i) < c.op->n_outputs; };
    for (size_t i = 0; i < c.info.size(); ++i) {
        const TensorInfo& t = *c.info[i];
        if (const char* what = check_space(t, m)) return what;
        if (written(i) && (t.space == Space::weight || t.space == Space::input))
            return "an output that lies in the weights or in an input";
    }
    // Anything written (outputs, and states in the slot) must not share bytes with another operand; an operation that
    // reads each element before it writes it may work in place.
    for (size_t i = 0; i < c.info.size(); ++i) {
        const TensorInfo& x = *c.info[i];
        if (!written(i) && x.space != Space::slot) continue;
        for (size_t j = 0; j < c.info.size(); ++j) {
            if (i == j || !share_bytes(x, *c.info[j], m.max_n)) continue;
            const bool both_written = written(i) && written(j);
            const bool in_place = c.op->in_place && !both_written && identical(x, *c.info[j]);
            if (!in_place) return "operands that overlap";
        }
    }
    const Call call{c.info.data(), static_cast<int>(c.info.size()), c.ints.data(), static_cast<int>(c.ints.size()),
                    c.floats.data(), static_cast<int>(c.floats.size()), m.max_n};
    return c.op->check(call);
}

const char* Plan::check_space(const TensorInfo& t, const Method& m) const {
    const __int128 most = extent(t, m.max_n);
    switch (t.space) {
        case Space::arena: return t.offset + most <= arena_wanted_ ? nullptr : "an operand outside the arena";
        case Space::slot: return t.offset + most <= slot_bytes_ ? nullptr : "an operand outside the slot";
        case Space::weight: return t.offset + most <= weight_bytes_ ? nullptr : "an operand outside the weights";
        case Space::input: case Space::output: break;
    }
    // A view of an argument must stay inside what the method declares for it; extents are linear in n.
    const auto& arguments = t.space == Space::input ? m.inputs : m.outputs;
    if (t.offset >= static_cast<int64_t>(arguments.size())) return "an argument that the method does not have";
    const TensorInfo& whole = tensor(arguments[static_cast<size_t>(t.offset)]);
    if (size_of(t.dtype) > size_of(whole.dtype)) return "a view with a wider dtype than its argument";
    return extent(t, 1) <= extent(whole, 1) && most <= extent(whole, m.max_n) ? nullptr
                                                                              : "a view outside its argument";
}

// A cache that is not a ring is safe only behind an `advance` that stops at its end.
const char* Plan::check_linear_caches(const Method& m) const {
    for (const Code& c : m.code) {
        if (!named(c, "attention") || c.ints[2] != 0) continue;
        bool guarded = false;
        for (const Code* a : m.advances)
            guarded |= identical(*a->info[0], *c.info[4]) && a->ints[0] <= c.ints[4];
        if (!guarded) return "attention over all keys without an advance that stops at the end of its cache";
    }
    return nullptr;
}

// Can the rows of several sessions stand one after another in every tensor of the method? Rows [a, 0] can be cut between
// two positions. Rows that do not grow with n can be one for all only where nothing that differs between sessions was
// written there: in an argument of the call (and in weights; states each session has for itself).
const char* Plan::check_batch(const Method& m) const {
    const auto cut = [](const TensorInfo& t) {
        if (t.space == Space::slot || t.space == Space::weight) return true;
        return t.b == 0 ? t.a > 0 : t.a == 0 && t.space == Space::input;
    };
    const char* what = "a tensor has rows that belong to no position";
    for (int64_t id : m.inputs)
        if (!cut(tensor(id))) return what;
    for (int64_t id : m.outputs)
        if (!cut(tensor(id))) return what;
    for (const Code& c : m.code)
        for (const TensorInfo* t : c.info)
            if (!cut(*t)) return what;
    return nullptr;
}

// An operand for all n positions of a call; a state is that of the first session.
Operand Plan::resolve(const TensorInfo& t, int64_t n, const Buffer* inputs, const Buffer* outputs) const {
    void* data = nullptr;
    switch (t.space) {
        case Space::arena: data = arena_.data() + t.offset; break;
        case Space::slot: data = spans_[0].slot + t.offset; break;
        case Space::weight: data = const_cast<uint8_t*>(weights_) + t.offset; break;
        case Space::input: data = const_cast<void*>(inputs[t.offset].data); break;
        case Space::output: data = const_cast<void*>(outputs[t.offset].data); break;
    }
    return {data, t.rows(n), t.cols, t.stride, t.dtype};
}

// The sessions of a call, as spans: each brings positions, together no more than max_n, and memory of its own.
int Plan::check_parts(const Method& m, const Part* parts, int64_t n_parts, int64_t slot_bytes, Fault& fault) {
    const auto say = [](int64_t v) { return static_cast<long long>(v); };
    if (n_parts > 1 && m.unbatched != nullptr)
        return fail(bad_call, fault, "the method takes one session at a time: %s", m.unbatched);
    if (n_parts < 1 || n_parts > static_cast<int64_t>(spans_.size()) || n_parts > m.max_n)
        return fail(bad_call, fault, "%lld sessions in one call, where 1..%lld are possible", say(n_parts),
                    say(std::min<int64_t>(m.max_n, static_cast<int64_t>(spans_.size()))));
    if (slot_bytes < slot_bytes_)
        return fail(bad_call, fault, "a slot has %lld bytes, the plan needs %lld", say(slot_bytes), say(slot_bytes_));
    int64_t n = 0;
    for (int64_t s = 0; s < n_parts; ++s) {
        const Part& part = parts[s];
        fault.part = s;
        if (part.n < 1 || part.n > m.max_n - n)
            return fail(bad_call, fault, "%lld positions after %lld others in one call, where 1..%lld are possible",
                        say(part.n), say(n), say(m.max_n));
        const auto address = reinterpret_cast<uintptr_t>(part.slot);
        if (slot_bytes_ > 0 && (part.slot == nullptr || address % 8 != 0))
            return fail(bad_call, fault, "the slot is missing or not 8-byte aligned");
        spans_[static_cast<size_t>(s)] = {n, part.n, part.slot};
        slots_[static_cast<size_t>(s)] = address;
        n += part.n;
    }
    fault.part = -1;
    if (n_parts == 1 || slot_bytes_ == 0) return ok;
    std::sort(slots_.begin(), slots_.begin() + n_parts);
    for (size_t s = 1; s < static_cast<size_t>(n_parts); ++s)
        if (slots_[s] - slots_[s - 1] < static_cast<uintptr_t>(slot_bytes_))
            return fail(bad_call, fault, "two sessions of one call share a slot");
    return ok;
}

int Plan::check_buffers(const Method& m, int64_t n, const Buffer* inputs, const Buffer* outputs, Fault& fault) const {
    for (size_t k = 0; k < m.inputs.size() + m.outputs.size(); ++k) {
        const bool is_input = k < m.inputs.size();
        const size_t index = is_input ? k : k - m.inputs.size();
        const TensorInfo& t = tensor((is_input ? m.inputs : m.outputs)[index]);
        const Buffer& b = (is_input ? inputs : outputs)[index];
        const char* which = is_input ? "input" : "output";
        const __int128 need = extent(t, n);
        if (need > 0 && b.data == nullptr) return fail(bad_call, fault, "%s %zu is missing", which, index);
        if (b.bytes < need)
            return fail(bad_call, fault, "an %s is too small: it needs %lld bytes and has %lld", which,
                        static_cast<long long>(need), static_cast<long long>(b.bytes));
        if (reinterpret_cast<uintptr_t>(b.data) % static_cast<uintptr_t>(size_of(t.dtype)) != 0)
            return fail(bad_call, fault, "%s %zu is not aligned to its dtype", which, index);
    }
    return ok;
}

// Every session's positions, before any session changes: a slot may be damaged, a context may have no room.
int Plan::check_positions(const Method& m, Fault& fault) const {
    const auto position_at = [](const uint8_t* slot, int64_t offset) {
        int64_t position;
        std::memcpy(&position, slot + offset, 8);
        return position;
    };
    for (const Span& span : spans_) {
        if (&span == spans_.data() + n_spans_) break;
        fault.part = &span - spans_.data();
        for (int64_t offset : m.positions) {
            const int64_t position = position_at(span.slot, offset);
            if (position < 0 || position >= last_position - span.n)
                return fail(bad_slot, fault, "the slot holds an impossible position: %lld", static_cast<long long>(position));
        }
        for (const Code* a : m.advances) {
            const int64_t position = position_at(span.slot, a->info[0]->offset);
            if (position + span.n > a->ints[0])
                return fail(context_full, fault, "context full: %lld of %lld positions are used",
                            static_cast<long long>(position), static_cast<long long>(a->ints[0]));
        }
    }
    fault.part = -1;
    return ok;
}

int Plan::run_by_session(const Code& c, const RunArgs& all) {
    for (int s = 0; s < all.n_spans; ++s) {
        for (int j = 0; j < all.n_t; ++j) cut_[static_cast<size_t>(j)] = all.at(j, s);
        const Span own{0, all.spans[s].n, all.spans[s].slot};
        const RunArgs args{cut_.data(), all.n_t,     all.i,   all.n_i,  all.f, own.n,
                           all.scratch, all.par, all.info, &own, 1,      all.portable};
        if (const int status = c.op->run(args); status != ok) return status;
    }
    return ok;
}

int Plan::run_code(Parallel& par, int method, Method& m, int64_t n, const Buffer* inputs, const Buffer* outputs,
                   Fault& fault) {
    uint64_t last = profiling_ ? timing_.now() : 0;  // one reading ends a call and begins the next
    for (size_t k = 0; k < m.code.size(); ++k) {
        Code& c = m.code[k];
        for (size_t j = 0; j < c.info.size(); ++j) operands_[j] = resolve(*c.info[j], n, inputs, outputs);
        const RunArgs args{operands_.data(),  static_cast<int>(c.info.size()), c.ints.data(), static_cast<int>(c.ints.size()),
                           c.floats.data(), n, scratch_.data(), par, c.info.data(), spans_.data(), n_spans_, portable_};
        const int status = c.by_session && n_spans_ > 1 ? run_by_session(c, args) : c.op->run(args);
        // A context that was not full before can only be full now in a plan that writes its own positions.
        if (status != ok)
            return fail(bad_index, fault, "an index out of range (method %d, operation %zu, %s)", method, k, c.op->name);
        if (!profiling_) continue;
        const uint64_t now = timing_.now();
        c.units += now - last;
        last = now;
        if (c.count == nullptr) continue;
        (this->*c.count)(c, args);
        last = timing_.now();  // counting is nobody's time
    }
    return ok;
}

int Plan::run(Parallel& par, int method, const Part* parts, int64_t n_parts, int64_t slot_bytes, const Buffer* inputs,
              const Buffer* outputs, Fault& fault) {
    fault.part = -1;
    if (method < 0 || method >= static_cast<int>(methods_.size()))
        return fail(bad_call, fault, "the plan has no method %d", method);
    if (par.threads() > threads_)
        return fail(bad_call, fault, "a pool of %d threads for a plan made for %d", par.threads(), threads_);
    if (running_.exchange(true, std::memory_order_acquire)) return fail(bad_call, fault, "the plan is running already");
    Method& m = methods_[static_cast<size_t>(method)];
    int status = check_parts(m, parts, n_parts, slot_bytes, fault);
    if (status == ok) {
        n_spans_ = static_cast<int>(n_parts);
        const int64_t n = spans_[static_cast<size_t>(n_parts - 1)].begin + spans_[static_cast<size_t>(n_parts - 1)].n;
        status = check_buffers(m, n, inputs, outputs, fault);
        if (status == ok) status = check_positions(m, fault);
        if (status == ok) status = run_code(par, method, m, n, inputs, outputs, fault);
        if (profiling_) {
            ++m.calls;
            m.rows += n;
        }
    }
    running_.store(false, std::memory_order_release);
    return status;
}

void Plan::profile(bool on) {
    profiling_ = on;
    timing_.start();
    for (Method& m : methods_) {
        m.calls = m.rows = 0;
        for (Code& c : m.code) {
            c.units = 0;
            c.touched = {};
        }
    }
}

}  // namespace tmlc
