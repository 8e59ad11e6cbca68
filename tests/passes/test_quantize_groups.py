"""quantize.int8 and quantize.int4: what gets codes, what keeps its numbers, and what a budget buys."""

import pytest
import torch

from tmlc.errors import PipelineError
from tmlc.ir.quantize import SCHEMES, dequantised
from tmlc.ir.run import ProgramRunner
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


def dtypes(program):
    return {name.partition(".")[0]: program.weights[name].dtype for name in program.used_weights()}


@pytest.mark.parametrize("text", [FUSED, PLAIN])
@pytest.mark.parametrize(("name", "scheme"), [("quantize.int8", "i8g32"), ("quantize.int4", "i4g32")])
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


@pytest.mark.parametrize(("name", "scheme"), [("quantize.int8", "i8g32"), ("quantize.int4", "i4g32")])
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
