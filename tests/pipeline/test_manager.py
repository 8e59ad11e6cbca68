"""The manager: prerequisites, verification, records, expectations, dumps; and what happens when a pass is wrong."""

import pytest
import torch

from tmlc.errors import CheckError, IRError, PipelineError
from tmlc.ir.program import Fact, call, replace
from tmlc.ir.text import parse_program
from tmlc.pipeline.check import Checker
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pass_base import NearMiss, Pass, PassConfig, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline
from tmlc.pipeline.registry import _PASSES, register_pass

TEXT = """tmlc-ir 1
meta {"context": {"limit": 64, "policy": "ring_with_sinks", "sinks": 16, "max_append": 8}, "outputs": {"embed": ["x"], "decode": ["hidden"]}}
weight "table" = source("table") : f32[9, 8]
weight "q.weight" = source("q") : f32[8, 8]
weight "k.weight" = source("k") : f32[8, 8]
method embed(max_n=8) {
  %ids = input "ids" : i64[n, 1]
  %table = weight "table"
  %x = embedding(%table, %ids)
  return %x
}
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %q = weight "q.weight"
  %k = weight "k.weight"
  %qs = linear(%x, %q, none)
  %ks = linear(%x, %k, none)
  %a = attention(%qs, %ks, %x, none, none, num_heads=2, num_kv_heads=2, scale=0.5, window=9, sinks=0, log_floor=0.0, log_alpha=0.0)
  return %a
}
"""  # noqa: E501


@pytest.fixture
def program():
    return parse_program(TEXT)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in {"table": (9, 8), "q": (8, 8), "k": (8, 8)}.items()}


@pytest.fixture
def passes():
    """Passes of these tests only: one does nothing, others are wrong in their numbers, shape or IR, one fails."""

    @register_pass("test.nothing")
    class Nothing(Pass):
        class Config(PassConfig):
            size: int = 3

        requires = frozenset({Fact.CANONICAL})
        provides = frozenset({Fact.NORMS_FUSED})

        def run(self, program, ctx):
            ctx.progress("at work")
            return PassResult(program, 2, [NearMiss("decode", "linear", "too small")], ["a note"])

    @register_pass("test.scales")
    class Scales(Pass):
        def run(self, program, ctx):
            graph = program.methods["decode"].graph
            (node,) = program.methods["decode"].calls("attention")
            with graph.inserting_after(node):
                scaled = call(graph, "scale", (arg_of(node), 1.01))
            replace(node, scaled)
            return PassResult(program, 1)

    @register_pass("test.cuts")
    class Cuts(Pass):
        def run(self, program, ctx):
            output = program.methods["decode"].output_node
            with output.graph.inserting_before(output):
                first, *rest = output.args[0]
                output.args = ((call(output.graph, "columns", (first, 0, 1)), *rest),)
            return PassResult(program, 1)

    @register_pass("test.breaks")
    class Breaks(Pass):
        def run(self, program, ctx):
            program.methods["decode"].calls("linear")[0].meta["type"] = None
            return PassResult(program, 1)

    @register_pass("test.fails")
    class Fails(Pass):
        def run(self, program, ctx):
            program.methods.clear()
            raise RuntimeError("out of ideas")

    yield
    for name in ("nothing", "scales", "cuts", "breaks", "fails"):
        _PASSES.pop(f"test.{name}")


def arg_of(node):
    return node.args[0]


def pipeline(*steps):
    return Pipeline("test", tuple(s if isinstance(s, Step) else Step(s) for s in steps))


def test_the_record_tells_what_each_pass_did(program, passes):
    seen, lines = [], []
    after = run_pipeline(
        program,
        pipeline("canonicalize.dead_code", Step("test.nothing", {"size": 5}), "fuse.merge_linears"),
        on_record=seen.append,
        progress=lines.append,
    )
    names = ["canonicalize.dead_code", "test.nothing", "fuse.merge_linears"]
    assert [r.name for r in after.record] == [r.name for r in seen] == names
    nothing, merge = after.record[1:]
    assert nothing.config == {"size": 5} and nothing.matches == 2
    assert nothing.near_misses == ["decode/linear: too small"] and nothing.notes == ["a note"]
    assert (merge.ops_before, merge.ops_after) == (4, 5) and merge.ms > 0 and merge.error is None
    assert lines == [
        "canonicalize.dead_code (1 of 3)",
        "test.nothing (2 of 3)",
        "at work",
        "fuse.merge_linears (3 of 3)",
    ]
    assert {Fact.CANONICAL, Fact.NORMS_FUSED, Fact.LINEARS_MERGED} <= after.facts


