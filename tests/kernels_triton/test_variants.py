"""Kernels as machine code, without a GPU: they build for every architecture, spill nothing, and come out the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shapes import LARGE, MODELS, NANO, Model, calls, w, x
from triton_harness import with_compiler_for, with_triton

import tmlc.kernels.triton.variants as variants_module
from tmlc.errors import REPORT, EmitError
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Pointer, Variant
from tmlc.kernels.triton.registry import Call, launch, lower, supported
from tmlc.kernels.triton.variants import Compiled, compile_variant, ptx_of, variant_key

BUCKETS = (Bucket(1, 1), Bucket(1, 4), Bucket(16, 16))

#: Variants that spill, by kernel and architecture: (most bytes of a thread, why they are kept).
EXCEPTIONS: dict[tuple[str, int], tuple[int, str]] = {}


def variants(model: Model, sm: int, ops: tuple[str, ...] = ()) -> list[Variant]:
    """Every variant of a model's ops, once."""
    found: dict[Variant, None] = {}
    for bucket in BUCKETS:
        for call in calls(model, bucket, sm):
            if not ops or call.op in ops:
                found |= dict.fromkeys(item.variant(sm) for item in lower(call).launches)
    return list(found)


def held(compiled: Compiled, variant: Variant) -> None:
    most, _ = EXCEPTIONS.get((variant.kernel, variant.sm), (0, ""))
    assert compiled.spill_bytes <= most, f"{variant} spills {compiled.spill_bytes} bytes"
    assert compiled.registers <= 255 and compiled.num_warps * 32 <= 1024
    assert compiled.shared <= ARCHITECTURES[variant.sm].shared_bytes, variant
    assert compiled.cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_a_product_and_attention_build(sm):
    with_compiler_for(sm)
    chosen = {"linear_kernel": 1, "attention_kernel": 1}
    for variant in variants(LARGE, sm, ("linear", "attention_state")):
        if chosen.get(variant.kernel, 0) > 0:
            chosen[variant.kernel] -= 1
            held(compile_variant(variant), variant)
    assert not any(chosen.values())


def test_attention_that_norms_or_turns_builds_over_caches_of_every_dtype():
    with_compiler_for(90)
    chosen: dict[tuple[bool, ...], Variant] = {}
    for variant in variants(NANO, 90, ("norm_attention_state", "rope_attention_state")):
        fixed = dict(variant.constexprs)
        if variant.kernel == "attention_kernel":
            chosen.setdefault((fixed["INT8"], fixed["EXACT"], "q_norm" in fixed, "table" in fixed), variant)
    assert len(chosen) == 12
    for variant in chosen.values():
        held(compile_variant(variant), variant)


def test_what_does_not_fit_into_shared_memory_has_fewer_blocks_on_their_way_or_is_refused(monkeypatch):
    variant = next(one for one in variants(LARGE, 90, ("linear",)) if one.num_stages > 2)
    usual = compile_variant(variant)
    there = ARCHITECTURES[90]
    monkeypatch.setitem(ARCHITECTURES, 90, replace(there, shared_bytes=usual.shared - 1))
    assert compile_variant(variant).shared < usual.shared
    monkeypatch.setitem(ARCHITECTURES, 90, replace(there, shared_bytes=1024))
    with pytest.raises(EmitError, match="bytes of shared memory, a program on sm90 has 1024") as caught:
        compile_variant(variant)
    assert "--tuning" in caught.value.fix


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_eight_choices_of_4_bit_weights_fit_on_every_architecture(sm):
    """The experts of Qwen3-30B-A3B, all of whose turns would be on their way at once."""
    with_compiler_for(sm)
    given = {"x": x(2048), "weights": x(8), "experts": x(8, "i32")}
    given |= {"gate_up": w(128, 1536, 2048, dtype="i4g64"), "down": w(128, 2048, 768, dtype="i4g64")}
    plain = {"alpha": 0.0, "limit": 0.0, "gate_cap": 0.0, "up_cap": 0.0, "grouped_from": 9}
    call = Call("moe", given, plain, (x(2048, offset=1 << 20),), Bucket(1, 1), sm)
    variant = lower(call).launches[-1].variant(sm)
    assert variant.kernel == "moe_down_sum_kernel"
    held(compile_variant(variant), variant)


def test_the_shapes_reach_every_op():
    assert {call.op for call in calls(NANO, Bucket(1, 1), 90)} == set(supported()) - {"copy", "moe_conv_state"}


def test_the_same_variant_gives_the_same_machine_code():
    variant = variants(NANO, 90, ("rms_norm",))[0]
    first, second = compile_variant(variant), compile_variant(variant)
    assert first.cubin == second.cubin and first == second
    assert first.to_json()["sha256"] == first.digest


def test_buckets_share_variants():
    """All with up to 8 rows, and all with more."""
    few = [{variant_key(v) for v in _of(Bucket(batch, n))} for batch, n in ((1, 4), (2, 4), (8, 1))]
    more = [{variant_key(v) for v in _of(Bucket(batch, n))} for batch, n in ((1, 16), (4, 4), (64, 1))]
    assert few[0] == few[1] == few[2] != more[0] == more[1] == more[2]


