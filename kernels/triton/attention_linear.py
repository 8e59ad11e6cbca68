"""attention_linear_state: attention, and the output projection that alone reads it. In a call of one row the product
adds up what the splits of the cache left; else the one op follows the other."""

from collections.abc import Callable
from dataclasses import replace

from tmlc.kernels.triton.attention import attention_launches, combine_launch
from tmlc.kernels.triton.conv import lower_linear_conv
from tmlc.kernels.triton.launch import KEPT, Lowered, Operand
from tmlc.kernels.triton.linear import lower_linear
from tmlc.kernels.triton.parts import MOST_PARTS
from tmlc.kernels.triton.registry import Call, lowering
from tmlc.kernels.triton.row_conv import MOST_TAPS


@lowering("attention_linear_state")
def lower_attention_linear(call: Call) -> Lowered:
    cols = call.operand("v").cols // int(call.attrs["num_kv_heads"]) * int(call.attrs["num_heads"])
    heads = Operand("scratch", "f32", (1, 0), cols, cols, name=KEPT)
    normed = call.optional("q_norm") is not None
    attention = replace(call, op="norm_attention_state" if normed else "attention_state", outputs=(heads,))
    product, taps = _product(call, heads), call.optional("taps")
    lower_product: Callable[..., Lowered] = lower_linear if taps is None else lower_linear_conv
    first, parts = attention_launches(attention)
    few = parts is not None and parts.splits <= MOST_PARTS and call.optional("sink_logits") is None
    if few and call.rows(heads) == 1 and (taps is None or taps.shape[-1] <= MOST_TAPS):
        return first.then(*lower_product(product, parts).launches)
    if parts is not None:
        first = first.then(combine_launch(attention, parts))
    kept = -(-call.rows(heads) * cols * 4 // 256) * 256
    first, second = first.behind(kept), lower_product(product).behind(kept)
    return Lowered((*first.launches, *second.launches), max(first.scratch_bytes, second.scratch_bytes))


def _product(call: Call, heads: Operand) -> Call:
    """The call of the product alone."""
    args = {name: call.optional(name) for name in ("weight", "bias", "taps", "tail", "addend")}
    return replace(
        call,
        op="linear_add" if args["taps"] is None else "linear_conv_state",
        args=args | {"x": heads, "scale": call.optional("factor")},
        attrs={name: call.attrs[name] for name in ("start", "residual", "level")},
    )
