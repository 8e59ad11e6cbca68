"""How the experts of a row are chosen from its logits, and their weights stored: ties to the lowest index, a NaN is the
worst score.

A router's own kernels do it for each row (router.py), and each program of a product of few rows for itself (moe.py):
the same functions on the same blocks of experts, so the bits are the same.
"""

import triton.language as tl

from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.mode import device


@device
def sortable(score):
    """int32 numbers in the order of the scores; NaN as the worst, both zeros alike, none the smallest int32."""
    score = tl.where(score != score, float("-inf"), score)
    word = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@device
def score_of(key):
    """The score that `sortable` made a number of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device
def lowest_best(key, index):
    """Index of the largest number, the lowest of equals. Whole numbers are reduced in one instruction of a warp."""
    return tl.min(tl.where(key == tl.max(key, 0), index, 1 << 30), 0)


@device
def ranked(keys, TOP_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """For each expert the turn in which it is chosen, -1 for never, in PARTS blocks as its number in `keys`, where the
    smallest int32 closes one. The best of blocks of one warp are found without any wait for another warp."""
    places = ()
    for _p in tl.static_range(PARTS):
        places += (tl.full((BLOCK_E,), -1, tl.int32),)  # type: ignore[assignment]
    for turn in tl.static_range(TOP_K):
        top = keys[0]
        for p in tl.static_range(1, PARTS):
            top = tl.maximum(top, keys[p])
        best = tl.max(top, 0)
        first = tl.full((BLOCK_E,), 1 << 30, tl.int32)
        for p in tl.static_range(PARTS):
            e = p * BLOCK_E + tl.arange(0, BLOCK_E)
            first = tl.minimum(first, tl.where(keys[p] == best, e, 1 << 30))
        winner = tl.min(first, 0)
        left, taken = (), ()
        for p in tl.static_range(PARTS):
            won = p * BLOCK_E + tl.arange(0, BLOCK_E) == winner
            left += (tl.where(won, -2147483648, keys[p]),)  # type: ignore[assignment]
            taken += (tl.where(won, turn, places[p]),)  # type: ignore[assignment]
        keys, places = left, taken
    return places


@device
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@device
def sum_of(blocks, PARTS: tl.constexpr):
    """Of all numbers of PARTS blocks. With the same blocks, of 32 one a thread of a warp, it has the same bits in every
    kernel."""
    total = blocks[0]
    for p in tl.static_range(1, PARTS):
        total += blocks[p]
    return tl.sum(total, 0)


@device
def softmax_of(scores, among, PARTS: tl.constexpr):
    """Softmax over those that are `among`, 0 elsewhere; PARTS blocks of each."""
    top = tl.where(among[0], scores[0], float("-inf"))
    for p in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.where(among[p], scores[p], float("-inf")))
    best = score_of(tl.max(sortable(top), 0))  # one instruction of a warp
    powers, shares = (), ()
    for p in tl.static_range(PARTS):
        powers += (tl.where(among[p], tl.exp(scores[p] - best), 0.0),)  # type: ignore[assignment]
    total = sum_of(powers, PARTS)
    for p in tl.static_range(PARTS):
        shares += (powers[p] / total,)  # type: ignore[assignment]
    return shares


@device
def store_routes(weights, experts, share, index, place, row, K: tl.constexpr):
    at = row * K + place
    tl.store(weights + at, share, mask=place >= 0)
    tl.store(experts + at, index.to(experts.dtype.element_ty), mask=place >= 0)


@device
def sink_choice(
    logits, inverses, bias, row, routed, eligible, logits_stride,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(logits and places of the routed experts, PARTS blocks of each, and the logits of the shared ones as numbers) of
    a row: places of the first `eligible` are chosen by sigmoid + bias, -1 is none."""
    inverse = 1.0
    if inverses is not None:
        inverse = tl.load(inverses + row)
    at = logits + row * logits_stride
    found, keys, shared = (), (), ()
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        logit = tl.load(at + e, mask=e < routed, other=0.0)
        learned = tl.load(bias + e, mask=e < routed, other=0.0)
        if inverses is not None:
            logit = logit * inverse
        found += (logit,)  # type: ignore[assignment]
        keys += (tl.where(e < eligible, sortable(sigmoid(logit) + learned), -2147483648),)  # type: ignore[assignment]
    for s in tl.static_range(SHARED):
        one = tl.load(at + routed + s)
        if inverses is not None:
            one = one * inverse
        shared += (one,)  # type: ignore[assignment]
    return found, ranked(keys, TOP_K, PARTS, BLOCK_E), shared


