"""Every canonical op goes through strict torch.export with a dynamic n and stays one node of the graph."""

import logging
import operator

import pytest
import torch
from torch.export import Dim, export

from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F

logging.getLogger("torch").setLevel(logging.ERROR)
H, G, D, R = 4, 2, 8, 4


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X = rand(5, 12)
KEY = torch.tensor([[7, i, 3] for i in range(5)])
VIDEO = torch.randint(0, 255, (5 * 2 * 8, 8 * 3), dtype=torch.uint8)

# op -> (function of inputs then weights, inputs for n = 5, rows per n of each input, weights)
CASES = {
    "embedding": (lambda i, t: F.embedding(t, i), [torch.arange(5)[:, None]], [1], [rand(9, 6)]),
    "bag_embedding": (
        lambda i, t: F.bag_embedding(t, i, 4), [torch.ones(5, 3, dtype=torch.long)], [1], [rand(12, 6)]
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, w, 1e-6), [X], [1], [rand(4)]),
    "linear": (lambda x, w: F.linear(x, w), [rand(20, 12)], [4], [rand(7, 12)]),
    "add": (F.add, [X, X], [1, 1], []),
    "mul": (F.mul, [X, X], [1, 1], []),
    "add_scaled": (lambda a, b: F.add_scaled(a, b, 0.25), [X, X], [1, 1], []),
    "scale": (lambda x: F.scale(x, 2.0), [X], [1], []),
    "scale_by": (F.scale_by, [X], [1], [torch.ones(1)]),
    "add_row": (lambda x, r: F.add_row(x, r, 1), [X], [1], [rand(2, 12)]),
    "silu": (F.silu, [X], [1], []),
    "gelu": (F.gelu, [X], [1], []),
    "swiglu": (F.swiglu, [X, X], [1, 1], []),
    "clamp": (lambda x: F.clamp(x, -0.5, 1.0), [X], [1], []),
    "modulate": (F.modulate, [X, X, X], [1, 1, 1], []),
    "columns": (lambda x: F.columns(x, 3, 9), [X], [1], []),
    "reshape": (lambda x: F.reshape(x, 48), [rand(20, 12)], [4], []),
    "short_conv": (F.short_conv, [X], [1], [rand(12, 1, 4)]),
    "attention": (
        lambda q, k, v, r, t: F.attention(q, k, v, r, t, H, G, 1 / D, 3, 0, 2.0, 0.1),
        [rand(5, H * D), rand(5, G * D), rand(5, G * D), rand(5, H * R)], [1, 1, 1, 1], [rand(R, 6)],
    ),
    "sigmoid": (F.sigmoid, [X], [1], []),
    "softcap": (lambda x: F.softcap(x, 2.0), [X], [1], []),
    "l2_clip": (lambda x, s: F.l2_clip(x, s, 3, 1.5), [X], [1], [rand(1, 12)]),
    "concat_columns": (F.concat_columns, [X, rand(5, 7)], [1, 1], []),
    "mix_blocks": (lambda x, q: F.mix_blocks(x, q, 1e-6), [X], [1], [rand(3, 4)]),
    "dynamic_conv": (lambda x, t, w: F.dynamic_conv(x, w, t, True), [X, rand(5, 6)], [1, 1], [rand(3, 12)]),
    "rope": (lambda x, f: F.rope(x, f, 2, 1, True, 1.5), [X], [1], [rand(2)]),
    "head_columns": (lambda x: F.head_columns(x, 3, 1, 3), [X], [1], []),
    "concat_heads": (lambda a, b: F.concat_heads(a, b, 3, 2), [X, rand(5, 7)], [1, 1], []),
    "topk_router": (
        lambda x, b: F.topk_router(x, b, 1, 3, True, 4, 2, 2.5), [X], [1], [rand(12)]
    ),
    "sink_router": (lambda x, b, s: F.sink_router(x, b, s, 3, 2, 2.5), [X], [1], [rand(10), torch.ones(1)]),
    "moe": (
        F.moe, [X, rand(5, 2), torch.tensor([[0, 5]] * 5)], [1, 1, 1], [rand(6, 16, 12), rand(6, 12, 8)]
    ),
    "shared_experts": (
        F.shared_experts, [X, rand(5, 2)], [1, 1], [rand(2, 8, 12), rand(2, 8, 12), rand(2, 12, 8)]
    ),
    "dmel": (
        lambda p, w, f: F.dmel(p, w, f, -7.0, 2.0, 16), [rand(5, 8)], [1], [rand(16).abs(), rand(3, 9).abs()]
    ),
    "patchify": (
        lambda v: F.patchify(v, 2, 8, 4, [1, 2, 2, 2], [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]), [VIDEO], [16], []
    ),
    "philox_normal": (lambda k: F.philox_normal(k, 10), [KEY], [1], []),
    "sample": (F.sample, [rand(5, 11), KEY, torch.ones(5, 1)], [1, 1, 1], []),
    "overlap_add": (lambda f, w: F.overlap_add(f, w, 8), [rand(20, 24)], [4], [rand(24).abs()]),
}  # fmt: skip


class Method(torch.nn.Module):
    def __init__(self, fn, weights):
        super().__init__()
        self.fn, self.count = fn, len(weights)
        for i, w in enumerate(weights):
            self.register_buffer(f"w{i}", w)

    def forward(self, *xs):
        return self.fn(*xs, *[getattr(self, f"w{i}") for i in range(self.count)])


def exported(name):
    fn, inputs, rows, weights = CASES[name]
    n = Dim("n", min=1, max=64)
    shapes = tuple({0: r * n} for r in rows)
    module = Method(fn, weights)
    return module, inputs, rows, export(module, tuple(inputs), dynamic_shapes=(shapes,), strict=True)


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_op_that_models_call_is_exported_here():
    assert set(CASES) == {name for name, spec in OPS.items() if not spec.from_pass}


@pytest.mark.parametrize("name", CASES)
def test_strict_export_keeps_one_dynamic_call_that_means_the_same(name):
    module, inputs, rows, program = exported(name)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [c.target for c in calls if c.target is not operator.getitem] == [OPS[name].overload]
    longer = [torch.cat([x, x[: 2 * r]]) for x, r in zip(inputs, rows, strict=True)]
    for want, got in zip(outputs(module(*longer)), outputs(program.module()(*longer)), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_take_the_shape_function(name):
    fn, inputs, _, weights = CASES[name]
    real = outputs(fn(*inputs, *weights))
    meta = outputs(fn(*[x.to("meta") for x in inputs], *[w.to("meta") for w in weights]))
    assert [(r.shape, r.dtype) for r in real] == [(m.shape, m.dtype) for m in meta]


def test_models_train_through_the_functional_ops():
    table = rand(6, 16, 12).requires_grad_()
    down = rand(6, 12, 8).requires_grad_()
    weights, experts = F.sink_router(X, rand(10)[None], torch.ones(1, 1), 3, 2, 2.5)
    F.moe(F.rms_norm(X, torch.ones(12), 1e-6), weights, experts % 6, table, down).sum().backward()
    assert table.grad.abs().sum() > 0 and down.grad.abs().sum() > 0
