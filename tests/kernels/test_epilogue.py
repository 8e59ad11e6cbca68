"""What `linear` and `moe` do behind their products: bit for bit scale_by, short_conv, scale and add, one by one,
whatever the cut, the threads and the columns; and near float64."""

import numpy as np
import pytest

from tmlc.errors import PlanError

SCALE, CONV, ADD = 4, 8, 16
FORMS = ("f32", "bf16", "i8g32", "i4g32", "i4g64")


def packed(bench, rng, m, k, form):
    """(what the weight stands for [m, k] float64, the packed weight)."""
    if form in ("f32", "bf16"):
        w = rng.standard_normal((m, k)).astype(np.float32) / np.float32(np.sqrt(k))
        return bench.as_stored(w, form).astype(np.float64), bench.pack(w, form)
    return bench.quantised(rng, m, k, form)


class Case:
    """A linear layer with a bias and an epilogue, as one call and as several."""

    def __init__(self, bench, rng, m, k, form, flags, start, width, taps, residual, level):
        self.bench, self.m, self.k, self.flags = bench, m, k, flags
        self.start, self.width, self.residual, self.level = start, width, residual, level
        self.stored, self.weight = packed(bench, rng, m, k, form)
        self.bias, self.scale = rng.standard_normal((1, m)).astype(np.float32), np.array([[1.37]], np.float32)
        self.taps = rng.standard_normal((taps, width)).astype(np.float32)

    def build(self, fused, max_n, threads=1):
        b = self.bench.Builder(max_n=max_n)
        x, addend, y = b.input(0, "f32", self.k), b.input(1, "f32", self.m), b.output(0, "f32", self.m)
        weight, bias, scale, taps = (b.weight(w) for w in (self.weight, self.bias, self.scale, self.taps))
        tail = b.slot("f32", len(self.taps) - 1, self.width)
        if fused:
            after = [scale] * bool(self.flags & SCALE) + [taps, tail] * bool(self.flags & CONV)
            after += [addend] * bool(self.flags & ADD)
            conv = self.flags & CONV
            ints = [self.flags | 1, self.start if conv else 0, self.residual if conv else 0]
            code = [("linear", [y, x, weight, bias, *after], ints, [self.level if conv else 1.0])]
        else:
            code = self._one_by_one(b, x, addend, y, weight, bias, scale, taps, tail)
        b.method([x, addend], [y], code)
        return b.build(self.bench.library, threads)

    def _one_by_one(self, b, x, addend, y, weight, bias, scale, taps, tail):
        u = b.arena("f32", (1, 0), self.m)
        code = [("linear", [u, x, weight, bias])]
        if self.flags & SCALE:
            code.append(("scale_by", [u, u, scale]))
        if self.flags & CONV:
            at = b.tensors[u][2] + 4 * self.start
            part, mixed = b.tensor("arena", "f32", (1, 0), self.width, at, self.m), b.arena("f32", (1, 0), self.width)
            code += [("short_conv", [mixed, part, taps, tail], [self.residual]), ("copy", [part, mixed])]
            if self.level != 1:
                code.append(("scale", [part, part], [], [self.level]))
        return [*code, ("add", [y, addend, u]) if self.flags & ADD else ("copy", [y, u])]

    def run(self, fused, x, addend, cuts=None, threads=1):
        """(the output, the tail that is left)."""
        cuts = cuts or [len(x)]
        plan = self.build(fused, max(cuts), threads)
        slot, out, at = np.zeros(plan.slot_bytes, np.uint8), np.full((len(x), self.m), -77, np.float32), 0
        for count in cuts:
            rows = slice(at, at + count)
            plan.run(self.bench.pool(threads), 0, count, slot, [x[rows], addend[rows]], [out[rows]])
            at += count
        return out, slot.tobytes()

    def reference(self, x, addend):
        """In float64."""
        y = x.astype(np.float64) @ self.stored.T + self.bias
        if self.flags & SCALE:
            y = y * self.scale
        if self.flags & CONV:
            columns, k = slice(self.start, self.start + self.width), len(self.taps)
            padded = np.concatenate([np.zeros((k - 1, self.width)), y[:, columns]])
            mixed = sum(self.taps[j] * padded[j : j + len(x)] for j in range(k))
            y[:, columns] = (mixed + (y[:, columns] if self.residual else 0)) * self.level
        return y + addend if self.flags & ADD else y


