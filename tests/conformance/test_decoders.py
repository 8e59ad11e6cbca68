"""The compiled CPU engine against the open decoders of transformers: logits, bits in any cut, greedy text, bfloat16.

Tiny random checkpoints, one a family by default: rotary positions of several kinds, windows that wrap, sink logits,
latent attention, groups of experts, head_dim 80, one expert, every expert. The sweep has more of each, and is longer.
"""

import copy
import random

import numpy as np
import pytest
import torch
import transformers

import tmlc

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
SPARSE = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=20)
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, moe_intermediate_size=20,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
CASES = {
    "Llama": dict(head_dim=80, num_key_value_heads=1, rope_parameters=LLAMA3),
    "Qwen3": dict(head_dim=12, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "Qwen3Moe": dict(head_dim=12, **SPARSE, norm_topk_prob=True, rope_parameters=YARN),
    "Olmoe": dict(num_experts=6, num_experts_per_tok=6),
    "Mixtral": dict(num_local_experts=6, num_experts_per_tok=3, sliding_window=13),
    "GptOss": dict(head_dim=80, num_local_experts=7, num_experts_per_tok=4, sliding_window=17),
    "DeepseekV3": LATENT,
}
SWEEP = [
    ("Llama", dict(attention_bias=True, mlp_bias=True, num_hidden_layers=1)),
    ("Llama", dict(rope_parameters=YARN, head_dim=10, num_key_value_heads=4)),
    ("Qwen3", dict(head_dim=12, attention_bias=True, hidden_size=32)),
    ("Qwen3Moe", dict(head_dim=12, **SPARSE, norm_topk_prob=False, mlp_only_layers=[0])),
    ("Qwen3Moe", dict(head_dim=10, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=24)),
    ("Olmoe", dict(num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, num_key_value_heads=4)),
    ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=5, head_dim=80, num_key_value_heads=1)),
    ("GptOss", dict(head_dim=12, num_local_experts=1, num_experts_per_tok=1, num_hidden_layers=1)),
    ("GptOss", dict(head_dim=10, num_local_experts=3, num_experts_per_tok=3, sliding_window=5)),
    ("DeepseekV3", LATENT | dict(q_lora_rank=None, v_head_dim=16, first_k_dense_replace=0, n_shared_experts=2)),
    ("DeepseekV3", LATENT | dict(qk_nope_head_dim=64, qk_rope_head_dim=16, v_head_dim=80, rope_interleave=False)),
    ("DeepseekV3", LATENT | dict(n_group=2, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)),
]


def random_model(family: str, settings: dict, seed: int = 3) -> torch.nn.Module:
    """A model with logits of unit scale, whose routers choose and whose biases and sinks act."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=83, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "bias" in name or "sinks" in name:
                tensor.uniform_(-0.5, 0.5)
            elif tensor.ndim >= 2:
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            else:
                tensor.uniform_(0.5, 1.5)
        for name, tensor in model.named_buffers():
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
        model.lm_head.weight /= model(torch.arange(40)[None]).logits.std()
    return model


def tokens(count: int) -> list[int]:
    return torch.randint(0, 83, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def logits_of(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def compiled(model, folder, precision="fp32"):
    model.save_pretrained(folder / "checkpoint")
    tmlc.compile(folder / "checkpoint", folder / "model.tmlc", precision=precision)
    return folder / "model.tmlc"


def append(engine, ids, sizes) -> np.ndarray:
    """Logits of `ids`, appended in parts of these sizes, over and over."""
    with engine.session() as session:
        at, parts = 0, []
        while at < len(ids):
            count = sizes[len(parts) % len(sizes)]
            parts.append(session.append(tokens=ids[at : at + count]))
            at += count
    return np.concatenate(parts)


def greedy(engine, prompt, count) -> list[int]:
    with engine.session() as session:
        logits, said = session.append(tokens=prompt), []
        for _ in range(count):
            said.append(int(logits[-1].argmax()))
            logits = session.append(tokens=said[-1:])
    return said


def compare(family, settings, folder, positions, words):
    model = random_model(family, settings)
    package, ids, draw = compiled(model, folder), tokens(positions), random.Random(family)
    expected = logits_of(model, ids)
    assert 0.5 < expected.std() < 2.0, "the bound of 1e-4 is meant for logits of unit scale"
    with tmlc.load(package, threads=1) as engine:
        whole = append(engine, ids, [positions])
        assert whole.shape == expected.shape and np.abs(whole - expected).max() <= 1e-4
        assert np.array_equal(append(engine, ids, [draw.randint(1, 23) for _ in range(9)]), whole)
        assert np.array_equal(append(engine, ids[:40], [1]), whole[:40])
        said = greedy(engine, ids[:9], words)
    for index in range(words):
        assert said[index] == int(logits_of(model, ids[:9] + said[:index])[-1].argmax()), index
    with tmlc.load(package, threads=2) as engine:
        assert np.array_equal(append(engine, ids, [17, 5]), whole)


@pytest.mark.parametrize("family", CASES)
def test_the_engine_equals_transformers(family, tmp_path):
    compare(family, CASES[family], tmp_path, 100, 8)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SWEEP)))
def test_the_engine_equals_transformers_over_300_positions(number, tmp_path):
    compare(*SWEEP[number], tmp_path, 300, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_bf16_errs_no_more_than_bf16_of_transformers_does(family, tmp_path):
    """Root mean square over all logits: the largest single error is that of a position whose routing tips over."""
    model, ids = random_model(family, CASES[family]), tokens(300)
    expected, theirs = logits_of(model, ids), logits_of(copy.deepcopy(model).bfloat16(), ids)
    with tmlc.load(compiled(model, tmp_path, "bf16"), threads=1) as engine:
        ours = append(engine, ids, [64])
    assert np.sqrt(np.mean((ours - expected) ** 2)) <= 1.5 * np.sqrt(np.mean((theirs - expected) ** 2))
