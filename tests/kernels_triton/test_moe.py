"""Routers and experts: ties, all rows to one expert, unused experts; few rows and many give the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bf16, bits, draw, run, weight

from tmlc.errors import EmitError
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import FIX, Call, lower

ATTRS = {"alpha": 0.0, "limit": 0.0, "gate_cap": 0.0, "up_cap": 0.0, "grouped_from": 0}
D, F, E, K = 20, 14, 5, 3


def routed(seed: int, n: int, experts: np.ndarray | None = None, **more: np.ndarray) -> Session:
    rng = np.random.default_rng(seed)
    if experts is None:
        experts = np.stack([rng.permutation(E)[:K] for _ in range(n)])
    shares = rng.random((n, K), np.float32)
    return Session({"x": draw(seed, n, D), "weights": shares, "experts": experts.astype(np.int64), **more}, count=n)


def experts(dtype: str, biases: bool = False) -> dict:
    found = {"gate_up": weight(draw(1, E, 2 * F, D), dtype), "down": weight(draw(2, E, D, F), dtype)}
    if biases:
        found |= {"gate_up_bias": weight(draw(3, E, 2 * F)), "down_bias": weight(draw(4, E, D))}
    return found


@pytest.mark.parametrize(
    ("dtype", "grouped_from", "tolerance"),
    [
        ("f32", 1, 3e-6),
        ("f32", 100, 3e-6),
        ("bf16", 1, 4e-3),
        ("bf16", 100, 4e-3),
        ("i8g32", 1, 4e-3),
        ("i4g32", 1, 4e-3),
    ],
)
def test_experts(machine, dtype, grouped_from, tolerance):
    """The hidden columns are rounded to bf16 before the second product, unless the weights are float32."""
    sessions = [routed(i, n) for i, n in enumerate((4, 1, 9))]
    agree(
        machine, "moe", sessions, ATTRS | {"grouped_from": grouped_from}, [Shape("f32", D)], tolerance, experts(dtype),
        cuts=(1, 5), activations={} if dtype == "f32" else {"x": bf16}, batch=4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [dict(alpha=1.7, limit=1.0), dict(gate_cap=3.0, up_cap=2.0), {}])
def test_activations_biases_and_an_addend(machine, kind):
    sessions = [routed(i, n, addend=draw(i + 40, n, D)) for i, n in enumerate((2, 5))]
    agree(
        machine, "moe_add", sessions, ATTRS | kind | {"grouped_from": 4}, [Shape("f32", D)], 4e-6,
        experts("f32", biases=True), cuts=(1, 3),
    )  # fmt: skip


@pytest.mark.parametrize("grouped_from", [1, 100])
def test_all_rows_to_one_expert(machine, grouped_from):
    """More pairs of one expert than a tile holds, the first and the last of them, others unused; one chosen twice."""
    for chosen in ([0, 0, 0], [4, 4, 1], [3, 2, 3]):
        picked = np.tile(np.array(chosen), (9, 1))
        agree(
            machine, "moe", [routed(1, 9, picked)], ATTRS | {"grouped_from": grouped_from}, [Shape("f32", D)], 3e-6,
            experts("f32"), cuts=(4,),
        )  # fmt: skip


@pytest.mark.parametrize(("dtype", "f", "top_k"), [("f32", 14, 3), ("bf16", 14, 9), ("i4g64", 14, 3)])
def test_few_rows_and_many_give_the_same_bits(machine, dtype, f, top_k):
    """Choices as columns of one sum, or apart; nine are more than eight columns."""
    given = {"gate_up": weight(draw(1, E, 2 * f, D) / 4, dtype), "down": weight(draw(2, E, D, f), dtype)}
    given |= {"gate_up_bias": weight(draw(3, E, 2 * f)), "down_bias": weight(draw(4, E, D))}
    few_and_many(machine, "moe", given, [], top_k, (3, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32", "i4g64", "f8g128"])
@pytest.mark.parametrize(("f", "top_k", "counts"), [(64, 8, (3, 1)), (140, 1, (3, 1)), (530, 2, (1,))])
def test_every_form_gives_the_same_bits_for_few_rows_and_many(machine, dtype, f, top_k, counts):
    """530 hidden columns are two turns of a program, of bf16 and fp8 on sm80 only."""
    given = {"gate_up": weight(draw(1, E, 2 * f, D) / 4, dtype), "down": weight(draw(2, E, D, f), dtype)}
    few_and_many(machine, "moe_add", given, ["addend"], top_k, counts)


def few_and_many(machine, op: str, given: dict, names: list[str], top_k: int, counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    sessions = []
    for i, n in enumerate(counts):
        chosen = rng.integers(0, E, (n, top_k))
        one = routed(i, n, chosen, **{name: draw(i + 40, n, D) for name in names})
        one.inputs["weights"] = rng.random((n, top_k), np.float32)
        sessions.append(one)
    results = []
    for grouped_from in (1, 100):
        attrs = ATTRS | {"grouped_from": grouped_from}
        results.append(run(machine, op, sessions, attrs, [Shape("f32", D)], given, batch=len(counts) + 1))
    for few, many in zip(*results, strict=True):
        assert np.isfinite(few[0]).all() and np.array_equal(bits(few[0]), bits(many[0]))


def test_an_expert_that_is_none_is_the_nearest_that_is(machine):
    for grouped_from in (1, 100):
        attrs = ATTRS | {"grouped_from": grouped_from}
        found = [
            run(machine, "moe", [routed(1, 2, np.tile(np.array(chosen), (2, 1)))], attrs, [Shape("f32", D)],
                experts("f32"))[0][0]
            for chosen in ([-7, 2, 1 << 20], [0, 2, E - 1])
        ]  # fmt: skip
        assert np.array_equal(bits(found[0]), bits(found[1]))


@pytest.mark.parametrize("taps", [4, 9])
def test_experts_before_a_convolution(machine, taps):
    """One row a session is convolved by what adds the experts up, where the taps fit; more rows are by themselves."""
    sessions = [routed(i, n, addend=draw(i + 40, n, D)) for i, n in enumerate((2, 5))]
    for i, session in enumerate(sessions):
        session.states["tail"] = draw(i + 60, taps - 1, D)
    weights = experts("f32", biases=True) | {"taps": weight(draw(6, D, taps))}
    attrs = ATTRS | {"residual": True, "level": 0.8}
    agree(
        machine, "moe_conv_state", sessions, attrs, [Shape("f32", D)], 4e-6, weights, cuts=(1, 2, 3),
        compared=["tail"], batch=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "n", "top_k", "kernels"),
    [
        (8, 1, 3, "moe_gate_up moe_down_sum"),
        (2, 4, 9, "moe_gate_up moe_down_sum conv"),
        (16, 1, 3, "moe_sort moe_gate_up moe_down moe_combine conv"),
        (1, 1, 17, "moe_sort moe_gate_up moe_down moe_combine conv"),
    ],
)
def test_few_rows_are_two_launches(batch, n, top_k, kernels):
    """And one more for the convolution of several rows a session; the bits are those of many rows. More choices than a
    tile has columns are sorted."""
    found = lower(conv_call(Bucket(batch, n), top_k)).launches
    assert [one.kernel for one in found] == [f"{name}_kernel" for name in kernels.split()]


@pytest.mark.parametrize(
    ("batch", "routed", "kernels"),
    [
        (1, 128, "router_logits moe_gate_up moe_down_sum"),
        (1, 129, "router_logits sink_router moe_gate_up moe_down_sum"),
        (16, 9, "router_logits sink_router moe_sort moe_gate_up moe_down moe_combine conv"),
    ],
)
def test_few_rows_choose_among_up_to_128_experts_themselves(batch, routed, kernels):
    call = conv_call(Bucket(batch, 1), 3)

    def w(*shape):
        return Operand("weight", "f32", (0, shape[0]), shape[1], shape[1], name="r", shape=shape)

    args = call.args | {"norm": w(1, D), "weight": w(routed + 1, D), "bias": w(1, routed), "scale": w(1, 1)}
    del args["weights"], args["experts"]
    attrs = call.attrs | {"eps": 1e-6, "top_k": 2, "n_shared": 1, "route_scale": 1.0}
    call = replace(call, op="norm_moe_conv_state", args=args, attrs=attrs)
    with pytest.raises(EmitError, match=f"chooses among {routed + 1} experts, and there are {E}") as caught:
        lower(call)
    assert caught.value.fix == FIX
    for name in ("gate_up", "down"):
        args[name] = replace(args[name], shape=(routed + 1, *args[name].shape[1:]))
    assert [one.kernel for one in lower(call).launches] == [f"{name}_kernel" for name in kernels.split()]


@pytest.mark.parametrize(
    ("batch", "routed", "groups", "kernels"),
    [
        (1, 128, 1, "router_logits moe_gate_up moe_down_sum"),
        (1, 129, 1, "router_logits topk_router moe_gate_up moe_down_sum"),
        (1, 128, 2, "router_logits topk_router moe_gate_up moe_down_sum"),
        (16, 9, 1, "router_logits topk_router moe_sort moe_gate_up moe_down moe_combine"),
    ],
)
def test_few_rows_choose_among_up_to_128_experts_without_groups_themselves(batch, routed, groups, kernels):
    def w(*shape):
        return Operand("weight", "f32", (0, shape[0]), shape[-1], shape[-1], name="r", shape=shape)

    rows = Operand("arena", "f32", (1, 0), D, D)
    args = {"x": rows, "norm": w(1, D), "weight": w(routed, D), "gate_up": w(routed, 2 * F, D), "down": w(routed, D, F)}
    attrs = top_k_attrs(0, 2, 1) | {"groups": groups, "top_groups": groups}
    call = Call("norm_topk_moe", args, attrs, (rows,), Bucket(batch, 1), 90)
    with pytest.raises(EmitError, match=f"chooses among {routed + 1} experts, and there are {routed}") as caught:
        lower(call)
    assert caught.value.fix == FIX
    for name in ("gate_up", "down"):
        args[name] = replace(args[name], shape=(routed + 1, *args[name].shape[1:]))
    assert [one.kernel for one in lower(call).launches] == [f"{name}_kernel" for name in kernels.split()]


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "f8g128", "i8g32", "i4g32", "i4g64"])
@pytest.mark.parametrize("batch", [1, 4, 15])
def test_all_choices_of_a_row_are_on_their_way_where_they_fit(sm, dtype, batch):
    """Each has the expert's tile and eight rows of bf16; where a multiprocessor has several programs, they share."""
    made = lower(conv_call(Bucket(batch, 1), 5, dtype, 1024, 512, sm)).launches[1]
    fixed = dict(made.constexprs)
    bits_of = {"bf16": 16, "f8g128": 8, "i8g32": 8}.get(dtype, 4)
    turn = fixed["SLICES"] * fixed["BLOCK_K"] * (fixed["BLOCK_M"] * bits_of // 8 + 16)
    there = ARCHITECTURES[sm]
    programs = min(4, -(-batch * 64 // there.processors))
    assert made.grid == (batch, 64, 1) and 2 <= made.num_stages <= 6
    assert made.num_stages == 2 or (made.num_stages - 1) * turn * programs <= there.shared_bytes
    if programs == 1:
        assert made.num_stages == 6 or (there.shared_bytes == 101376 and dtype == "bf16" and made.num_stages == 5)
    elif batch == 1:
        assert sm == 121, "one of 48 multiprocessors has two of the 64 programs"


@pytest.mark.parametrize(("count", "top_k", "shared"), [(9, 2, 1), (32, 4, 0), (33, 3, 2)])
def test_experts_that_choose_themselves_give_the_bits_of_a_router_before_them(machine, count, top_k, shared):
    """Of few rows and of many, where a kernel chooses for each row; the best two are alike."""
    attrs = ATTRS | {"residual": True, "level": 0.8, "top_k": top_k, "n_shared": shared, "route_scale": 2.5}
    attrs["eps"] = 1e-6
    weights = {
        "norm": weight(draw(1, 1, D)), "weight": weight(draw(5, count + shared, D)),
        "bias": weight(np.round(draw(2, 1, count), 1)), "scale": weight(np.array([[1.3]], np.float32)),
        "gate_up": weight(draw(3, count + shared, 2 * F, D) / 4, "bf16"),
        "down": weight(draw(4, count + shared, D, F), "bf16"), "taps": weight(draw(6, D, 4)),
    }  # fmt: skip
    for name in ("weight", "bias"):  # two experts alike, which are chosen
        for values in (weights[name].parts[0], weights[name].values):
            rows = values.T if name == "bias" else values
            rows[5] = rows[3]
    weights["bias"].parts[0][0, [3, 5]] += 2
    weights["bias"].values[0, [3, 5]] += 2
    results = []
    for grouped_from in (1, 100):
        sessions = [Session({"x": draw(i, 1, D), "addend": draw(i + 9, 1, D)}, {"tail": draw(i + 20, 3, D)}, 1)
                    for i in range(3)]  # fmt: skip
        found = run(machine, "norm_moe_conv_state", sessions, attrs | {"grouped_from": grouped_from},
                    [Shape("f32", D)], weights, batch=4)  # fmt: skip
        results.append([one[0] for one in found] + [one.states["tail"] for one in sessions])
    for few, many in zip(*results, strict=True):
        assert np.isfinite(few).all() and np.array_equal(bits(few), bits(many))
    sessions = [Session({"x": draw(i, n, D), "addend": draw(i + 9, n, D)}, {"tail": draw(i + 20, 3, D)}, n)
                for i, n in enumerate((1, 4))]  # fmt: skip
    agree(machine, "norm_moe_conv_state", sessions, attrs | {"grouped_from": 6}, [Shape("f32", D)], 1.5e-2, weights,
          cuts=(1,), compared=["tail"])  # fmt: skip


def top_k_attrs(scores: int, top_k: int, shared: int) -> dict:
    return ATTRS | {"eps": 1e-6, "scores": scores, "top_k": top_k, "normalise": scores < 2, "groups": 1,
                    "top_groups": 1, "scale": 1.5, "n_shared": shared}  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "count", "top_k", "shared", "biases"),
    [
        (0, 9, 4, 0, ""), (0, 33, 3, 1, "bias logit_bias"), (0, 128, 8, 0, ""), (1, 20, 3, 2, "bias"),
        (1, 64, 6, 0, ""), (2, 32, 4, 0, "logit_bias"), (2, 100, 2, 1, "bias"),
    ],
)  # fmt: skip
def test_experts_that_choose_themselves_give_the_bits_of_a_top_k_router_before_them(
    machine, scores, count, top_k, shared, biases
):
    """Of few rows, of many, and of the ops apart: with two experts alike that are the best, with logits so close that
    rounding makes many scores the same, with logits that are all alike, and with an expert whose logit is no number."""
    weights = {
        "norm": weight(draw(1, 1, D)), "weight": weight(draw(5, count, D)),
        **{name: weight(np.round(draw(i, 1, count), 1)) for i, name in enumerate(biases.split())},
    }  # fmt: skip
    stacks = {
        "gate_up": weight(draw(3, count + shared, 2 * F, D) / 4, "bf16"),
        "down": weight(draw(4, count + shared, D, F), "bf16"), "gate_up_bias": weight(draw(6, count + shared, 2 * F)),
        "down_bias": weight(draw(7, count + shared, D)),
    }  # fmt: skip
    for name in ("weight", *biases.split()):
        for values in (weights[name].parts[0], weights[name].values):
            rows = values if name == "weight" else values.T
            rows[5] = rows[3]
            if name == "bias":
                rows[[3, 5]] += 2
    attrs, out = top_k_attrs(scores, top_k, shared), [Shape("f32", D)]
    given = [Session({"x": size * draw(i, n, D), "addend": draw(i + 9, n, D)}, count=n)
             for i, (n, size) in enumerate(((1, 1.0), (4, 30.0), (2, 1e-9)))]  # fmt: skip
    agree(machine, "norm_topk_moe", given[:2], attrs | {"grouped_from": 6}, out, 1.5e-2, weights | stacks, cuts=(1,))
    sessions = [Session({"x": size * draw(i, 1, D), "addend": draw(i + 9, 1, D)}, count=1)
                for i, size in enumerate((1.0, 30.0, 1e-9, 0.0))]  # fmt: skip
    routes = [Shape("f32", top_k + shared), Shape("i64", top_k + shared), Shape("f32", D)]
    for broken in (False, scores > 0):
        if broken:
            weights["weight"].parts[0][7] = np.nan
        few, many = (run(machine, "norm_topk_moe", sessions, attrs | {"grouped_from": grouped_from}, out,
                         weights | stacks, batch=5) for grouped_from in (100, 1))  # fmt: skip
        chosen = run(machine, "norm_topk_router", sessions, attrs, routes, weights, batch=5)
        behind = [
            Session(dict(zip(("weights", "experts", "x"), one, strict=True)) | {"addend": session.inputs["addend"]},
                    count=1) for one, session in zip(chosen, sessions, strict=True)
        ]  # fmt: skip
        apart = run(machine, "moe_add", behind, attrs | {"grouped_from": 100}, out, stacks, batch=5)
        for one, other, third in zip(few, many, apart, strict=True):
            assert np.isfinite(one[0]).all()
            assert np.array_equal(bits(one[0]), bits(other[0])) and np.array_equal(bits(one[0]), bits(third[0]))
        assert not broken or not any((one[1] == 7).any() for one in chosen)


def test_experts_without_an_addend_choose_themselves_too(machine):
    given = [Session({"x": draw(i, n, D)}, count=n) for i, n in enumerate((3, 1))]
    weights = experts("f32") | {"norm": weight(draw(1, 1, D)), "weight": weight(draw(5, E, D))}
    attrs = top_k_attrs(1, 2, 0)
    agree(machine, "norm_topk_moe", given, attrs, [Shape("f32", D)], 4e-6, weights, cuts=(1,))


def conv_call(bucket: Bucket, top_k: int, dtype: str = "f32", d: int = D, f: int = F, sm: int = 90) -> Call:
    def rows(cols: int, kind: str = "f32") -> Operand:
        return Operand("arena", kind, (1, 0), cols, cols)

    def stacked(m: int, k: int, kind: str) -> Operand:
        return Operand("weight", kind, (0, E * m), k, k, name="w", shape=(E, m, k))

    args = {
        "x": rows(d), "weights": rows(top_k), "experts": rows(top_k, "i32"), "gate_up": stacked(2 * f, d, dtype),
        "down": stacked(d, f, dtype), "addend": rows(d),
        "taps": Operand("weight", "f32", (0, d), 4, 4, name="taps", shape=(d, 4)),
        "tail": Operand("state", "f32", (0, 3), d, d, 64),
    }  # fmt: skip
    return Call("moe_conv_state", args, ATTRS | {"residual": True, "level": 1.0}, (rows(d),), bucket, sm)


def logits(seed: int, n: int, count: int) -> np.ndarray:
    """Random, with whole rows equal and some pairs equal."""
    values = draw(seed, n, count)
    values[0] = 0.25
    if n > 1:
        values[1, 1::2] = values[1, ::2][: count // 2]
    return values


@pytest.mark.parametrize(("count", "top_k", "shared"), [(5, 2, 1), (70, 6, 2), (3, 3, 0)])
def test_sink_router(machine, count, top_k, shared):
    sessions = [Session({"logits": logits(i, n, count + shared)}, count=n) for i, n in enumerate((4, 1, 17))]
    weights = {"bias": weight(np.round(draw(2, 1, count), 1) * 0.1), "scale": weight(np.array([[1.3]], np.float32))}
    weights["bias"].parts[0][...] = 0  # ties stay ties
    weights["bias"].values[...] = 0
    attrs = {"top_k": top_k, "n_shared": shared, "route_scale": 2.5}
    k = top_k + shared
    agree(machine, "sink_router", sessions, attrs, [Shape("f32", k), Shape("i64", k)], 1e-6, weights, cuts=(2,))


@pytest.mark.parametrize(("count", "pieces"), [(9, 1), (9, 2), (75, 1)])
def test_router_computes_its_logits(machine, monkeypatch, count, pieces):
    """A program has one expert and few rows, or four experts and many rows, of all inputs or of pieces of them."""
    from tmlc.kernels.triton import router

    if pieces > 1:
        monkeypatch.setattr(router, "MOST_INPUTS", 32)
    monkeypatch.setattr(router, "ENOUGH_PROGRAMS", 20)
    monkeypatch.setattr(router, "PLENTY_OF_PROGRAMS", 30)
    sessions = [Session({"x": draw(i, n, 33)}, count=n) for i, n in enumerate((4, 1, 17))]
    weights = {
        "weight": weight(draw(5, count + 1, 33)), "bias": weight(draw(2, 1, count)),
        "scale": weight(np.array([[1.3]], np.float32)),
    }  # fmt: skip
    attrs = {"top_k": 3, "n_shared": 1, "route_scale": 2.5}
    agree(machine, "router", sessions, attrs, [Shape("f32", 4), Shape("i64", 4)], 1e-5, weights, cuts=(2,))


@pytest.mark.parametrize("scores", [0, 1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (12, 5)])
def test_topk_router(machine, scores, biased, groups, top_groups):
    sessions = [Session({"logits": logits(i, n, 12)}, count=n) for i, n in enumerate((4, 1, 17))]
    weights = {"bias": weight(np.round(draw(2, 1, 12)) * 0.25)} if biased else {}
    attrs = {"scores": scores, "top_k": 4, "normalise": scores < 2, "groups": groups, "top_groups": top_groups,
             "scale": 1.5}  # fmt: skip
    agree(machine, "topk_router", sessions, attrs, [Shape("f32", 4), Shape("i64", 4)], 1e-6, weights, cuts=(2,))


def test_experts_that_every_row_has_stand_behind_those_it_chose(machine):
    sessions = [Session({"weights": draw(i, n, 3), "experts": np.full((n, 3), 4 - i)}, count=n)
                for i, n in enumerate((4, 1, 17))]  # fmt: skip
    out = [Shape("f32", 5), Shape("i64", 5)]
    agree(machine, "append_experts", sessions, {"first": 7, "count": 2}, out, 0.0, cuts=(2,))


def test_any_logits_give_distinct_experts(machine):
    values = np.full((3, 6), np.nan, np.float32)
    values[1, 2:], values[2] = np.inf, -np.inf
    attrs = {"scores": 1, "top_k": 4, "normalise": True, "groups": 1, "top_groups": 1, "scale": 1.0}
    found = run(machine, "topk_router", [Session({"logits": values}, count=3)], attrs,
                [Shape("f32", 4), Shape("i64", 4)])[0][1]  # fmt: skip
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 6 for row in found.tolist())