# columns and inputs of the product; first column, columns and taps of the convolution; residual, level
SHAPES = [
    (1, 1, 0, 1, 2, 1, 1.0),
    (16, 33, 0, 16, 4, 1, 1.0),
    (100, 20, 0, 100, 4, 0, 0.447),
    (100, 20, 37, 41, 4, 1, 1.0),
    (700, 40, 300, 256, 4, 1, 0.5),
    (50, 8, 49, 1, 3, 1, 1.0),
    (70, 8, 5, 60, 7, 1, 1.0),
    (40, 8, 0, 20, 64, 0, 1.0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flags", [SCALE, CONV, ADD, SCALE | CONV, CONV | ADD, SCALE | ADD, SCALE | CONV | ADD])
def test_bits_are_those_of_one_operation_after_the_other(bench, rng, shape, flags):
    m, k, start, width, taps, residual, level = shape
    case = Case(bench, rng, m, k, "f32", flags, start, width, taps, residual, level)
    x, addend = (rng.standard_normal((23, cols)).astype(np.float32) for cols in (k, m))
    got, want = case.run(True, x, addend), case.run(False, x, addend)
    assert np.array_equal(got[0], want[0]) and got[1] == want[1]
    reference = case.reference(x, addend)
    assert np.abs(got[0] - reference).max() <= 3e-5 * max(1, np.abs(reference).max())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_in_any_cut_and_with_any_threads(bench, rng, form):
    case = Case(bench, rng, 500, 64, form, CONV | ADD, 200, 150, 4, 1, 1.0)
    x, addend = (rng.standard_normal((90, cols)).astype(np.float32) for cols in (64, 500))
    want = case.run(False, x, addend)
    for cuts in (None, [1] * 90, [2, 1, 3, 64, 20], [87, 3]):
        for threads in (1, 3):
            got = case.run(True, x, addend, cuts, threads)
            assert np.array_equal(got[0], want[0]) and got[1] == want[1], (cuts, threads)


def test_what_is_not_a_number_stays_in_its_column(bench, rng):
    """And leaves with the rows that see it."""
    case = Case(bench, rng, 33, 4, "f32", CONV, 0, 33, 3, 1, 1.0)
    addend, x = np.zeros((9, 33), np.float32), rng.standard_normal((9, 4)).astype(np.float32)
    x[3] = np.inf
    got, _ = case.run(True, x, addend)
    assert not np.isfinite(got[3:6]).any() and np.isfinite(got[:3]).all() and np.isfinite(got[6:]).all()


class Experts:
    """Experts with or without an epilogue."""

    def __init__(self, bench, rng, form, flags, taps=4, level=1.0, e=7, d=50, f=37):
        self.bench, self.flags, self.level, self.e, self.d, self.f = bench, flags, level, e, d, f
        stacks = [[packed(bench, rng, *shape, form)[1] for _ in range(e)] for shape in ((f, d), (f, d), (d, f))]
        self.gate_up = np.concatenate([np.concatenate(pair) for pair in zip(*stacks[:2], strict=True)])
        self.down = np.concatenate(stacks[2])
        self.taps = rng.standard_normal((taps, d)).astype(np.float32)

    def run(self, x, weights, experts, addend, fused=True, cuts=None, threads=1, grouped_from=0):
        cuts = cuts or [len(x)]
        b = self.bench.Builder(max_n=max(cuts))
        given = [x, weights, experts, addend]
        kinds = ("f32", "f32", "i32", "f32")
        t = [b.input(i, kind, v.shape[1]) for i, (kind, v) in enumerate(zip(kinds, given, strict=True))]
        y, tail, taps = b.output(0, "f32", self.d), b.slot("f32", len(self.taps) - 1, self.d), b.weight(self.taps)
        base = [*t[:3], b.weight(self.gate_up), b.weight(self.down)]
        if fused:
            after = [taps, tail] * bool(self.flags & CONV) + [t[3]] * bool(self.flags & ADD)
            level = self.level if self.flags & CONV else 1.0
            ints = [self.e, self.f, self.flags, grouped_from, 0, int(bool(self.flags & CONV))]
            code = [("moe", [y, *base, *after], ints, [0.0, 0.0, 0.0, 0.0, level])]
        else:
            u, v = b.arena("f32", (1, 0), self.d), b.arena("f32", (1, 0), self.d)
            code = [("moe", [u, *base], [self.e, self.f])]
            if self.flags & CONV:
                code += [("short_conv", [v, u, taps, tail], [1]), ("scale", [u, v], [], [self.level])]
            code.append(("add", [y, t[3], u]) if self.flags & ADD else ("copy", [y, u]))
        b.method(t, [y], code)
        plan = b.build(self.bench.library, threads)
        slot, out, at = np.zeros(plan.slot_bytes, np.uint8), np.full_like(x, -77), 0
        for count in cuts:
            rows = slice(at, at + count)
            plan.run(self.bench.pool(threads), 0, count, slot, [v[rows] for v in given], [out[rows]])
            at += count
        return out, slot.tobytes()


def routed(rng, n, d, e, k):
    x, addend = (rng.standard_normal((n, d)).astype(np.float32) for _ in range(2))
    experts = np.stack([rng.permutation(e)[:k] for _ in range(n)]).astype(np.int32)
    return x, rng.random((n, k)).astype(np.float32), experts, addend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [0, CONV, ADD, CONV | ADD])
def test_experts_have_the_same_epilogue(bench, rng, form, flags):
    case, given = Experts(bench, rng, form, flags, level=0.6), routed(rng, 41, 50, 7, 3)
    want = case.run(*given, fused=False)
    for cuts in (None, [1] * 41, [3, 1, 30, 7]):
        for threads in (1, 2):
            got = case.run(*given, cuts=cuts, threads=threads)
            assert np.array_equal(got[0], want[0]) and got[1] == want[1], (cuts, threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", ["spread", "one", "repeated"])
def test_rows_grouped_by_expert_or_not_give_the_same_bits(bench, rng, form, experts):
    case, given = Experts(bench, rng, form, CONV | ADD), list(routed(rng, 40, 50, 7, 3))
    if experts == "one":
        given[2] = np.full((40, 3), 6, np.int32)
    elif experts == "repeated":
        given[2][::2] = given[2][::2, [0, 1, 0]]
    want = case.run(*given)
    for grouped_from in (1, 2, 7, 40, 41, 2**40):
        for cuts in (None, [1, 6, 33]):
            for threads in (1, 3):
                got = case.run(*given, grouped_from=grouped_from, cuts=cuts, threads=threads)
                assert np.array_equal(got[0], want[0]) and got[1] == want[1], (grouped_from, cuts, threads)


def test_grouped_from_must_not_be_negative(best, rng):
    with pytest.raises(PlanError, match="grouped_from"):
        Experts(best, rng, "f32", 0).run(*routed(rng, 2, 50, 7, 3), grouped_from=-1)


GOOD = dict(flags=CONV | ADD, start=4, residual=1, level=1.0, taps=(4, 10), tail=(3, 10), addend=20)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(start=11), "outside the columns"),
        (dict(start=-1), "outside the columns"),
        (dict(start=2**62), "outside the columns"),
        (dict(residual=2), "residual"),
        (dict(level=np.inf), "level"),
        (dict(flags=CONV), "number of operands"),
        (dict(flags=CONV | ADD | 2), "flags"),
        (dict(flags=CONV | ADD | 32), "flags"),
        (dict(flags=ADD | 1, start=0, residual=0), "bias|number of operands"),
        (dict(tail=(2, 10)), "tail"),
        (dict(tail=(3, 9)), "tail"),
        (dict(taps=(1, 10), tail=(1, 10)), "taps"),
        (dict(taps=(65, 10), tail=(64, 10)), "taps"),
        (dict(taps=(4, 17), tail=(3, 17)), "outside the columns"),
        (dict(addend=19), "addend"),
    ],
)
def test_a_malformed_epilogue_is_refused(best, rng, change, reason):
    case = {**GOOD, **change}

    def build(case):
        b = best.Builder(max_n=4)
        x, addend, y = b.input(0, "f32", 8), b.input(1, "f32", case["addend"]), b.output(0, "f32", 20)
        weight = b.weight(packed(best, rng, 20, 8, "f32")[1])
        taps, tail = b.weight(np.zeros(case["taps"], np.float32)), b.slot("f32", *case["tail"])
        ints = [case["flags"], case["start"], case["residual"]]
        b.method([x, addend], [y], [("linear", [y, x, weight, taps, tail, addend], ints, [case["level"]])])
        return b.build(best.library)

    build(GOOD)
    with pytest.raises(PlanError, match=reason):
        build(case)
