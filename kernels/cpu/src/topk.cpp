// The usual router of decoders: top_k experts of each row by softmax, sigmoid or logit, maybe of the best groups only.
#include <cmath>

#include "check.h"
#include "vec.h"

namespace tmlc {
namespace {

enum Scores : int64_t { softmax_of_all = 0, sigmoid_of_each = 1, raw_logits = 2 };

struct TopK {
    int64_t experts, scores, top_k, normalise, groups, top_groups;
    const float* bias;  // may be missing
    float scale;

    // Scratch of one row: score and biased score of each expert, score and state of each group, logits of the chosen.
    static int64_t floats(int64_t experts, int64_t groups, int64_t top_k) {
        return 2 * round_up(experts, 16) + 2 * round_up(groups, 16) + round_up(top_k, 16);
    }

    // score[j] = e^(x[j] - max); returns their sum, taken in order. x may be score; both have room for whole vectors.
    static float exponentials(const float* x, float* score, int64_t count) {
        float top = -INFINITY, sum = 0.0f;
        for (int64_t j = 0; j < count; ++j) top = x[j] > top ? x[j] : top;
        for (int64_t j = 0; j < count; j += 16)
            store_n(score + j, exp16(load_n(x + j, count - j) - splat(top)), count - j);
        for (int64_t j = 0; j < count; ++j) sum += score[j];
        return sum;
    }

    void fill_scores(const float* logits, float* score) const {
        const float sum = scores == softmax_of_all ? exponentials(logits, score, experts) : 1.0f;
        for (int64_t e = 0; e < experts; e += 16) {
            const int64_t count = experts - e;
            v16 x = load_n(scores == softmax_of_all ? score + e : logits + e, count);
            if (scores == softmax_of_all) x = x / splat(sum);
            if (scores == sigmoid_of_each) x = sigmoid16(x);
            store_n(score + e, x, count);
        }
    }

    // Opens the top_groups groups whose two best scores have the largest sums (ties: the lower group).
    void open_groups(const float* choice, float* group, int32_t* open) const {
        const int64_t size = experts / groups;
        for (int64_t g = 0; g < groups; ++g) {
            const float* member = choice + g * size;
            float best = member[0], next = -INFINITY;
            for (int64_t e = 1; e < size; ++e) {
                if (member[e] > best) next = best, best = member[e];
                else if (member[e] > next) next = member[e];
            }
            group[g] = size > 1 ? best + next : best;
            open[g] = groups == top_groups;
        }
        for (int64_t j = 0; groups != top_groups && j < top_groups; ++j) {
            int64_t best = -1;
            for (int64_t g = 0; g < groups; ++g)
                if (!open[g] && (best < 0 || group[g] > group[best])) best = g;
            open[best] = 1;
        }
    }

    // Any input, even NaN, gives distinct experts of open groups.
    void run(const float* logits, float* weights, int32_t* chosen, float* scratch) const {
        float *score = scratch, *choice = score + round_up(experts, 16), *group = choice + round_up(experts, 16);
        auto* open = reinterpret_cast<int32_t*>(group + round_up(groups, 16));
        float* picked = group + 2 * round_up(groups, 16);
        fill_scores(logits, score);
        for (int64_t e = 0; e < experts; ++e) choice[e] = bias != nullptr ? score[e] + bias[e] : score[e];
        open_groups(choice, group, open);
        const int64_t size = experts / groups;
        for (int64_t j = 0; j < top_k; ++j) {
            int64_t best = -1;
            for (int64_t g = 0; g < groups; ++g) {
                if (!open[g]) continue;
                for (int64_t e = g * size; e < (g + 1) * size; ++e) {
                    if (best >= 0 && !(choice[e] > choice[best])) continue;
                    bool taken = false;
                    for (int64_t i = 0; i < j && !taken; ++i) taken = chosen[i] == e;
                    if (!taken) best = e;
                }
            }
            chosen[j] = static_cast<int32_t>(best);
        }
        for (int64_t j = 0; j < top_k; ++j) picked[j] = score[chosen[j]];
        float sum = 1.0f;
        if (scores == raw_logits) {
            sum = exponentials(picked, picked, top_k);
        } else if (normalise != 0) {
            sum = 0.0f;
            for (int64_t j = 0; j < top_k; ++j) sum += picked[j];
            if (scores == sigmoid_of_each) sum += 1e-20f;
        }
        for (int64_t j = 0; j < top_k; ++j) weights[j] = picked[j] / sum * scale;
    }
};

const char* check_topk(const Call& c) {
    TMLC_REQUIRE((c.n_t == 3 || c.n_t == 4) && c.n_i == 5 && c.n_f == 1, "wrong number of operands");
    const TensorInfo &weights = *c.t[0], &experts = *c.t[1], &logits = *c.t[2];
    const int64_t total = logits.cols, top_k = c.i[1], groups = c.i[3], top_groups = c.i[4];
    TMLC_REQUIRE(is_f32(logits) && logits.same_rows(weights), "logits must be f32 [n,E]");
    TMLC_REQUIRE(total <= max_experts, "absurd number of experts");
    TMLC_REQUIRE(c.i[0] >= softmax_of_all && c.i[0] <= raw_logits, "scores must be 0, 1 or 2");
    TMLC_REQUIRE(c.i[2] == 0 || c.i[2] == 1, "normalise must be 0 or 1");
    TMLC_REQUIRE(groups >= 1 && groups <= total && total % groups == 0, "the experts do not make these groups");
    TMLC_REQUIRE(top_groups >= 1 && top_groups <= groups, "top_groups does not fit the groups");
    TMLC_REQUIRE(top_k >= 1 && top_k <= max_choices, "absurd top_k");
    TMLC_REQUIRE(top_k <= top_groups * (total / groups), "top_k does not fit the experts");
    TMLC_REQUIRE(is_f32(weights) && weights.cols == top_k, "weights must be f32 [n,K]");
    TMLC_REQUIRE(experts.dtype == DType::i32 && same_shape(experts, weights), "experts must be i32 [n,K]");
    TMLC_REQUIRE(c.n_t == 3 || (is_f32(*c.t[3]) && c.t[3]->fixed(1, total)), "the bias must be f32 [1,E]");
    TMLC_REQUIRE(finite(c.f[0]), "the scale must be finite");
    return nullptr;
}
int64_t scratch_topk(const Call& c, int threads) { return 4 * threads * TopK::floats(c.t[2]->cols, c.i[3], c.i[1]); }

int run_topk(const RunArgs& a) {
    const Operand &weights = a.t[0], &experts = a.t[1], &logits = a.t[2];
    const TopK top{logits.cols, a.i[0], a.i[1], a.i[2], a.i[3], a.i[4], a.n_t == 4 ? a.t[3].f32() : nullptr,
                   static_cast<float>(a.f[0])};
    const int64_t floats = TopK::floats(top.experts, top.groups, top.top_k);
    a.par.split(logits.rows, logits.rows * top.experts * (top.top_k + 8), [&](int64_t begin, int64_t end, int thread) {
        float* scratch = reinterpret_cast<float*>(a.scratch) + thread * floats;
        for (int64_t r = begin; r < end; ++r) top.run(logits.f32(r), weights.f32(r), experts.i32(r), scratch);
    });
    return ok;
}

const OpDef table[] = {{"topk_router", check_topk, scratch_topk, run_topk, 2}};

}  // namespace

OpTable topk_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
