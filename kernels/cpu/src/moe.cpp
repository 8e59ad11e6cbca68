// Mixture of experts: the router with its shared-expert sink, and the experts themselves.
//
// Experts run in two stages over all positions of a call, pairs (position, choice) sorted by expert, so that each
// touched expert is read once. In the second stage a thread owns columns of the result and adds the experts up in
// ascending order, which makes the bits of a row independent of its neighbours and needs no third stage.
#include <cmath>
#include <cstring>

#include "check.h"
#include "epilogue.h"
#include "gemm.h"
#include "vec.h"

namespace tmlc {
namespace {

// ---- routing --------------------------------------------------------------------------------------------------------

// Scratch of one row being routed: scores of the E + S experts, then the logits of the K chosen.
int64_t route_floats(int64_t experts, int64_t choices) { return round_up(experts, 16) + round_up(choices, 16); }

struct Route {
    int64_t experts, top_k, shared;
    const float* bias;
    float scale;  // route_scale times the learned scale
    int64_t choices() const { return top_k + shared; }

    // Chooses and weighs the experts of one row. `scratch` holds route_floats; any input, even NaN, gives valid numbers.
    void run(const float* logits, float* weights, int32_t* chosen, float* scratch) const {
        float* score = scratch;
        float* picked = scratch + round_up(experts + shared, 16);
        for (int64_t e = 0; e < experts; e += 16) {
            const int64_t count = experts - e;
            store_n(score + e, sigmoid16(load_n(logits + e, count)) + load_n(bias + e, count), count);
        }
        for (int64_t j = 0; j < top_k; ++j) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; ++e) {
                bool taken = false;
                if (best >= 0 && !(score[e] > score[best])) continue;
                for (int64_t i = 0; i < j && !taken; ++i) taken = chosen[i] == e;
                if (!taken) best = e;
            }
            chosen[j] = static_cast<int32_t>(best);
        }
        for (int64_t s = 0; s < shared; ++s) chosen[top_k + s] = static_cast<int32_t>(experts + s);
        for (int64_t j = 0; j < round_up(choices(), 16); ++j) picked[j] = j < choices() ? logits[chosen[j]] : 0.0f;
        float top = -INFINITY;
        for (int64_t j = 0; j < choices(); j += 16) {
            store(picked + j, log_sigmoid16(load(picked + j)));
            for (int64_t i = j; i < j + 16 && i < choices(); ++i) top = picked[i] > top ? picked[i] : top;
        }
        for (int64_t j = 0; j < choices(); j += 16) store(picked + j, exp16(load(picked + j) - splat(top)));
        float sum = 0.0f;
        for (int64_t j = 0; j < choices(); ++j) sum += picked[j];
        for (int64_t j = 0; j < choices(); ++j) weights[j] = picked[j] / sum * scale;
    }
};

// Operands that both router forms share; `total` is the number of logits.
const char* check_route(const Call& c, const TensorInfo& bias, const TensorInfo& scale, int64_t total) {
    const TensorInfo &weights = *c.t[0], &experts = *c.t[1];
    const int64_t top_k = c.i[0], shared = c.i[1];
    TMLC_REQUIRE(total >= 1 && total <= max_experts, "absurd number of experts");
    TMLC_REQUIRE(shared >= 0 && shared < total && top_k >= 1 && top_k <= total - shared, "top_k does not fit the experts");
    TMLC_REQUIRE(top_k + shared <= max_choices, "too many choices");
    TMLC_REQUIRE(is_f32(weights) && weights.cols == top_k + shared, "weights must be f32 [n,K]");
    TMLC_REQUIRE(experts.dtype == DType::i32 && same_shape(experts, weights), "experts must be i32 [n,K]");
    TMLC_REQUIRE(is_f32(bias) && bias.fixed(1, total - shared), "the bias must be f32 [1,E]");
    TMLC_REQUIRE(is_f32(scale) && scale.fixed(1, 1), "the scale must be f32 [1,1]");
    return nullptr;
}
Route route_of(const RunArgs& a, const Operand& bias, const Operand& scale) {
    return {bias.cols, a.i[0], a.i[1], bias.f32(), static_cast<float>(a.f[0]) * *scale.f32()};
}

