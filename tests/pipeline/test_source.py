"""A pass that breaks a model is named together with the op where it went wrong and the line of the model behind it."""

import pytest
import torch

from tmlc.errors import CheckError
from tmlc.frontend import load_program
from tmlc.frontend.checkpoint import open_checkpoint
from tmlc.ir.ops import OPS
from tmlc.ir.program import call, replace
from tmlc.ir.source import source_of
from tmlc.ir.text import parse_program, print_program
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.pipeline.check import Checker
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pass_base import Pass, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline
from tmlc.pipeline.registry import _PASSES, register_pass

TEXT = """tmlc-ir 1
meta {"context": {"limit": 64, "policy": "ring_with_sinks", "sinks": 16, "max_append": 8}, "outputs": {"decode": ["y"]}}
weight "norm" = source("norm") : f32[8]
weight "up" = source("up") : f32[16, 8]
weight "down" = source("down") : f32[8, 16]
weight "conv" = source("conv") : f32[8, 4]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %norm = weight "norm"
  %up = weight "up"
  %down = weight "down"
  %conv = weight "conv"
  %normed = rms_norm(%x, %norm, eps=1e-06) : f32[n, 8] @source="layers.0.norm at model.py:3"
  %wide = linear(%normed, %up, none) : f32[n, 16] @source="layers.0.up at model.py:4"
  %act = silu(%wide) : f32[n, 16] @source="layers.0 at model.py:5"
  %narrow = linear(%act, %down, none) : f32[n, 8] @source="layers.0.down at model.py:6"
  %tail = short_conv(%narrow, %conv, residual=true) : f32[n, 8] @source="layers.0.conv at model.py:7"
  %y = add(%x, %tail) : f32[n, 8] @source="layers.0 at model.py:8"
  return %y
}
"""


@pytest.fixture
def program():
    return parse_program(TEXT)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm": (8,), "up": (16, 8), "down": (8, 16), "conv": (8, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def breaking():
    """Registers a pass `test.broken` that does what it is given to a program."""

    def make(edit):
        @register_pass("test.broken")
        class Broken(Pass):
            """Breaks a program on purpose."""

            def run(self, program, ctx):
                edit(program)
                return PassResult(program, 1)

        return Step("test.broken")

    yield make
    _PASSES.pop("test.broken", None)


def first(program, op, method="decode"):
    return program.methods[method].calls(op)[0]


def replaced(op, new_op, make_args):
    """An edit that puts a call of another op in the place of the first call of `op`."""

    def edit(program):
        node = first(program, op)
        with node.graph.inserting_before(node):
            replace(node, call(node.graph, new_op, make_args(node), name="made"))

    return edit


def changed_in_place(program):
    node = first(program, "rms_norm")
    node.args = (*node.args[:2], 0.7)


def rewired(program):
    node = first(program, "linear")
    node.args = (first(program, "rms_norm").args[0], *node.args[1:])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (replaced("silu", "gelu", lambda node: node.args), ["%made = gelu of layers.0 at model.py:5; seen in %narrow"]),
        (changed_in_place, ["%normed = rms_norm of layers.0.norm at model.py:3"]),
        (rewired, ["%wide = linear of layers.0.up at model.py:4"]),
        (replaced("add", "mul", lambda node: node.args), ["%made = mul of layers.0 at model.py:8"]),
    ],
    ids=["a wrong replacement", "a changed setting", "a changed input", "a wrong last op"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_op_and_the_line_of_the_model_are_named(program, weights, breaking, edit, words, streamed):
    steps = [Step("state.insert")] if streamed else []
    with pytest.raises(CheckError) as caught:
        run_pipeline(program, Pipeline("t", (*steps, breaking(edit))), checker=Checker(program, weights))
    for word in ["test.broken changed decode, output 0", "test.broken, first at", *words]:
        assert word in str(caught.value)


def test_places_are_printed_and_read_and_left_out_on_request(program):
    text = print_program(program)
    assert '@source="layers.0.up at model.py:4"' in text
    assert print_program(parse_program(text)) == text
    assert "@source" not in print_program(program, sources=False)


def test_every_call_of_a_traced_model_keeps_its_place_through_all_passes(tmp_path):
    create_checkpoint("nano", 0, tmp_path / "nano")
    traced = load_program(open_checkpoint(tmp_path / "nano"))
    for node in traced.methods["decode"].calls():
        assert " at model_zoo/interaction/" in source_of(node), node.format_node()
    after = run_pipeline(traced, load_pipeline("cpu"))
    for method in after.methods.values():
        for node in method.calls():
            if node.target is OPS["advance"].overload:
                continue  # it stands for no line of the model
            assert source_of(node), f"{method.name}/{node.name}"
    experts = [source_of(node) for node in after.methods["decode"].calls("moe")]
    assert all(place.startswith(f"model.layers.{i}.mlp") for i, place in enumerate(experts, 1)), experts
    # Two programs of one model differ by what passes did, not by where the model is installed.
    assert "/" not in source_of(after.methods["decode"].calls("router")[0]).split(" at ")[0]
