"""The lowering of each canonical op, and why the others have none."""

from tmlc.emit.tensorrt import lower_attention, lower_blocks, lower_dense, lower_media, lower_moe, lower_random
from tmlc.emit.tensorrt.network import Lower

LOWERINGS: dict[str, Lower] = {
    **lower_dense.LOWERINGS,
    **lower_blocks.LOWERINGS,
    **lower_attention.LOWERINGS,
    **lower_moe.LOWERINGS,
    **lower_media.LOWERINGS,
    **lower_random.LOWERINGS,
}

# Ops that never reach an engine, and what takes their place.
REFUSED = {
    "attention": "it is stateless, state.insert makes it attention_state",
    "rope": "it is stateless, state.insert makes it rope_state",
    "short_conv": "it is stateless, state.insert makes it short_conv_state",
    "dynamic_conv": "it is stateless, state.insert makes it dynamic_conv_state",
    "dmel": "it is stateless, state.insert makes it dmel_state",
    "overlap_add": "it is stateless, state.insert makes it overlap_add_state",
    "shared_experts": "route.stack_experts joins it with moe",
}
