"""The lowering of each canonical op, and why the others have none."""

from tmlc.emit.tensorrt import lower_attention, lower_blocks, lower_dense, lower_media, lower_moe, lower_random
from tmlc.emit.tensorrt.network import Lower
from tmlc.ir.replaced import REPLACED, TRITON_ONLY

LOWERINGS: dict[str, Lower] = {
    **lower_dense.LOWERINGS,
    **lower_blocks.LOWERINGS,
    **lower_attention.LOWERINGS,
    **lower_moe.LOWERINGS,
    **lower_media.LOWERINGS,
    **lower_random.LOWERINGS,
}

# Ops that never reach an engine, and what takes their place.
REFUSED = REPLACED | TRITON_ONLY
