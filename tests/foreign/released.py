"""The sizes of released models of the foreign families, as their config.json has them: facts of others, and no weights.

python tests/foreign/released.py DIR     # DIR/qwen3-30b-a3b/config.json and the others, for gpu_plan and `tmlc plan`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
OSS_ROPE = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False}  # fmt: skip
DEEPSEEK_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                 "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}  # fmt: skip


def plain(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def sizes(
    model_type: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int, context: int,
    rope: dict[str, Any], **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return dict(
        model_type=model_type, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=context,
        rope_parameters=rope, **more,
    )  # fmt: skip


MODELS = {
    "qwen3-0.6b": sizes("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, plain(1e6), head_dim=128,
                        tie_word_embeddings=True),
    "qwen3-8b": sizes("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, plain(1e6), head_dim=128),
    "qwen3-30b-a3b": sizes("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, plain(1e6), head_dim=128,
                           moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "qwen3-235b-a22b": sizes("qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 40960, plain(1e6), head_dim=128,
                             moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "qwen2.5-7b": sizes("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, plain(1e6)),
    "llama-3.1-8b": sizes("llama", 128256, 4096, 14336, 32, 32, 8, 131072, LLAMA_ROPE),
    "llama-3.2-1b": sizes("llama", 128256, 2048, 8192, 16, 32, 8, 131072, LLAMA_ROPE | {"factor": 32.0}, head_dim=64,
                          tie_word_embeddings=True),
    "mistral-7b": sizes("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, plain(1e4), sliding_window=4096),
    "mixtral-8x7b": sizes("mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, plain(1e6), num_local_experts=8,
                          num_experts_per_tok=2, sliding_window=None),
    "olmoe-1b-7b": sizes("olmoe", 50304, 2048, 1024, 16, 16, 16, 4096, plain(1e4), num_experts=64,
                         num_experts_per_tok=8, norm_topk_prob=False),
    "phi-3-mini": sizes("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, plain(1e4), sliding_window=2047, pad_token_id=0),
    "gpt-oss-20b": sizes("gpt_oss", 201088, 2880, 2880, 24, 64, 8, 131072, OSS_ROPE, head_dim=64, num_local_experts=32,
                         num_experts_per_tok=4, sliding_window=128),
    "gpt-oss-120b": sizes("gpt_oss", 201088, 2880, 2880, 36, 64, 8, 131072, OSS_ROPE, head_dim=64,
                          num_local_experts=128, num_experts_per_tok=4, sliding_window=128),
    "glm-4.5-air": sizes("glm4_moe", 151552, 4096, 10944, 46, 96, 8, 131072, plain(1e6, partial_rotary_factor=0.5),
                         head_dim=128, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8,
                         n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, norm_topk_prob=True,
                         routed_scaling_factor=1.0, use_qk_norm=False, attention_bias=True),
    "moonlight-16b-a3b": sizes("deepseek_v3", 163840, 2048, 11264, 27, 16, 16, 8192, plain(5e4), q_lora_rank=None,
                               kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                               moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6,
                               n_shared_experts=2, n_group=1, topk_group=1, first_k_dense_replace=1,
                               norm_topk_prob=True, routed_scaling_factor=2.446),
    "deepseek-v3": sizes("deepseek_v3", 129280, 7168, 18432, 61, 128, 128, 163840, DEEPSEEK_ROPE, q_lora_rank=1536,
                         kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                         moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1,
                         n_group=8, topk_group=4, first_k_dense_replace=3, norm_topk_prob=True,
                         routed_scaling_factor=2.5),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """`folder`/`name` with the config.json of a released model; returns it."""
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "config.json").write_text(json.dumps(MODELS[name], indent=1) + "\n", "utf-8")
    return made


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR, a folder for the config.json of {', '.join(MODELS)}")
    for name in MODELS:
        print(write(name, Path(sys.argv[1])))


if __name__ == "__main__":
    main()
