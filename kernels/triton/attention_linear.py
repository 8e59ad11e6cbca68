"""attention_linear_state: attention, and the output projection that alone reads it. In a call of one row the product
adds up what the splits of the cache left; else the one op follows the other."""

from dataclasses import replace

from tmlc.kernels.triton.attention import attention_launches, combine_launch
from tmlc.kernels.triton.conv import linear_conv_launches
from tmlc.kernels.triton.launch import Launch, Lowered, Operand, Scratch
from tmlc.kernels.triton.linear import linear_launches
from tmlc.kernels.triton.parts import MOST_PARTS, Parts
from tmlc.kernels.triton.registry import Call, lowering
from tmlc.kernels.triton.row_conv import MOST_TAPS


@lowering("attention_linear_state")
def lower_attention_linear(call: Call) -> Lowered:
    scratch = Scratch()
    cols = call.operand("v").cols // int(call.attrs["num_kv_heads"]) * int(call.attrs["num_heads"])
    rows = call.bucket.rows((1, 0))
    heads = scratch.operand("f32", (1, 0), cols, rows)
    attention = replace(call, op="attention_state", outputs=(heads,))  # its norms and its table are among the arguments
    first, parts = attention_launches(attention, scratch)
    taps = call.optional("taps")
    few = parts is not None and parts.splits <= MOST_PARTS and call.optional("sink_logits") is None
    if few and rows == 1 and (taps is None or taps.shape[-1] <= MOST_TAPS):
        return scratch.lowered(*first, *_product(call, heads, scratch, parts))
    if parts is not None:
        first.append(combine_launch(attention, parts))
    return scratch.lowered(*first, *_product(call, heads, scratch))


def _product(call: Call, heads: Operand, scratch: Scratch, parts: Parts | None = None) -> tuple[Launch, ...]:
    """The product alone, of `heads` or, with `parts`, of what these add up to."""
    args = {name: call.optional(name) for name in ("weight", "bias", "taps", "tail", "addend")}
    apart = replace(
        call,
        op="linear_add" if args["taps"] is None else "linear_conv_state",
        args=args | {"x": heads, "scale": call.optional("factor")},
        attrs={name: call.attrs[name] for name in ("start", "residual", "level")},
    )
    if args["taps"] is None:
        return linear_launches(apart, parts)
    return linear_conv_launches(apart, scratch, parts)
