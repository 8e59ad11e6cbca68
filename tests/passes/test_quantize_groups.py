"""quantize.int8, quantize.int4 and quantize.fp8: what gets codes, what keeps its numbers, and what a budget buys."""

import pytest
import torch

from tmlc.errors import PipelineError
from tmlc.ir.quantize import SCHEMES, dequantised
from tmlc.ir.run import ProgramRunner
from tmlc.passes.quantize.sensitivity import output_effects
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import Pipeline, Step

TEXT = """
weight "table" = source("table") : f32[9, 8]
weight "proj" = source("proj") : f32[8, 8]
weight "bias" = source("bias") : f32[8]
weight "norm" = source("norm") : f32[8]
weight "route" = source("route") : f32[6, 8]
weight "rb" = source("rb") : f32[4]
weight "one" = source("one") : f32[1]
weight "gu" = source("gu") : f32[6, 10, 8]
weight "down" = source("down") : f32[6, 8, 5]
method decode(max_n=8) {
  %ids = input "ids" : i64[n, 1]
  %table = weight "table"
  %proj = weight "proj"
  %bias = weight "bias"
  %norm = weight "norm"
  %route = weight "route"
  %rb = weight "rb"
  %one = weight "one"
  %gu = weight "gu"
  %down = weight "down"
  %e = embedding(%table, %ids)
  %p = linear(%e, %proj, %bias)
  %x = rms_norm(%p, %norm, eps=1e-06)
  ROUTER
  %w = item(%r, 0)
  %k = item(%r, 1)
  %y = moe(%x, %w, %k, %gu, %down)
  return %y
}
"""
FUSED = TEXT.replace("ROUTER", "%r = router(%x, %route, %rb, %one, top_k=2, n_shared=2, route_scale=1.0)")
PLAIN = TEXT.replace(
    "ROUTER",
    "%l = linear(%x, %route, none)\n  %r = sink_router(%l, %rb, %one, top_k=2, n_shared=2, route_scale=1.0)",
)


CODERS = [("quantize.int8", "i8g32"), ("quantize.int4", "i4g32"), ("quantize.fp8", "f8g128")]


def dtypes(program):
    return {name.partition(".")[0]: program.weights[name].dtype for name in program.used_weights()}


@pytest.mark.parametrize("text", [FUSED, PLAIN])
@pytest.mark.parametrize(("name", "scheme"), CODERS)
def test_linears_and_experts_get_codes_and_everything_else_keeps_its_numbers(run_pass, text, name, scheme):
    after = run_pass(name, text)
    coded = {weight for weight, dtype in dtypes(after).items() if dtype == scheme}
    assert coded == {"proj", "gu", "down"} and after.record[-1].matches == 3
    assert {dtype for weight, dtype in dtypes(after).items() if weight not in coded} == {"f32"}
    assert not after.record[-1].near_misses


def test_int4_leaves_what_is_outside_the_decoder_at_eight_bits(run_pass):
    after = run_pass("quantize.int4", FUSED.replace("method decode", "method speak"), group=64)
    assert dtypes(after)["proj"] == "i8g32"
    assert dtypes(run_pass("quantize.int4", FUSED, group=64))["proj"] == "i4g64"


def test_a_weight_that_another_op_reads_is_a_near_miss(run_pass):
    tied = FUSED.replace("%p = linear(%e, %proj, %bias)", "%p0 = linear(%e, %proj, %bias)\n"
                         "  %p = add_row(%p0, %proj, index=0)")  # fmt: skip
    after = run_pass("quantize.int8", tied)
    assert dtypes(after)["proj"] == "f32" and "add_row" in after.record[-1].near_misses[0]


def test_excluded_weights_are_left_alone(run_pass):
    after = run_pass("quantize.int8", FUSED, exclude=["pr*", "gu"])
    assert {w for w, dtype in dtypes(after).items() if dtype == "i8g32"} == {"down"}


def test_the_cast_that_follows_leaves_codes_alone(program_of, run_pass):
    after = run_pass("quantize.cast", run_pass("quantize.int8", FUSED), precision="bf16")
    assert dtypes(after)["table"] == "bf16" and dtypes(after)["gu"] == "i8g32"


@pytest.mark.parametrize(("name", "scheme"), CODERS)
def test_the_program_computes_with_the_rounded_weights(program_of, run_pass, weights_for, name, scheme):
    before = program_of(FUSED)
    weights = weights_for(before)
    after = run_pass(name, before)
    rounded = dict(weights)
    for weight in ("proj", "gu", "down"):
        rounded[weight] = torch.empty_like(weights[weight])
        dequantised(weights[weight], SCHEMES[scheme], rounded[weight])
    ids = torch.tensor([[0], [8], [3]])
    got, want = (ProgramRunner(p, w).session().call("decode", ids)[0] for p, w in ((after, weights), (before, rounded)))
    assert torch.equal(got, want)


def measured(program, weights, name, **config):
    return run_pipeline(program, Pipeline("test", (Step(name, config),)), source=weights)


def test_the_record_tells_the_error_of_each_layer_worst_first(program_of, weights_for):
    program = program_of(FUSED)
    weights = weights_for(program)
    notes = measured(program, weights, "quantize.int4").record[-1].notes
    assert "3 i4g32" in notes[0] and {note.partition(":")[0] for note in notes[1:]} == {"proj", "gu", "down"}
    errors = [float(note.rsplit(" ", 1)[1]) for note in notes[1:]]
    assert len(errors) == 3 and errors == sorted(errors, reverse=True) and 0.01 < errors[-1] < 0.2