@device
def store_sink_routes(
    weights, experts, found, places, shared, factor, row, routed,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The chosen and the shared experts of a row, and the softmax of their log-sigmoids times the factor. It is summed
    place by place, so that its bits do not depend on which thread has what."""
    top = tl.full((BLOCK_E,), float("-inf"), tl.float32)
    for p in tl.static_range(PARTS):
        top = tl.maximum(top, tl.where(places[p] >= 0, log_sigmoid(found[p]), float("-inf")))
    best = tl.max(top, 0)
    for s in tl.static_range(SHARED):
        best = tl.maximum(best, log_sigmoid(shared[s]))
    total = 0.0
    for j in tl.static_range(TOP_K):
        one = tl.zeros((BLOCK_E,), tl.float32)
        for p in tl.static_range(PARTS):
            one += tl.where(places[p] == j, tl.exp(log_sigmoid(found[p]) - best), 0.0)
        total += tl.sum(one, 0)
    for s in tl.static_range(SHARED):
        total += tl.exp(log_sigmoid(shared[s]) - best)
    for p in tl.static_range(PARTS):
        share = tl.exp(log_sigmoid(found[p]) - best) / total * factor
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        store_routes(weights, experts, share, e, places[p], row, TOP_K + SHARED)
    at = row * (TOP_K + SHARED) + TOP_K
    for s in tl.static_range(SHARED):
        tl.store(weights + at + s, tl.exp(log_sigmoid(shared[s]) - best) / total * factor)
        tl.store(experts + at + s, (routed + s).to(experts.dtype.element_ty))


@device
def topk_scores(
    logits, inverses, logit_bias, bias, row, routed, eligible, logits_stride,
    SCORES: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(scores of the experts of a row, and the numbers that `ranked` takes; PARTS blocks of each): softmax of all (0),
    sigmoid (1) or raw scores (2) of the first `eligible`, which are all or none. With `inverses` the logits of a row
    are scaled by its own, `logit_bias` is added to them, and `bias` to the scores for the choice alone."""
    inverse = 1.0
    if inverses is not None:
        inverse = tl.load(inverses + row)
    read, added, learned = (), (), ()
    # All that is read is asked for before the first of it is used.
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        known = e < routed
        read += (tl.load(logits + row * logits_stride + e, mask=known, other=float("-inf")),)  # type: ignore[assignment]
        if logit_bias is not None:
            added += (tl.load(logit_bias + e, mask=known, other=0.0),)  # type: ignore[assignment]
        if bias is not None:
            learned += (tl.load(bias + e, mask=known, other=0.0),)  # type: ignore[assignment]
    scores, among, keys = (), (), ()
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        score = read[p]  # type: ignore[var-annotated]
        if inverses is not None:
            score = score * inverse  # type: ignore[assignment]
        if logit_bias is not None:
            score += added[p]
        if SCORES == 1:
            score = sigmoid(score)
        scores += (score,)  # type: ignore[assignment]
        among += (e < eligible,)  # type: ignore[assignment]
    if SCORES == 0:
        scores = softmax_of(scores, among, PARTS)
    for p in tl.static_range(PARTS):
        choice = scores[p]  # type: ignore[var-annotated]
        if bias is not None:
            choice += learned[p]
        keys += (tl.where(among[p], sortable(choice), -2147483648),)  # type: ignore[assignment]
    return scores, keys


@device
def of_best_groups(key, routed, each, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The numbers of the experts of the TOP_GROUPS groups whose two best have the largest sum; those of others are
    closed."""
    e = tl.arange(0, BLOCK_E)
    group = e // each
    sums = tl.full((BLOCK_E,), -2147483648, tl.int32)  # place g stands for group g
    for g in range(GROUPS):
        mine = tl.where(group == g, key, -2147483648)
        best = score_of(tl.max(mine, 0))
        if each > 1:
            best += score_of(tl.max(tl.where(e == lowest_best(mine, e), -2147483648, mine), 0))
        sums = tl.where(e == g, sortable(best), sums)
    closed = e < routed
    for _turn in range(TOP_GROUPS):
        winner = lowest_best(sums, e)
        sums = tl.where(e == winner, -2147483648, sums)
        closed = closed & (group != winner)
    return tl.where(closed, -2147483648, key)


@device
def store_topk_routes(
    weights, experts, scores, places, factor, row, routed,
    SCORES: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The chosen experts of a row and their weights: scores (raw ones: softmax over the chosen), divided by their sum
    where NORMALISE says so, times the factor. Behind them the SHARED experts behind the last one, with weight 1."""
    chosen, shares = (), ()
    for p in tl.static_range(PARTS):
        chosen += (places[p] >= 0,)  # type: ignore[assignment]
        shares += (tl.where(places[p] >= 0, scores[p], 0.0),)  # type: ignore[assignment]
    if SCORES == 2:
        shares = softmax_of(scores, chosen, PARTS)
    total = 1.0
    if NORMALISE:
        total = sum_of(shares, PARTS)
        if SCORES == 1:
            total += 1e-20
    for p in tl.static_range(PARTS):
        share = shares[p]  # type: ignore[var-annotated]
        if NORMALISE:
            share = share / total  # type: ignore[assignment]
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        store_routes(weights, experts, share * factor, e, places[p], row, TOP_K + SHARED)
    at = row * (TOP_K + SHARED) + TOP_K
    for s in tl.static_range(SHARED):
        tl.store(weights + at + s, 1.0)
        tl.store(experts + at + s, (routed + s).to(experts.dtype.element_ty))
