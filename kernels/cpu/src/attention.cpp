#include <cstring>

#include "check.h"
#include "conv.h"
#include "vec.h"

namespace tmlc {
namespace {

constexpr int64_t position_end = int64_t{1} << 62;

// ---- advance --------------------------------------------------------------------------------------------------------

const char* check_position(const TensorInfo& t) {
    TMLC_REQUIRE(t.space == Space::slot && t.dtype == DType::i64 && t.fixed(1, 1), "the position must be i64 [1,1] in the slot");
    return nullptr;
}
const char* check_advance(const Call& c) {
    TMLC_REQUIRE(arity(c, 1, 1, 0), "wrong number of operands");
    TMLC_REQUIRE(c.i[0] >= 0 && c.i[0] < position_end, "the limit is out of range");
    return check_position(*c.t[0]);
}
int run_advance(const RunArgs& a) {
    int64_t& position = *a.t[0].i64();
    if (position < 0 || position >= position_end) return bad_index;
    if (a.i[0] > 0 && position + a.n > a.i[0]) return context_full;
    position += a.n;
    return ok;
}

const OpDef table[] = {
    {"short_conv", check_short_conv, no_scratch, run_short_conv, 1},
    {"advance", check_advance, no_scratch, run_advance, 0},
};

}  // namespace

OpTable attention_ops() { return {table, static_cast<int>(sizeof table / sizeof *table)}; }

}  // namespace tmlc
