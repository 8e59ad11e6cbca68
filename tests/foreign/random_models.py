"""Random small models of the foreign families, of sizes that make an engine's life hard or of small ones.

A config is drawn from (family, seed); the seed also walks through the variants of rotary positions, windows, head
counts, biases and tied embeddings, so that a few seeds see each of them.
"""

import random
from typing import Any

import torch
import transformers

CLASSES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "gpt_oss": "GptOss",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "phi3": "Phi3",
}
HEADS = [(4, 2), (3, 3), (6, 2), (4, 1), (1, 1), (5, 5)]
WIDTHS = [10, 8, 16, 6, 80, 12]
ROPE = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 40},
    {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    {"rope_type": "yarn", "rope_theta": 300.0, "factor": 16.0, "original_max_position_embeddings": 64,
     "attention_factor": 1.5},
    {"rope_type": "default", "rope_theta": 50.0},
]  # fmt: skip


def settings(family: str, seed: int) -> dict[str, Any]:
    """The config of (family, seed)."""
    draw, at = random.Random(f"{family} {seed}"), seed % 6
    heads, kv = HEADS[at]
    width = WIDTHS[(at + len(family)) % 6]
    made: dict[str, Any] = dict(
        vocab_size=draw.choice([67, 80, 101, 33]), hidden_size=draw.choice([24, 33, 40, 52]),
        num_hidden_layers=1 if at == 3 else 2, num_attention_heads=heads, num_key_value_heads=kv, head_dim=width,
        intermediate_size=draw.choice([40, 33, 27]), max_position_embeddings=512, tie_word_embeddings=at in (1, 4),
        rms_norm_eps=10.0 ** -draw.choice([5, 6]), rope_parameters=dict(ROPE[at]), bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    experts = [5, 3, 1, 8, 6, 4][at]
    top_k = [2, 3, 1, 3, 1, 4][at]
    sparse = dict(num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=draw.choice([12, 7, 17]))
    grouped = dict(
        n_routed_experts=[8, 6, 4, 9, 6, 8][at], n_group=[4, 1, 2, 3, 2, 1][at], topk_group=[2, 1, 1, 2, 2, 1][at],
        num_experts_per_tok=[3, 2, 1, 4, 6, 8][at], moe_intermediate_size=draw.choice([12, 7, 17]),
        n_shared_experts=draw.choice([1, 2]), first_k_dense_replace=min(at, 1), norm_topk_prob=at != 2,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
    )  # fmt: skip
    if family in ("olmoe", "qwen2", "phi3"):  # their heads share the hidden size
        made["hidden_size"] = heads * made.pop("head_dim")
    if family == "llama":
        made["hidden_size"] = heads * draw.choice([7, 8, 13])
    if family == "llama":
        made |= dict(attention_bias=at % 2 == 0, mlp_bias=at == 2)
    elif family in ("qwen3", "qwen3_moe"):
        made |= dict(attention_bias=at == 1)
        if at in (0, 2, 5):
            made |= dict(use_sliding_window=True, sliding_window=[7, 0, 20, 0, 0, 3][at], max_window_layers=1)
    elif family in ("mixtral", "mistral", "phi3"):
        made["sliding_window"] = [9, None, 17, 1, None, 4][at]
    if family == "qwen3_moe":
        made |= sparse | dict(norm_topk_prob=at % 2 == 0, decoder_sparse_step=1 + (at == 1))
    elif family == "olmoe":
        made |= dict(num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=at % 2 == 1)
        made |= dict(attention_bias=at == 2, clip_qkv=[None, None, 0.7, None, None, 1.1][at])
    elif family == "mixtral":
        made |= dict(num_local_experts=experts, num_experts_per_tok=top_k)
    elif family == "gpt_oss":
        made |= dict(num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=[9, 5, 17, 4, 6, 1][at])
    elif family == "deepseek_v3":
        del made["head_dim"]
        made |= grouped | dict(
            num_key_value_heads=heads, q_lora_rank=[12, None, 9, 7, None, 16][at],
            kv_lora_rank=draw.choice([10, 7, 16]), qk_nope_head_dim=draw.choice([8, 5]),
            qk_rope_head_dim=draw.choice([6, 8, 2]),
            v_head_dim=draw.choice([10, 7, 16]), rope_interleave=at != 3, attention_bias=at == 4,
        )  # fmt: skip
        if made["rope_parameters"]["rope_type"] == "yarn":
            made["rope_parameters"] |= dict(mscale=1.0, mscale_all_dim=0.8)
    elif family == "glm4_moe":
        made |= grouped | dict(use_qk_norm=at % 2 == 0, attention_bias=at == 1)
        made["rope_parameters"]["partial_rotary_factor"] = 0.5 if width % 4 == 0 else 1.0
    elif family == "phi3":
        made["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
        made["rope_parameters"]["partial_rotary_factor"] = 0.5 if width % 4 == 0 else 1.0
    return made


#: What engines are tuned for, and what lies between: columns of a head, (query heads of a key head, key heads) and
#: experts.
COLUMNS = [16, 24, 48, 80, 96, 128, 256, 18]
GROUPS = [(1, 3), (3, 2), (5, 1), (7, 1), (16, 1), (32, 1), (2, 3)]
EXPERTS = [3, 17, 5, 33, 64, 129, 160]


def odd_sizes(family: str, seed: int) -> dict[str, Any]:
    """Changes to `settings(family, seed)`: heads of many shapes, up to 160 experts of which up to 12 are chosen, hidden
    sizes that are no multiple of anything, latent attention whose values are wider than its keys or narrower."""
    draw, made = random.Random(f"odd {family} {seed}"), settings(family, seed)
    at = seed + list(CLASSES).index(family)
    columns, (group, kv) = COLUMNS[at % len(COLUMNS)], GROUPS[at % len(GROUPS)]
    heads = group * kv
    shared = family in ("olmoe", "qwen2", "phi3")
    if columns * heads > (640 if shared else 1600):
        columns = draw.choice([16, 24, 18])
    odd: dict[str, Any] = dict(
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=draw.choice([67, 101, 129, 257]),
        hidden_size=draw.choice([40, 72, 130, 36, 96, 257]), intermediate_size=draw.choice([33, 40, 96, 130]),
        tie_word_embeddings=seed % 2 == 0,
        num_hidden_layers=2 if family in ("qwen3", "gpt_oss", "deepseek_v3", "glm4_moe") else 1,
    )  # fmt: skip
    if shared:
        odd["hidden_size"] = heads * columns
    elif family == "deepseek_v3":
        odd |= dict(
            num_key_value_heads=heads, q_lora_rank=draw.choice([12, None, 33]), kv_lora_rank=draw.choice([10, 16, 40]),
            qk_nope_head_dim=draw.choice([8, 5, 24, 64]), qk_rope_head_dim=draw.choice([6, 8, 16, 64]),
            v_head_dim=draw.choice([7, 10, 48, 128, 200]),
        )  # fmt: skip
    else:
        odd["head_dim"] = columns
    if family == "llama":
        odd["hidden_size"] = heads * draw.choice([6, 10])
    if "partial_rotary_factor" in made["rope_parameters"]:
        half = 0.5 if columns % 4 == 0 else 1.0
        odd["rope_parameters"] = made["rope_parameters"] | dict(partial_rotary_factor=half)
    experts = EXPERTS[at % len(EXPERTS)]
    top_k = min(experts, draw.choice([1, 2, 4, 6, 9, 12]))
    for name in ("num_experts", "num_local_experts"):
        if name in made:
            odd |= {name: experts, "num_experts_per_tok": top_k}
    if "n_routed_experts" in made:
        groups, size = [(1, 8), (4, 4), (8, 20), (3, 5), (1, 33), (16, 8)][at % 6]
        taken = draw.choice([1, min(2, groups), groups])
        odd |= dict(
            n_routed_experts=groups * size, n_group=groups, topk_group=taken, n_shared_experts=draw.choice([1, 2, 3]),
            num_experts_per_tok=min(taken * size, draw.choice([1, 3, 6, 8, 12])), first_k_dense_replace=seed % 2,
        )  # fmt: skip
    if "moe_intermediate_size" in made:
        odd["moe_intermediate_size"] = draw.choice([7, 12, 33, 40, 130])
    return odd


def random_model(family: str, seed: int, **changes: Any) -> torch.nn.Module:
    """A model with logits of unit scale, whose routers choose and whose sinks and biases act."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(**(settings(family, seed) | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim >= 2 and "bias" not in name:
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            elif "norm" in name and "bias" not in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 0.5)
        for name, tensor in model.named_buffers():
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
        scale = float(model(torch.arange(30)[None]).logits.std())
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        if head is table:  # a tied head: the last norm has to take the factor
            model.base_model.norm.weight /= scale
        else:
            head /= scale
    return model
