// Work on the heads inside a row: rotary positions, the columns of every head, heads joined from two parts.
#include <cstring>

#include "check.h"
#include "vec.h"

namespace tmlc {
namespace {

constexpr int64_t max_heads = 4096;

// Columns of one head of a row of `heads` equal heads; 0 when it cannot be cut so.
int64_t head_width(const TensorInfo& t, int64_t heads) {
    return heads >= 1 && heads <= max_heads && t.cols % heads == 0 ? t.cols / heads : 0;
}

// ---- rope -----------------------------------------------------------------------------------------------------------

// cos and sin of float32 angles, times `scaling`. The angle is brought to an eighth of a turn around zero in double,
// where Taylor polynomials err less than a float32 can show; no branch and no library call, so that the loop becomes
// vectors. Angles beyond 2^30 (a float32 is then coarser than a turn) give numbers without meaning, and nothing worse.
void cos_sin(const float* angle, int64_t count, float scaling, float* cosines, float* sines) {
    constexpr double quarter_hi = 1.570796325802803, quarter_lo = 9.920935796805404e-10;  // pi/2; hi has 30 bits
    constexpr double two_over_pi = 0.6366197723675814, magic = 6755399441055744.0;         // 1.5 * 2^52: rounds
    for (int64_t i = 0; i < count; ++i) {
        const double x = static_cast<double>(angle[i]);
        const double shifted = x * two_over_pi + magic, turns = shifted - magic;
        uint64_t quadrant;
        std::memcpy(&quadrant, &shifted, 8);
        const double r = (x - turns * quarter_hi) - turns * quarter_lo, u = r * r;
        double s = 1.0 / 6227020800.0, c = 1.0 / 479001600.0;
        s = s * u - 1.0 / 39916800.0;
        s = s * u + 1.0 / 362880.0;
        s = s * u - 1.0 / 5040.0;
        s = s * u + 1.0 / 120.0;
        s = s * u - 1.0 / 6.0;
        s = s * u * r + r;
        c = c * u - 1.0 / 3628800.0;
        c = c * u + 1.0 / 40320.0;
        c = c * u - 1.0 / 720.0;
        c = c * u + 1.0 / 24.0;
        c = c * u - 0.5;
        c = c * u + 1.0;
        const bool odd = (quadrant & 1) != 0;
        const double cosine = odd ? s : c, sine = odd ? c : s;
        cosines[i] = static_cast<float>(((quadrant + 1) & 2) != 0 ? -cosine : cosine) * scaling;
        sines[i] = static_cast<float>((quadrant & 2) != 0 ? -sine : sine) * scaling;
    }
}

const char* check_rope(const Call& c) {
    TMLC_REQUIRE(arity(c, 4, 3, 1), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1], &freq = *c.t[3];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && same_shape(out, x), "x and the output must be f32 [n,H*D]");
    TMLC_REQUIRE(x.a == 1 && x.b == 0, "x must have one row for each position");
    if (const char* what = check_position(*c.t[2])) return what;
    const int64_t width = head_width(x, c.i[0]), offset = c.i[1];
    TMLC_REQUIRE(width > 0 && width <= 1 << 24, "the columns are no heads");
    TMLC_REQUIRE(is_f32(freq) && freq.fixed(1, freq.cols) && freq.cols <= width / 2, "inv_freq must be f32 [1,R/2]");
    TMLC_REQUIRE(offset >= 0 && offset <= width - 2 * freq.cols, "the rotated columns are outside the head");
    TMLC_REQUIRE(c.i[2] == 0 || c.i[2] == 1, "interleaved must be 0 or 1");
    TMLC_REQUIRE(finite(c.f[0]), "the scaling must be finite");
    return nullptr;
}
// Of one thread: angles, cosines and sines of one position.
int64_t rope_floats(int64_t half) { return 3 * round_up(half, 16); }
int64_t scratch_rope(const Call& c, int threads) { return 4 * threads * rope_floats(c.t[3]->cols); }

// Sixteen pairs (x, y) become (x·cos - y·sin, y·cos + x·sin).
TMLC_INLINE void rotate(v16& x, v16& y, v16 cosine, v16 sine) {
    const v16 turned = fma(y, zero16() - sine, x * cosine);
    y = fma(x, sine, y * cosine);
    x = turned;
}

int run_rope(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1], &freq = a.t[3];
    const int64_t position = *a.t[2].i64(), heads = a.i[0], offset = a.i[1], width = x.cols / heads, half = freq.cols;
    if (position < 0 || position >= position_end) return bad_index;
    const float scaling = static_cast<float>(a.f[0]);
    const bool interleaved = a.i[2] == 1, moves = out.data != x.data;
    float* scratch = reinterpret_cast<float*>(a.scratch);
    a.par.split(out.rows, out.rows * (out.cols + 16 * half), [&](int64_t begin, int64_t end, int thread) {
        float* angle = scratch + thread * rope_floats(half);
        float *cosine = angle + round_up(half, 16), *sine = cosine + round_up(half, 16);
        for (int64_t r = begin; r < end; ++r) {
            const float at = static_cast<float>(position + r);
            for (int64_t i = 0; i < half; ++i) angle[i] = at * freq.f32()[i];
            cos_sin(angle, half, scaling, cosine, sine);
            for (int64_t h = 0; h < heads; ++h) {
                const float* from = x.f32(r) + h * width;
                float* to = out.f32(r) + h * width;
                if (moves) {
                    std::memcpy(to, from, static_cast<size_t>(4 * offset));
                    const int64_t rest = offset + 2 * half;
                    std::memcpy(to + rest, from + rest, static_cast<size_t>(4 * (width - rest)));
                }
                for (int64_t i = 0; i < half; i += 16) {
                    const int64_t count = half - i < 16 ? half - i : 16;
                    const v16 c = load_n(cosine + i, count), s = load_n(sine + i, count);
                    if (interleaved) {
                        float first[16] = {}, second[16] = {};
                        const float* pairs = from + offset + 2 * i;
                        for (int64_t j = 0; j < count; ++j) first[j] = pairs[2 * j], second[j] = pairs[2 * j + 1];
                        v16 u = load(first), v = load(second);
                        rotate(u, v, c, s);
                        store(first, u);
                        store(second, v);
                        float* turned = to + offset + 2 * i;
                        for (int64_t j = 0; j < count; ++j) turned[2 * j] = first[j], turned[2 * j + 1] = second[j];
                    } else {
                        v16 u = load_n(from + offset + i, count), v = load_n(from + offset + half + i, count);
                        rotate(u, v, c, s);
                        store_n(to + offset + i, u, count);
                        store_n(to + offset + half + i, v, count);
                    }
                }
            }
        }
    });
    return ok;
}