const char* check_sink_router(const Call& c) {
    TMLC_REQUIRE(arity(c, 5, 2, 1), "wrong number of operands");
    TMLC_REQUIRE(is_f32(*c.t[2]) && c.t[2]->same_rows(*c.t[0]), "logits must be f32 [n,E+S]");
    return check_route(c, *c.t[3], *c.t[4], c.t[2]->cols);
}
int64_t scratch_sink_router(const Call& c, int) { return 4 * route_floats(c.t[2]->cols, c.t[0]->cols); }
int run_sink_router(const RunArgs& a) {
    const Operand &weights = a.t[0], &experts = a.t[1], &logits = a.t[2];
    const Route route = route_of(a, a.t[3], a.t[4]);
    for (int64_t r = 0; r < weights.rows; ++r)
        route.run(logits.f32(r), weights.f32(r), experts.i32(r), reinterpret_cast<float*>(a.scratch));
    return ok;
}

constexpr int64_t router_chunk = 32;  // rows whose logits are kept at a time

const char* check_router(const Call& c) {
    TMLC_REQUIRE(arity(c, 6, 2, 1), "wrong number of operands");
    const TensorInfo &x = *c.t[2], &w = *c.t[3], &bias = *c.t[4];
    TMLC_REQUIRE(c.i[1] >= 0 && c.i[1] <= max_experts && bias.cols <= max_experts, "absurd number of experts");
    const int64_t total = bias.cols + c.i[1];
    TMLC_REQUIRE(is_f32(x) && x.same_rows(*c.t[0]), "x must be f32 [n,d]");
    TMLC_REQUIRE(w.dtype == DType::f32 && packed(w, blocks16(total), x.cols), "the weight must be packed f32 of E+S rows");
    return check_route(c, bias, *c.t[5], total);
}
int64_t scratch_router(const Call& c, int) {
    const int64_t total = round_up(c.t[4]->cols + c.i[1], 16);
    return 4 * (total * router_chunk + route_floats(total, c.t[0]->cols));
}
int run_router(const RunArgs& a) {
    const Operand &weights = a.t[0], &experts = a.t[1], &x = a.t[2], &w = a.t[3];
    const Route route = route_of(a, a.t[4], a.t[5]);
    const Packed matrix(w, x.cols, a.portable);
    float* logits = reinterpret_cast<float*>(a.scratch);
    const int64_t width = w.rows * 16;
    for (int64_t r0 = 0; r0 < x.rows; r0 += router_chunk) {
        const float* rows[router_chunk];
        const int64_t count = x.rows - r0 < router_chunk ? x.rows - r0 : router_chunk;
        for (int64_t r = 0; r < count; ++r) rows[r] = x.f32(r0 + r);
        a.par.split(w.rows, count * width * x.cols, [&](int64_t begin, int64_t end, int) {
            for_tiles<1>(rows, count, begin, end, matrix, 0, [&](int64_t r, int64_t b, auto& sums) {
                store(logits + r * width + b * 16, load(sums[0]));
            });
        });
        for (int64_t r = 0; r < count; ++r)
            route.run(logits + r * width, weights.f32(r0 + r), experts.i32(r0 + r), logits + router_chunk * width);
    }
    return ok;
}

// ---- experts --------------------------------------------------------------------------------------------------------

// Pairs that run together: those of one expert, or one alone. They are neighbours in `order`.
struct Group {
    int64_t expert, begin, count;
};

// Scratch of one call: pairs in groups, the hidden row of each, and the rounded rows (of x_bytes and hidden_bytes, rows.h).
struct Layout {
    int64_t f;  // floats of a hidden row
    int64_t starts, order, expert, groups, rows, hidden, x_codes, hidden_codes, bytes;
    Layout(int64_t e, int64_t f_, int64_t n, int64_t pairs, int64_t x_bytes, int64_t hidden_bytes)
        : f(round_up(f_, 16)) {
        int64_t at = 0;
        const auto take = [&](int64_t size) { const int64_t here = at; at += round_up(size, 64); return here; };
        starts = take(8 * (e + 1));
        groups = take(int64_t{sizeof(Group)} * (e > pairs ? e : pairs));
        order = take(8 * pairs);
        expert = take(4 * pairs);
        rows = take(8 * pairs);
        hidden = take(4 * pairs * f);
        x_codes = take(n * x_bytes);
        hidden_codes = take(pairs * hidden_bytes);
        bytes = at;
    }
};

