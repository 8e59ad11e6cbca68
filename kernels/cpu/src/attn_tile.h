// A tile of attention: the query heads of one kv head for some rows of one session (attn_tile.cpp).
#pragma once
#include "attn_shape.h"

namespace tmlc {

struct Tile {
    const Shape& s;
    Operand out, q;
    const Operand *rel, *rel_table, *sink_logits;  // nullptr: not there
    HeadCache cache;                               // of head 0
    int64_t position, g, r0, rows;                 // of the session; kv head; rows [r0, r0 + rows) of the session
    const double* f;                               // scale, log_floor, log_alpha, softcap

    int64_t first() const { return position + r0; }
    int64_t last() const { return position + r0 + rows - 1; }
    int64_t splits() const { return s.splits(first(), last()); }

    void begin(uint8_t* scratch) const;                            // makes the queries ready
    void run_split(int64_t i, uint8_t* scratch, Partial p) const;  // split number i, all by itself
    void clear(Partial total) const;
    void merge(Partial total, Partial p) const;                    // in the order of splits
    void finish(Partial total) const;                              // writes the output
};

}  // namespace tmlc