// ---- columns of heads -----------------------------------------------------------------------------------------------

const char* check_head_columns(const Call& c) {
    TMLC_REQUIRE(arity(c, 2, 3, 0), "wrong number of operands");
    const TensorInfo &out = *c.t[0], &x = *c.t[1];
    TMLC_REQUIRE(is_f32(out) && is_f32(x) && out.same_rows(x), "operands must be f32 with one number of rows");
    const int64_t width = head_width(x, c.i[0]), start = c.i[1], stop = c.i[2];
    TMLC_REQUIRE(width > 0, "the columns are no heads");
    TMLC_REQUIRE(start >= 0 && start < stop && stop <= width, "no such columns in a head");
    TMLC_REQUIRE(out.cols == c.i[0] * (stop - start), "the output must be [n,H*(stop-start)]");
    return nullptr;
}
int run_head_columns(const RunArgs& a) {
    const Operand &out = a.t[0], &x = a.t[1];
    const int64_t heads = a.i[0], start = a.i[1], taken = a.i[2] - start, width = x.cols / heads;
    a.par.split(out.rows, out.rows * out.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t h = 0; h < heads; ++h)
                std::memcpy(out.f32(r) + h * taken, x.f32(r) + h * width + start, static_cast<size_t>(4 * taken));
    });
    return ok;
}

// `shared`: a (1) or b (2) holds one head that every head of the output takes, or neither (0).
const char* check_concat_heads(const Call& c) {
    TMLC_REQUIRE(arity(c, 3, 2, 0), "wrong number of operands");
    const int64_t heads = c.i[0], shared = c.i[1];
    for (int j = 0; j < 3; ++j)
        TMLC_REQUIRE(is_f32(*c.t[j]) && c.t[j]->same_rows(*c.t[0]), "operands must be f32 with one number of rows");
    TMLC_REQUIRE(shared >= 0 && shared <= 2, "shared must be 0, 1 or 2");
    const int64_t width = head_width(*c.t[0], heads);
    const int64_t of_a = head_width(*c.t[1], shared == 1 ? 1 : heads);
    const int64_t of_b = head_width(*c.t[2], shared == 2 ? 1 : heads);
    TMLC_REQUIRE(width > 0 && of_a > 0 && of_b > 0, "the columns are no heads");
    TMLC_REQUIRE(of_a + of_b == width, "the output must be [n,H*(A+B)]");
    return nullptr;
}
int run_concat_heads(const RunArgs& a) {
    const Operand &out = a.t[0], &left = a.t[1], &right = a.t[2];
    const int64_t heads = a.i[0], shared = a.i[1];
    const int64_t of_a = shared == 1 ? left.cols : left.cols / heads, of_b = out.cols / heads - of_a;
    const int64_t step_a = shared == 1 ? 0 : of_a, step_b = shared == 2 ? 0 : of_b;
    a.par.split(out.rows, out.rows * out.cols, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                float* to = out.f32(r) + h * (of_a + of_b);
                std::memcpy(to, left.f32(r) + h * step_a, static_cast<size_t>(4 * of_a));
                std::memcpy(to + of_a, right.f32(r) + h * step_b, static_cast<size_t>(4 * of_b));
            }
    });
    return ok;
}

const OpDef table[] = {
    {"rope", check_rope, scratch_rope, run_rope, 1, true},
    {"head_columns", check_head_columns, no_scratch, run_head_columns, 1},
    {"concat_heads", check_concat_heads, no_scratch, run_concat_heads, 1},
};

}  // namespace

OpTable head_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
