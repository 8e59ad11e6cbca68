"""Canonical ops: importing this package registers all of them as `torch.ops.tmlc.<name>` and in `OPS`.

Models call them through `tmlc.ir.ops.functional`.
"""

from tmlc.ir.ops import (
    attended,
    attention,
    blocks,
    dense,
    fused,
    heads,
    media,
    moe,
    normed,
    random,
    steps,
    topk,
    turned,
)
from tmlc.ir.ops.registry import OPS, OpSpec, spec_of

__all__ = [
    "OPS", "OpSpec", "attended", "attention", "blocks", "dense", "fused", "heads", "media", "moe", "normed", "random",
    "spec_of", "steps", "topk", "turned",
]  # fmt: skip
