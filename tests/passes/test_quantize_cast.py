"""quantize.cast: which weights carry the precision, and which stay float32 whatever the checkpoint holds."""

import torch

from tmlc.ir.run import ProgramRunner

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
    return {
        name.removesuffix(".bf16").removesuffix(".f32"): program.weights[name].dtype for name in program.used_weights()
    }


def test_bf16_goes_to_linears_experts_and_tables_and_never_to_routing_norms_or_biases(run_pass):
    for text in (FUSED, PLAIN):
        heavy = {
            name for name, dtype in dtypes(run_pass("quantize.cast", text, precision="bf16")).items() if dtype == "bf16"
        }
        assert heavy == {"table", "proj", "gu", "down"}


def test_fp32_leaves_a_float32_checkpoint_alone(run_pass):
    after = run_pass("quantize.cast", FUSED)
    assert after.record[-1].matches == 0 and set(dtypes(after).values()) == {"f32"}


def test_a_bf16_checkpoint_is_widened_for_fp32_and_read_as_it_is_for_bf16(run_pass):
    text = FUSED.replace(
        'weight "proj" = source("proj") : f32[8, 8]',
        'weight "proj.bf16" = source("proj") : bf16[8, 8]\nweight "proj" = cast("proj.bf16", dtype="f32")',
    )
    wide = run_pass("quantize.cast", text, precision="fp32")
    assert dtypes(wide)["proj"] == "f32"
    narrow = run_pass("quantize.cast", text, precision="bf16")
    assert narrow.weights["proj.bf16"].op == "source" and "proj.bf16" in narrow.used_weights()


def test_a_weight_that_is_also_needed_exactly_stays_float32(run_pass):
    text = FUSED.replace("%x = rms_norm(%p, %norm, eps=1e-06)", "%x0 = add_row(%p, %proj, index=0)\n"
                         "  %x = rms_norm(%x0, %norm, eps=1e-06)")  # fmt: skip
    assert dtypes(run_pass("quantize.cast", text, precision="bf16"))["proj"] == "f32"


def test_the_values_are_the_rounded_weights(program_of, run_pass, weights_for):
    before = program_of(FUSED)
    weights = weights_for(before)
    after = run_pass("quantize.cast", before, precision="bf16")
    rounded = {n: v.bfloat16().float() if n in ("table", "proj", "gu", "down") else v for n, v in weights.items()}
    ids = torch.tensor([[0], [8], [3]])
    got, want = (ProgramRunner(p, w).session().call("decode", ids)[0] for p, w in ((after, weights), (before, rounded)))
    assert torch.equal(got, want)