// Flag 1 of the call: gate_up_bias and down_bias are there. Flag 2: the soft caps are. The other flags are epilogue.h's,
// and come with all ints (E f flags grouped_from start residual) and numbers (alpha limit gate_cap up_cap level).
bool has_biases(const int64_t* i, int n_i) { return n_i >= 3 && (i[2] & 1) != 0; }
bool has_caps(const int64_t* i, int n_i) { return n_i >= 3 && (i[2] & 2) != 0; }
int epilogue_at(bool biases) { return biases ? 8 : 6; }

TMLC_INLINE v16 capped(v16 x, float cap) { return splat(cap) * tanh16(x * splat(1.0f / cap)); }

// What happens between the two products of an expert, sixteen columns at a time.
struct Activation {
    float alpha = 0.0f, limit = 0.0f, gate_cap = 0.0f, up_cap = 0.0f;
    v16 operator()(v16 gate, v16 up) const {
        if (gate_cap > 0.0f) return capped(gate, gate_cap) * sigmoid16(gate) * capped(up, up_cap);
        if (!(alpha > 0.0f)) return silu16(gate) * up;
        const v16 most = splat(limit), g = min16(gate, most);
        return (max16(min16(up, most), zero16() - most) + splat(1.0f)) * (g * sigmoid16(splat(alpha) * g));
    }
};

const char* check_moe(const Call& c) {
    const bool biases = has_biases(c.i, c.n_i);
    const bool all = c.n_i == 6 && c.n_f == 5;
    TMLC_REQUIRE(all || (c.n_i == 2 && c.n_f == 0) || (c.n_i == 3 && (c.n_f == 2 || c.n_f == 4)), "wrong number of operands");
    const int64_t flags = c.n_i == 2 ? 0 : c.i[2];
    TMLC_REQUIRE(flags >= 0 && (flags & ~(all ? epilogue_flags | 3 : 3)) == 0, "unknown flags");
    TMLC_REQUIRE(c.n_i != 3 || has_caps(c.i, c.n_i) == (c.n_f == 4), "unknown flags");
    TMLC_REQUIRE(c.n_t == epilogue_at(biases) + epilogue_operands(flags), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &weights = *c.t[2], &experts = *c.t[3], &up = *c.t[4], &down = *c.t[5];
    const int64_t e = c.i[0], f = c.i[1];
    TMLC_REQUIRE(e >= 1 && e <= max_experts && f >= 1 && f <= 1 << 24, "absurd number or size of experts");
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && same_shape(out, x) && x.cols <= 1 << 24, "activations must be f32 of one shape");
    TMLC_REQUIRE(is_f32(weights) && weights.same_rows(x) && weights.cols <= max_choices, "weights must be f32 [n,K]");
    TMLC_REQUIRE(experts.dtype == DType::i32 && same_shape(experts, weights), "experts must be i32 [n,K]");
    TMLC_REQUIRE(packed(up, e * 2 * blocks16(f), x.cols), "gate_up is not packed for these experts");
    TMLC_REQUIRE(packed(down, e * blocks16(x.cols), f), "down is not packed for these experts");
    TMLC_REQUIRE(x.rows(c.max_n) <= int64_t{1} << 24, "too many rows");
    TMLC_REQUIRE(!biases || (is_f32(*c.t[6]) && c.t[6]->fixed(e, 2 * f)), "gate_up_bias must be f32 [E,2f]");
    TMLC_REQUIRE(!biases || (is_f32(*c.t[7]) && c.t[7]->fixed(e, x.cols)), "down_bias must be f32 [E,d]");
    for (int j = 0; j < c.n_f && j < 4; ++j) TMLC_REQUIRE(finite(c.f[j]) && c.f[j] >= 0, "alpha, limit and caps must not be negative");
    TMLC_REQUIRE(!has_caps(c.i, c.n_i) || (c.f[0] == 0 && c.f[2] > 0 && c.f[3] > 0), "both caps must be positive, and alpha 0");
    TMLC_REQUIRE(!all || c.i[3] >= 0, "grouped_from must not be negative");
    return all ? check_epilogue(c, epilogue_at(biases), flags, c.i[4], c.i[5], c.f[4]) : nullptr;
}
int64_t scratch_moe(const Call& c, int) {
    const TensorInfo &x = *c.t[1], &up = *c.t[4], &down = *c.t[5];
    const int64_t rows = x.rows(c.max_n), pairs = rows * c.t[2]->cols;
    const int64_t x_bytes = most_row_bytes(form_of(up.dtype, up.cols, x.cols), x.cols);
    const int64_t hidden_bytes = most_row_bytes(form_of(down.dtype, down.cols, c.i[1]), c.i[1]);
    return Layout(c.i[0], c.i[1], rows, pairs, x_bytes, hidden_bytes).bytes;
}

