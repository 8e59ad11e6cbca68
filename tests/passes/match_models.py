"""Small random checkpoints, one of each model family: what tests/passes/match_counts.yaml counts the matches of.

Two layers each, a dense and a sparse one where a family has both. What a family has (shared experts, sinks, windows,
queries of low rank, norms of queries and keys) is switched on.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint

_DECODER = dict(
    vocab_size=67, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=28, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_SPARSE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
_LOCAL = dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=9)
_GROUPED = dict(
    n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=12, n_shared_experts=1,
    first_k_dense_replace=1,
)  # fmt: skip
_INKLING = dict(
    vocab_size=67, unpadded_vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
    sliding_window_size=8, d_rel=4, rel_extent=12, log_scaling_n_floor=10, layer_types=["hybrid_sliding", "hybrid"],
    moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2,
)  # fmt: skip
_INKLING_1 = _INKLING | dict(
    mlp_layer_types=["dense", "sparse"], intermediate_size=40, n_shared_experts=2, logits_mup_width_multiplier=2.0
)
#: model_type → (class of transformers without `ForCausalLM`, settings).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3_moe": ("Qwen3Moe", _SPARSE | {"head_dim": 10}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", _LOCAL),
    "gpt_oss": ("GptOss", _LOCAL | {"head_dim": 10}),
    "deepseek_v3": (
        "DeepseekV3",
        _GROUPED
        | dict(num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
               v_head_dim=8),
    ),
    "glm4_moe": ("Glm4Moe", _GROUPED | {"head_dim": 8, "use_qk_norm": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "phi3": ("Phi3", {}),
}  # fmt: skip
_INTERACTION = {
    "model_type": "tmlc_interaction",
    "name": "tiny",
    "text_config": _INKLING_1 | dict(vocab_size=288, unpadded_vocab_size=272, eos_token_id=258),
    "audio_config": {},
    "vision_config": dict(patch_size=8, temporal_patch_size=2, num_hidden_layers=2, height=16, width=24),
    "speech_config": dict(
        flow_width=40, flow_layers=1, flow_steps=2, vocoder_width=24, vocoder_layers=1, vocoder_kernel=5,
        vocoder_window=600,
    ),
    "tick_config": dict(video_every=2, text_in=2, text_out=3, silence_token_id=259, end_of_tick_token_id=260),
    "runtime_config": dict(context=96, context_policy="ring_with_sinks", sinks=16, max_append=24),
}  # fmt: skip


def write_checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of the family, always the same one."""
    if family == "interaction":
        create_checkpoint(InteractionConfig.from_dict(_INTERACTION), seed=0, out_dir=folder)
        return folder
    if family == "inkling_mm":
        config = dict(
            text_config=_INKLING_1, audio_config=dict(n_mel_bins=12, mel_vocab_size=16),
            vision_config=dict(patch_size=8, temporal_patch_size=2, num_hidden_layers=2),
            audio_token_id=60, image_token_id=59, audio_bos_token_id=1, image_bos_token_id=2,
        )  # fmt: skip
        _save("InklingConfig", "InklingForConditionalGeneration", config, folder)
        (folder / "processor_config.json").write_text(json.dumps(dict(
            feature_extractor=dict(feature_size=12, sampling_rate=16000, audio_token_duration_s=0.05),
            image_processor=dict(size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.2] * 3),
            num_dmel_bins=16, frame_size={"height": 16, "width": 24},
        )))  # fmt: skip
    elif family == "inkling_text":
        _save("InklingTextConfig", "InklingForCausalLM", _INKLING_1, folder)
    elif family == "inkling2_text":
        settings = _INKLING | dict(n_layers_per_attn_res_block=1, eos_token_id=None)
        _save("Inkling2TextConfig", "Inkling2ForCausalLM", settings, folder)
    elif family == "inkling2_loop_text":
        settings = _INKLING | dict(n_layers_per_attn_res_block=1, eos_token_id=None)
        settings |= dict(loop_layer_index_start=1, loop_layer_index_end=2, loop_num_passes=3, loop_gate_rank=8)
        _save("Inkling2LoopTextConfig", "Inkling2LoopForCausalLM", settings, folder)
    else:
        name, settings = DECODERS[family]
        _save(f"{name}Config", f"{name}ForCausalLM", _DECODER | settings, folder)
    return folder


def _save(config: str, model: str, settings: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    saved = getattr(transformers, model)(made)
    with torch.no_grad():
        for tensor in saved.parameters():
            tensor.normal_(0, 0.1)  # some are left empty by transformers, and codes are not made of what is not finite
    saved.save_pretrained(folder)