def test_a_budget_keeps_the_worst_layers_higher_and_is_not_passed(program_of, weights_for):
    program = program_of(FUSED)
    weights = weights_for(program)
    weights["proj"] = weights["proj"] / torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    total = sum(SCHEMES["i4g32"].nbytes(*shape) for shape in ((8, 8), (60, 8), (48, 5)))
    extra = SCHEMES["i8g32"].nbytes(8, 8) - SCHEMES["i4g32"].nbytes(8, 8)
    after = measured(program, weights, "quantize.int4", budget=1.01 * extra / total)
    assert dtypes(after)["proj"] == "i8g32" and dtypes(after)["gu"] == "i4g32" == dtypes(after)["down"]
    assert any("spared" in note for note in after.record[-1].notes)
    assert dtypes(measured(program, weights, "quantize.int4", budget=0.5 * extra / total))["proj"] == "i4g32"
    everything = measured(program, weights, "quantize.int4", budget=1.0)
    assert {dtypes(everything)[w] for w in ("proj", "gu", "down")} == {"i8g32"}
    left_alone = measured(program, weights, "quantize.int8", budget=2.0)
    assert {dtypes(left_alone)[w] for w in ("proj", "gu", "down")} == {"f32"}


def test_a_budget_without_values_is_an_error(run_pass):
    with pytest.raises(PipelineError, match="budget needs"):
        run_pass("quantize.int4", FUSED, budget=0.1)


CHAIN = """
weight "table" = source("table") : f32[9, 64]
weight "quiet" = source("quiet") : f32[64, 64]
weight "loud" = source("loud") : f32[64, 64]
weight "head" = source("head") : f32[9, 64]
weight "other" = source("other") : f32[8, 8]
method embed_text(max_n=8) {
  %ids = input "ids" : i64[n, 1]
  %table = weight "table"
  %x = embedding(%table, %ids)
  return %x
}
method decode(max_n=8) {
  %x = input "x" : f32[n, 64]
  %quiet = weight "quiet"
  %loud = weight "loud"
  %a = linear(%x, %quiet, none)
  %small = scale(%a, alpha=0.001)
  %b = linear(%x, %loud, none)
  %hidden = add(%small, %b)
  return %hidden
}
method unembed(max_n=8) {
  %hidden = input "hidden" : f32[n, 64]
  %head = weight "head"
  %logits = linear(%hidden, %head, none)
  return %logits
}
method embed_audio(max_n=8) {
  %pcm = input "pcm" : f32[n, 8]
  %other = weight "other"
  %x = linear(%pcm, %other, none)
  return %x
}
"""
IDS = [3, 0, 8, 1, 1, 5]


@pytest.fixture
def chain(program_of, weights_for):
    """`quiet` has the larger error (one weight of each group is large), and hardly reaches the outputs."""
    program = program_of(CHAIN)
    weights = weights_for(program)
    weights["quiet"][:, ::32] *= 20
    return program, weights


def test_an_effect_is_the_divergence_of_the_program_with_that_weight_rounded(chain):
    program, weights = chain

    def distributions(values):
        session = ProgramRunner(program, values).session()
        (x,) = session.call("embed_text", torch.tensor(IDS)[:, None])
        return torch.log_softmax(session.call("unembed", *session.call("decode", x))[0].double(), -1)

    schemes = {"quiet": "i4g32", "loud": "i4g64", "head": "i8g32", "other": "i8g32"}
    found, plain = output_effects(program, schemes, weights, IDS, lambda line: None), distributions(weights)
    assert set(found) == {"quiet", "loud", "head"}, "what the outputs do not depend on has no effect on them"
    for name, effect in found.items():
        changed = dict(weights)
        changed[name] = torch.empty_like(weights[name])
        dequantised(weights[name], SCHEMES[schemes[name]], changed[name])
        rounded = distributions(changed)
        assert effect == pytest.approx(float((plain.exp() * (plain - rounded)).sum(-1).mean()), rel=1e-6)
    assert found["loud"] > 100 * found["quiet"] > 0


@pytest.mark.parametrize(
    ("settings", "spared"),
    [
        ({"calibration": IDS}, "loud"),
        ({"calibration": IDS, "sensitivity": "output"}, "loud"),
        ({"calibration": IDS, "sensitivity": "weight"}, "quiet"),
        ({}, "quiet"),
    ],
)
def test_the_budget_goes_where_the_sensitivity_says(chain, settings, spared):
    program, weights = chain
    extra = SCHEMES["i8g32"].nbytes(64, 64) - SCHEMES["i4g32"].nbytes(64, 64)
    total = 2 * SCHEMES["i4g32"].nbytes(64, 64) + SCHEMES["i8g32"].nbytes(9, 64) + SCHEMES["i8g32"].nbytes(8, 8)
    # enough for one of the two, beside the head
    after = measured(program, weights, "quantize.int4", budget=1.35 * extra / total, **settings)
    assert {name for name in ("quiet", "loud") if dtypes(after)[name] == "i8g32"} == {spared}
    assert any("effect" in note for note in after.record[-1].notes) == (spared == "loud")


def test_what_cannot_be_measured_at_the_outputs_is_refused(chain, program_of, weights_for):
    program, weights = chain
    for ids in ([9], [-1], []):
        with pytest.raises(PipelineError, match=r"outside the vocabulary of 9|no text to measure effects"):
            measured(program, weights, "quantize.int4", budget=0.1, calibration=ids, sensitivity="output")
    alone = program_of(FUSED)
    with pytest.raises(PipelineError, match="has no method embed_text"):
        measured(alone, weights_for(alone), "quantize.int4", budget=0.1, calibration=IDS)
