"""Ops that no engine meets, and what takes their place: the same for every target."""

REPLACED = {
    "attention": "it is stateless, state.insert makes it attention_state",
    "rope": "it is stateless, state.insert makes it rope_state",
    "short_conv": "it is stateless, state.insert makes it short_conv_state",
    "dynamic_conv": "it is stateless, state.insert makes it dynamic_conv_state",
    "dmel": "it is stateless, state.insert makes it dmel_state",
    "overlap_add": "it is stateless, state.insert makes it overlap_add_state",
    "shared_experts": "route.stack_experts joins it with moe",
}