// Splits the work on groups of `units` units each: fn(group, begin, end). A part is one range of units, group after group, so
// that its weights are few long streams: a jump to another place costs about a microsecond. Ranges are balanced by what a
// unit takes: its weights, which cost as much as `weigh` rows do, and its rows.
template <class Fn>
void split_groups(Parallel& par, const Group* groups, int64_t count, int64_t units, int64_t work, Fn fn) {
    constexpr int64_t weigh = 3;
    int64_t all = 0;
    for (int64_t t = 0; t < count; ++t) all += units * (weigh + groups[t].count);
    par.split(all, work, [&](int64_t begin, int64_t end, int) {
        int64_t at = 0;  // where the group's units begin; a unit belongs to the part in which it begins
        for (int64_t t = 0; t < count && at < end; ++t) {
            const int64_t cost = weigh + groups[t].count;
            const auto unit = [&](int64_t place) { return place <= at ? 0 : std::min(units, (place - at + cost - 1) / cost); };
            if (unit(begin) < unit(end)) fn(t, unit(begin), unit(end));
            at += units * cost;
        }
    });
}

// A counting sort: each touched expert once, so that its weights are read once. Returns the number of groups.
int64_t group_by_expert(const int32_t* expert, int64_t pairs, int64_t experts, int64_t* starts, int64_t* order, Group* groups) {
    std::memset(starts, 0, static_cast<size_t>(8 * (experts + 1)));
    for (int64_t p = 0; p < pairs; ++p) ++starts[expert[p] + 1];
    int64_t n = 0;
    for (int64_t e = 0; e < experts; ++e) {
        if (starts[e + 1] > 0) groups[n++] = {e, starts[e], starts[e + 1]};
        starts[e + 1] += starts[e];
    }
    for (int64_t p = 0; p < pairs; ++p) order[starts[expert[p]]++] = p;
    return n;
}
// Each pair by itself, row after row, the experts of a row ascending as they are in the groups above.
int64_t one_by_one(const int32_t* expert, int64_t rows, int64_t choices, int64_t* order, Group* groups) {
    for (int64_t p = 0; p < rows * choices; ++p) {
        int64_t at = p;
        for (; at > p / choices * choices && expert[order[at - 1]] > expert[p]; --at) order[at] = order[at - 1];
        order[at] = p;
    }
    for (int64_t i = 0; i < rows * choices; ++i) groups[i] = {expert[order[i]], i, 1};
    return rows * choices;
}

