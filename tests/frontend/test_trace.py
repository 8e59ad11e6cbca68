"""Tracing refuses whatever is not a canonical op, and says where it stands in the source."""

import pytest
import torch
from torch import nn

from tmlc.errors import FrontendError
from tmlc.frontend.trace import trace_method
from tmlc.ir.dims import Dim
from tmlc.ir.ops import functional as F
from tmlc.ir.types import TensorType

X = [("x", TensorType("f32", (Dim(2), 8)))]
EACH = [("x", TensorType("f32", (Dim(1), 8)))]


class Affine(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(4))
        self.spare, self.one = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def trace(forward, names=("weight", "bias"), inputs=X):
    module = Affine(forward)
    return trace_method("m", module, inputs, {id(getattr(module, name)): f"model.{name}" for name in names})


def refused(forward, **kwargs):
    with pytest.raises(FrontendError) as caught:
        trace(forward, **kwargs)
    assert caught.value.fix
    return str(caught.value)


def test_roles_types_and_rows_are_exact_and_unused_parameters_stay_out():
    graph = trace(lambda m, x: F.reshape(F.linear(x, m.weight, m.bias), 2))
    roles = [n.meta["role"] for n in graph.nodes if n.op == "placeholder"]
    assert sorted(roles) == [("input", "x"), ("weight", "model.bias"), ("weight", "model.weight")]
    calls = [n for n in graph.nodes if n.op == "call_function"]
    assert [str(n.meta["type"]) for n in calls] == ["f32[2n, 4]", "f32[4n, 2]"]


def test_several_outputs_and_ops_with_two_results():
    def forward(m, x):
        logits = F.linear(x, m.weight, m.bias)
        weights, experts = F.sink_router(logits, m.spare, m.one, 2, 1, 1.0)
        return weights, experts

    graph = trace(forward, names=("weight", "bias", "spare", "one"))
    returned = next(n for n in graph.nodes if n.op == "output").args[0]
    assert [str(n.meta["type"]) for n in returned] == ["f32[2n, 3]", "i64[2n, 3]"]


def test_other_operations_are_named_with_file_and_line():
    message = refused(lambda m, x: torch.relu(x))
    assert "aten.relu" in message and "test_trace.py:" in message
    assert "aten.add" in refused(lambda m, x: F.silu(x) + 1)


def test_control_flow_on_data_is_refused():
    assert "torch.export" in refused(lambda m, x: F.silu(x) if x.sum() > 0 else F.gelu(x))


def test_arguments_that_depend_on_the_number_of_positions_are_refused():
    for inputs in (X, EACH):
        assert "size" in refused(lambda m, x: F.scale(x, float(x.shape[0])), inputs=inputs)


def test_constants_and_parameters_that_the_checkpoint_lacks_are_refused():
    constant = torch.ones(4, 8)
    assert "register it as a buffer" in refused(lambda m, x: F.linear(x, constant))
    assert "'weight' is not one of the model's" in refused(lambda m, x: F.linear(x, m.weight), names=("bias",))


def test_operands_that_do_not_fit_are_refused():
    assert "weight must have 4 columns, not 8" in refused(lambda m, x: F.linear(F.columns(x, 0, 4), m.weight))