def test_the_input_program_is_left_as_it_was(program, passes):
    run_pipeline(program, load_pipeline("cpu").disable(["fuse.residual_norm"]))
    assert not program.record and not program.states and not program.facts
    assert len(program.methods["decode"].calls("linear")) == 2
    with pytest.raises(RuntimeError):
        run_pipeline(program, pipeline("test.fails"))
    assert list(program.methods) == ["embed", "decode"]


def test_unmet_requirements_name_the_fact(program, passes):
    with pytest.raises(PipelineError, match=r"test\.nothing needs canonical"):
        run_pipeline(program, pipeline("test.nothing"))


def test_a_pass_that_leaves_broken_ir_is_named(program, passes):
    with pytest.raises(IRError) as caught:
        run_pipeline(program, pipeline("canonicalize.dead_code", "test.breaks"))
    assert "after test.breaks" in str(caught.value) and "decode" in str(caught.value)


def test_a_failed_pass_still_hands_over_its_record(program, passes):
    seen = []
    with pytest.raises(RuntimeError):
        run_pipeline(program, pipeline("test.fails"), on_record=seen.append)
    assert seen[0].name == "test.fails" and seen[0].notes == ["failed: out of ideas"]


def test_an_unmet_expectation_stops_the_pipeline(program):
    with pytest.raises(PipelineError, match=r"route\.fuse_router matched 0 times, expected >=1"):
        run_pipeline(program, pipeline(Step("route.fuse_router", {}, ">=1")))


def test_the_dump_holds_readable_text_before_and_after_every_pass(program, tmp_path):
    after = run_pipeline(program, pipeline("canonicalize.dead_code", "fuse.merge_linears"), dump=tmp_path / "d")
    files = sorted(p.name for p in (tmp_path / "d").iterdir())
    assert files == ["00_input.ir", "01_canonicalize.dead_code.ir", "02_fuse.merge_linears.ir"]
    again = parse_program((tmp_path / "d" / files[-1]).read_text())
    assert again.count_ops() == after.count_ops()


def test_check_passes_a_sound_pipeline_stateless_and_streamed(program, weights):
    after = run_pipeline(
        program, load_pipeline("cpu").disable(["fuse.residual_norm"]), checker=Checker(program, weights)
    )
    assert [r.name for r in after.record][-1] == "memory.verify"
    assert all(r.error is not None and r.error < 1e-5 for r in after.record)
    assert "stateful" in after.facts


def test_check_names_the_first_pass_that_moves_an_output(program, weights, passes):
    steps = ("canonicalize.dead_code", "test.scales", "fuse.merge_linears")
    with pytest.raises(CheckError) as caught:
        run_pipeline(program, pipeline(*steps), checker=Checker(program, weights))
    assert "test.scales changed decode, output 0" in str(caught.value)
    assert caught.value.exit_code == 1
    with pytest.raises(CheckError, match=r"test\.cuts changed the shape of decode, output 0 from") as caught:
        run_pipeline(program, pipeline("canonicalize.dead_code", "test.cuts"), checker=Checker(program, weights))
    assert "compile with --disable test.cuts" in caught.value.fix


def test_check_refuses_results_that_are_not_finite(program, weights):
    checker = Checker(program, weights)
    checker._source = {**weights, "q": weights["q"] * float("nan")}
    with pytest.raises(CheckError, match="nan"):
        checker.check("the pass", program)


def test_check_measures_a_lossy_pass_loosely_and_the_next_ones_against_it(program, weights):
    steps = (Step("quantize.cast", {"precision": "bf16"}), "state.insert")
    after = run_pipeline(program, pipeline(*steps), checker=Checker(program, weights))
    cast, insert = (r.error for r in after.record)
    assert 1e-4 < cast < 0.05 and insert < 1e-5


def test_check_feeds_methods_with_what_other_methods_produce(program, weights):
    checker = Checker(program, weights)
    rows = {tuple(row.tolist()) for row in checker.expected["embed"][0]}
    assert all(tuple(row.tolist()) in rows for row in checker.inputs["decode"][0])
    assert len(checker.inputs["decode"][0]) > 9 + 8, "long enough for the ring to wrap"