int run_moe(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &weights = a.t[2], &experts = a.t[3], &up = a.t[4], &down = a.t[5];
    const int64_t n_experts = a.i[0], f = a.i[1], d = x.cols, choices = weights.cols, n = x.rows, pairs = n * choices;
    const int64_t f_blocks = blocks16(f), d_blocks = blocks16(d);
    const bool biases = has_biases(a.i, a.n_i);
    const Operand *up_bias = biases ? &a.t[6] : nullptr, *down_bias = biases ? &a.t[7] : nullptr;
    Activation activate;
    if (a.n_i >= 3) activate = {static_cast<float>(a.f[0]), static_cast<float>(a.f[1])};
    if (has_caps(a.i, a.n_i)) activate.gate_cap = static_cast<float>(a.f[2]), activate.up_cap = static_cast<float>(a.f[3]);
    const Packed w1(up, d, a.portable), w2(down, f, a.portable);
    const int64_t x_bytes = w1.rows.bytes(), hidden_bytes = w2.rows.bytes();
    const Layout at(n_experts, f, n, pairs, x_bytes, hidden_bytes);
    auto* starts = reinterpret_cast<int64_t*>(a.scratch + at.starts);    // of each expert's pairs, while they are sorted
    auto* groups = reinterpret_cast<Group*>(a.scratch + at.groups);      // experts with pairs, ascending
    auto* order = reinterpret_cast<int64_t*>(a.scratch + at.order);      // pair numbers, group by group
    auto* expert = reinterpret_cast<int32_t*>(a.scratch + at.expert);    // of each pair
    auto* rows = reinterpret_cast<const float**>(a.scratch + at.rows);   // the input row of each sorted pair
    auto* hidden = reinterpret_cast<float*>(a.scratch + at.hidden);      // of each sorted pair

    // Expert numbers are read once: what was checked is what is used.
    for (int64_t p = 0; p < pairs; ++p) {
        const int32_t e = experts.i32(p / choices)[p % choices];
        if (e < 0 || e >= n_experts) return bad_index;
        expert[p] = e;
    }
    const bool grouped = a.n_i != 6 || n >= a.i[3];
    const int64_t n_groups = grouped ? group_by_expert(expert, pairs, n_experts, starts, order, groups)
                                     : one_by_one(expert, n, choices, order, groups);

    uint8_t *const x_codes = a.scratch + at.x_codes, *const hidden_codes = a.scratch + at.hidden_codes;
    if (w1.rows.rounded()) w1.rows.round_rows(a.par, n, x_codes, [&](int64_t r) { return x.f32(r); });
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t r = order[i] / choices;
        rows[i] = w1.rows.rounded() ? reinterpret_cast<const float*>(x_codes + r * x_bytes) : x.f32(r);
    }
    // Units are 32 hidden columns, so that whoever computes them can round them for the down-projection.
    const int64_t f_units = (f_blocks + 1) / 2;
    split_groups(a.par, groups, n_groups, f_units, pairs * f * d * 2, [&](int64_t t, int64_t begin, int64_t end) {
        const int64_t e = groups[t].expert, i0 = groups[t].begin, count = groups[t].count, base = e * 2 * f_blocks;
        for (int64_t u = begin; u < end; ++u) {
            const int64_t last = 2 * u + 2 < f_blocks ? 2 * u + 2 : f_blocks;
            for_tiles<2>(rows + i0, count, 2 * u, last, w1, base, [&](int64_t r, int64_t b, auto& sums) {
                v16 gate = load(sums[0]), value = load(sums[1]);
                if (up_bias != nullptr) {
                    const float* bias = up_bias->f32(e) + b * 16;
                    gate = gate + load_n(bias, f - b * 16);
                    value = value + load_n(bias + f, f - b * 16);
                }
                store(hidden + (i0 + r) * at.f + b * 16, activate(gate, value));
            });
            if (w2.rows.rounded())
                for (int64_t i = i0; i < i0 + count; ++i)
                    w2.rows.round_group(hidden + i * at.f + u * 32, f - u * 32,
                                        hidden_codes + i * hidden_bytes + u * w2.rows.group_bytes());
        }
    });
    for (int64_t i = 0; i < pairs; ++i)
        rows[i] = w2.rows.rounded() ? reinterpret_cast<const float*>(hidden_codes + i * hidden_bytes) : hidden + i * at.f;
    const bool after = a.n_i == 6;
    const Epilogue epilogue(a, epilogue_at(biases), after ? a.i[2] : 0, after ? a.i[4] : 0, after ? a.i[5] : 0,
                            after ? a.f[4] : 1);
    a.par.split(d_blocks, pairs * f * d, [&](int64_t begin, int64_t end, int) {
        const int64_t c0 = begin * 16, columns = (end * 16 < d ? end * 16 : d) - c0;
        for (int64_t r = 0; r < n; ++r) std::memset(out.f32(r) + c0, 0, static_cast<size_t>(columns) * 4);
        for (int64_t t = 0; t < n_groups; ++t) {
            const int64_t e = groups[t].expert, i0 = groups[t].begin, count = groups[t].count;
            for_tiles<1>(rows + i0, count, begin, end, w2, e * d_blocks, [&](int64_t r, int64_t b, auto& sums) {
                const int64_t pair = order[i0 + r], row = pair / choices, left = d - b * 16;
                float* to = out.f32(row) + b * 16;
                v16 v = load(sums[0]);
                if (down_bias != nullptr) v = v + load_n(down_bias->f32(e) + b * 16, left);
                store_n(to, fma(splat(weights.f32(row)[pair % choices]), v, load_n(to, left)), left);
            });
        }
        if (epilogue.any()) epilogue.apply(begin * 16, end * 16);
    });
    return ok;
}

const OpDef table[] = {
    {"sink_router", check_sink_router, scratch_sink_router, run_sink_router, 2},
    {"router", check_router, scratch_router, run_router, 2},
    {"moe", check_moe, scratch_moe, run_moe, 1, false, true},
};

}  // namespace

OpTable moe_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
