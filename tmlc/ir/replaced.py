"""Ops that no engine meets, and what takes their place: the same for every target; and ops that only Triton's has."""

REPLACED = {
    "attention": "it is stateless, state.insert makes it attention_state",
    "rope": "it is stateless, state.insert makes it rope_state",
    "short_conv": "it is stateless, state.insert makes it short_conv_state",
    "dynamic_conv": "it is stateless, state.insert makes it dynamic_conv_state",
    "dmel": "it is stateless, state.insert makes it dmel_state",
    "overlap_add": "it is stateless, state.insert makes it overlap_add_state",
    "shared_experts": "route.stack_experts joins it with moe",
}

#: Ops that only the Triton target runs, where each launch counts, and the pass of its pipeline that makes them.
TRITON_PASSES = {
    "element_steps": "fuse.steps",
    "linear_steps": "fuse.steps",
    "rms_norm_steps": "fuse.steps",
    "silu_add_rows": "fuse.flow_times",
    "rms_norm_pair": "fuse.norm_pair",
    "head_logits": "fuse.head_logits",
    "norm_router": "fuse.norm_router",
    "norm_topk_router": "fuse.norm_topk_router",
    "norm_moe_conv_state": "fuse.norm_moe",
    "norm_topk_moe": "fuse.norm_moe",
    "norm_linear": "fuse.norm_linear",
    "norm_linear_steps": "fuse.norm_linear",
    "norm_linear_swiglu": "fuse.norm_linear",
    "linear_swiglu": "fuse.swiglu",
    "norm_linear_conv_state": "fuse.norm_linear",
    "norm_attention_state": "fuse.norm_attention",
    "append_experts": "route.join_shared",
    "rope_table_state": "fuse.rope_attention",
    "rope_attention_state": "fuse.rope_attention",
    "attention_linear_state": "fuse.attention_linear",
    "linear_and_conv_state": "fuse.linear_and_conv",
    "modulated_linear": "fuse.norm_linear",
    "modulated_linear_steps": "fuse.norm_linear",
}
TRITON_ONLY = {op: f"only the Triton target runs it, leave out {name}" for op, name in TRITON_PASSES.items()}