def _of(bucket: Bucket) -> list[Variant]:
    return [
        item.variant(90) for call in calls(LARGE, bucket, 90) if call.op == "linear" for item in lower(call).launches
    ]


def test_a_key_tells_variants_apart():
    found = variants(NANO, 90) + variants(LARGE, 80, ("linear",))
    assert len({variant_key(v) for v in found}) == len(set(found))


def test_a_launch_with_other_arguments_is_refused():
    with pytest.raises(EmitError, match="advance_kernel takes") as caught:
        launch("advance_kernel", (1,), {"position": 1}, {})
    with pytest.raises(EmitError, match="a pointer to attic") as other:
        Pointer("attic", "", 0, "f32", 4)
    assert caught.value.fix == other.value.fix == REPORT
    with pytest.raises(EmitError, match="grid"):
        launch("advance_kernel", (0,), {"position": 1, "slots": 1, "counts": 1}, {})


def test_what_spills_is_tried_with_all_registers_with_fewer_stages_and_with_one_more(monkeypatch):
    """And last with Triton's own tiles. The first that does not spill is taken; where all do, the one that spills the
    least. One that wants more shared memory than there is is none."""
    asked = []

    def compiled(spills, shared=lambda stages: 0, other=24):
        def made(source, target, variant, stages, registers, staggered=True):
            asked.append((stages, registers) if staggered else (stages, registers, "Triton's tiles"))
            spilled = spills(stages, registers) if staggered else other
            return Compiled(b"", "k", 4, shared(stages), 40, spilled, 2)

        monkeypatch.setattr(variants_module, "_compiled", made)
        asked.clear()
        return compile_variant(replace(variants(NANO, 90, ("rms_norm",))[0], num_stages=5)).spill_bytes

    assert compiled(lambda stages, registers: 0) == 0 and asked == [(5, None)]
    assert compiled(lambda stages, registers: 8 * (stages > 3)) == 0
    assert asked == [(5, None), (5, 255), (4, None), (4, 255), (3, None)]
    assert compiled(lambda stages, registers: 16 - 8 * (stages == 4)) == 8
    tried = [(stages, registers) for stages in (5, 4, 3, 2, 6) for registers in (None, 255)]
    assert asked == [*tried, (5, None, "Triton's tiles"), (5, 255, "Triton's tiles")]
    assert compiled(lambda stages, registers: 8, other=0) == 0 and asked == [*tried, (5, None, "Triton's tiles")]
    assert compiled(lambda stages, registers: 8 * (stages != 6), shared=lambda stages: 300_000 * (stages == 6)) == 8


@pytest.mark.slow
def test_experts_of_the_sizes_of_qwen3_30b_build_without_spills():
    """Eight choices of four rows, in two stages: a loop that is unrolled as a whole where it has no more of them."""
    d, f, experts, top_k = 2048, 768, 128, 8
    routes = {"weights": x(top_k), "experts": x(top_k, "i32"), "gate_up_bias": None, "down_bias": None, "addend": x(d)}
    weights = {"gate_up": w(experts, 2 * f, d, dtype="bf16"), "down": w(experts, d, f, dtype="bf16")}
    attrs = dict(grouped_from=0, alpha=0.0, limit=0.0, gate_cap=0.0, up_cap=0.0)
    for sm in ARCHITECTURES:
        call = Call("moe_add", {"x": x(d), **routes, **weights}, attrs, (x(d),), Bucket(1, 4), sm)
        variant = lower(call).launches[-1].variant(sm)
        assert variant.kernel == "moe_down_sum_kernel"
        held(compile_variant(variant), variant)


def same_ptx(sm: int, other: int, step: int) -> None:
    """Of every `step`-th variant of both models."""
    with_compiler_for(other)
    with_triton("3.9", "names registers otherwise for some architectures")
    held = [variant for model in MODELS.values() for variant in variants(model, sm)][::step]
    for variant in held:
        made, beside = (ptx_of(replace(variant, sm=one)) for one in (sm, other))
        texts = [one.ptx.replace(f".target sm_{number}a", "") for one, number in ((made, sm), (beside, other))]
        assert texts[0] == texts[1] != made.ptx, variant
        assert made.shared == beside.shared
    assert len(held) > 5


@pytest.mark.parametrize(("sm", "other"), [(100, 103), (120, 121)])
def test_kin_run_the_same_ptx(sm, other):
    """What was seen of the PTX of sm_100 and sm_120 holds for sm_103 and sm_121, which run no code of theirs."""
    same_ptx(sm, other, 60)


@pytest.mark.slow
@pytest.mark.parametrize(("sm", "other"), [(100, 103), (120, 121)])
def test_kin_run_the_same_ptx_of_every_variant(sm, other):
    same_ptx(sm, other, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("name", MODELS)
def test_every_variant_builds_without_spills(name, sm):
    with_compiler_for(sm)
    for variant in variants(MODELS[name], sm):
        held(compile_variant(variant), variant)
