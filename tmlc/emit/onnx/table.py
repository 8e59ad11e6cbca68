"""One entry for each canonical op: what lowers it, and the operators that stand for it, for `tmlc compile`'s table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tmlc.emit.onnx import attention, dense, experts, heads, media, random
from tmlc.emit.onnx.call import Call
from tmlc.ir.replaced import TRITON_PASSES


@dataclass(frozen=True)
class Lowering:
    """What writes the nodes of an op, and their operators in short."""

    lower: Callable[[Call], str | tuple[str, ...]]
    operators: str


LOWERINGS: dict[str, Lowering] = {
    "embedding": Lowering(dense.embedding, "Gather"),
    "bag_embedding": Lowering(dense.bag_embedding, "Gather, ReduceSum"),
    "rms_norm": Lowering(dense.rms_norm, "ReduceMean, Div, Mul"),
    "add_rms_norm": Lowering(dense.add_rms_norm, "Add, ReduceMean, Div, Mul"),
    "linear": Lowering(dense.linear, "Gemm"),
    "linear_add": Lowering(dense.linear_add, "Gemm, Add"),
    "linear_conv_state": Lowering(experts.linear_conv_state, "Gemm, Gather, ReduceSum"),
    "add": Lowering(dense.binary("Add"), "Add"),
    "mul": Lowering(dense.binary("Mul"), "Mul"),
    "add_scaled": Lowering(dense.add_scaled, "Mul, Add"),
    "scale": Lowering(dense.scale, "Mul"),
    "clamp": Lowering(dense.clamp, "Clip"),
    "scale_by": Lowering(dense.scale_by, "Mul"),
    "add_row": Lowering(dense.add_row, "Gather, Add"),
    "silu": Lowering(dense.silu, "Sigmoid, Mul"),
    "gelu": Lowering(dense.gelu, "Gelu"),
    "swiglu": Lowering(dense.swiglu, "Sigmoid, Mul"),
    "sigmoid": Lowering(dense.unary("Sigmoid"), "Sigmoid"),
    "softcap": Lowering(dense.softcap, "Tanh, Mul"),
    "modulate": Lowering(dense.modulate, "Mul, Add"),
    "columns": Lowering(dense.columns, "Slice"),
    "reshape": Lowering(dense.reshape, "Reshape"),
    "l2_clip": Lowering(dense.l2_clip, "ReduceSumSquare, Min, Mul"),
    "concat_columns": Lowering(dense.concat_columns, "Concat"),
    "mix_blocks": Lowering(dense.mix_blocks, "MatMul, Softmax"),
    "short_conv_state": Lowering(attention.short_conv_state, "Gather, Mul, ReduceSum"),
    "dynamic_conv_state": Lowering(attention.dynamic_conv_state, "Gather, Mul, ReduceSum"),
    "attention_state": Lowering(attention.attention_state, "ScatterND, MatMul, Softmax"),
    "rope_state": Lowering(heads.rope_state, "Cos, Sin, Mul"),
    "head_columns": Lowering(heads.head_columns, "Slice"),
    "concat_heads": Lowering(heads.concat_heads, "Concat"),
    "advance": Lowering(heads.advance, "Add"),
    "sink_router": Lowering(experts.sink_router, "TopK, Softmax"),
    "router": Lowering(experts.router, "Gemm, TopK, Softmax"),
    "topk_router": Lowering(experts.topk_router, "Softmax, TopK"),
    "moe": Lowering(experts.moe, "If, Gather, MatMul; Loop, Gemm"),
    "moe_add": Lowering(experts.moe_add, "If, Gather, MatMul; Loop, Gemm"),
    "moe_conv_state": Lowering(experts.moe_conv_state, "If, Gather, MatMul; Loop, Gemm"),
    "dmel_state": Lowering(media.dmel_state, "DFT, MatMul, Greater"),
    "patchify": Lowering(media.patchify, "Transpose, Div"),
    "overlap_add_state": Lowering(media.overlap_add_state, "Pad, Add"),
    "philox_normal": Lowering(random.philox_normal, "BitwiseXor, Log, Cos"),
    "sample": Lowering(random.sample, "If, BitwiseXor, ArgMax"),
    "head_sample": Lowering(random.head_sample, "Gemm, If, BitwiseXor, ArgMax"),
}

#: Ops that no graph can hold: why, and what to do.
REFUSED: dict[str, tuple[str, str]] = {
    "shared_experts": (
        "experts run from one stack",
        "Run route.stack_experts, which joins it with moe.",
    ),
    **{
        op: (
            "it is stateless, and a session goes on from its states",
            f"Run state.insert, which makes it {op}_state.",
        )
        for op in ("attention", "rope", "short_conv", "dynamic_conv", "dmel", "overlap_add")
    },
    **{op: ("only the Triton target runs it", f"Leave out {name}.") for op, name in TRITON_PASSES.items()},
}
