"""The compiled CPU engine against `InklingForCausalLM` of transformers: code that is not ours, weights shared.

Configs are random and small, with windows, extents and the log-scaling floor short enough that rings wrap and the
scaling acts. The bound is the issue's: logits within 1e-4 (max abs) in float32, on logits of unit scale.
"""

import numpy as np
import pytest
import torch
from transformers import InklingForCausalLM, InklingTextConfig

import tmlc

POSITIONS = 300
GREEDY, PROMPT = 64, 20
CONFIGS = {
    "grouped heads, two shared experts": dict(
        vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
        rel_extent=12, log_scaling_n_floor=10, local_layer_ids=[0, 2], intermediate_size=48, moe_intermediate_size=24,
        n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, dense_mlp_idx=1,
    ),
    "padded head, other head counts in sliding layers": dict(
        vocab_size=80, unpadded_vocab_size=71, hidden_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, swa_num_attention_heads=6, swa_num_key_value_heads=3, swa_head_dim=8,
        sliding_window_size=5, d_rel=3, rel_extent=33, log_scaling_n_floor=3, local_layer_ids=[1],
        intermediate_size=56, moe_intermediate_size=20, n_routed_experts=5, num_experts_per_tok=3, n_shared_experts=1,
        dense_mlp_idx=0,
    ),
    "every expert chosen, odd sizes": dict(
        vocab_size=33, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=10,
        swa_num_attention_heads=3, swa_num_key_value_heads=1, swa_head_dim=14, sliding_window_size=17, d_rel=5,
        rel_extent=7, log_scaling_n_floor=40, local_layer_ids=[0], intermediate_size=30, moe_intermediate_size=13,
        n_routed_experts=4, num_experts_per_tok=4, n_shared_experts=3, dense_mlp_idx=0, conv_kernel_size=3,
    ),
    "dense only, no log scaling": dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=16, d_rel=2,
        rel_extent=200, local_layer_ids=[0], intermediate_size=33, moe_intermediate_size=8, n_routed_experts=2,
        num_experts_per_tok=1, n_shared_experts=1, dense_mlp_idx=2,
    ),
    "one routed expert, everything global": dict(
        vocab_size=47, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=12,
        swa_num_attention_heads=4, swa_num_key_value_heads=1, swa_head_dim=12, sliding_window_size=4, d_rel=16,
        rel_extent=64, log_scaling_n_floor=1, local_layer_ids=[], intermediate_size=32, moe_intermediate_size=40,
        n_routed_experts=1, num_experts_per_tok=1, n_shared_experts=2, dense_mlp_idx=0, logits_mup_width_multiplier=4.0,
    ),
    "everything sliding": dict(
        vocab_size=47, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        swa_num_attention_heads=8, swa_num_key_value_heads=2, swa_head_dim=4, sliding_window_size=3, d_rel=1,
        rel_extent=9, log_scaling_n_floor=5, local_layer_ids=[0, 1, 2, 3], intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2, dense_mlp_idx=1,
    ),
}


def random_model(settings: dict, seed: int) -> InklingForCausalLM:
    """A model whose logits have unit scale and whose router really chooses: plain initialisation gives neither."""
    torch.manual_seed(seed)
    config = InklingTextConfig(**{"logits_mup_width_multiplier": 2.0, **settings})
    config._attn_implementation = "eager"
    model = InklingForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # the grouped kernel refuses odd sizes
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim >= 2:
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            elif "global_scale" not in name:
                tensor.uniform_(0.5, 1.5)
        for name, tensor in model.named_buffers():
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
        ids = torch.randint(0, 32, (1, 32))
        model.lm_head.weight /= model(ids).logits.std()
    return model


@pytest.fixture(params=sorted(CONFIGS))
def case(request, tmp_path):
    model = random_model(CONFIGS[request.param], seed=len(request.param))
    model.save_pretrained(tmp_path / "checkpoint")
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="fp32")
    ids = torch.randint(0, 32, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0].numpy()
        text = ids[:PROMPT]
        for _ in range(GREEDY):
            text = torch.cat([text, model(text[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return tmp_path / "model.tmlc", ids.tolist(), expected, text.tolist()


def test_the_engine_equals_transformers_whole_in_random_chunks_and_greedily(case):
    package, ids, expected, text = case
    assert 0.5 < expected.std() < 2.0, "the bound of 1e-4 is meant for logits of unit scale"
    with tmlc.load(package, threads=1) as engine:
        with engine.session() as session:
            whole = session.append(tokens=ids)
        assert whole.dtype == np.float32 and whole.shape == expected.shape
        assert np.abs(whole - expected).max() <= 1e-4
        with engine.session() as session:
            rng, at, parts = np.random.default_rng(0), 0, []
            while at < len(ids):
                size = int(rng.integers(1, 12))
                parts.append(session.append(tokens=ids[at : at + size]))
                at += size
        assert np.array_equal(np.concatenate(parts), whole), "the cut into appends changed bits"
        with engine.session() as session:
            said = text[:PROMPT]
            logits = session.append(tokens=said)
            while len(said) < len(text):
                said.append(int(logits[-1].argmax()))
                logits = session.append(tokens=said[-1:])
        assert said == text


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bf16_errs_no_more_than_bf16_of_transformers(name, tmp_path):
    """Root mean square over all logits: where one position routes otherwise, the largest error says nothing more."""
    model = random_model(CONFIGS[name], seed=len(name))
    model.save_pretrained(tmp_path / "checkpoint")
    tmlc.compile(tmp_path / "checkpoint", tmp_path / "model.tmlc", precision="bf16")
    narrow = InklingForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.randint(0, 32, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, theirs = (m(ids[None], use_cache=False).logits[0].float().numpy() for m in (model, narrow))
    with tmlc.load(tmp_path / "model.tmlc", threads=1) as engine, engine.session() as session:
        found = session.append(tokens=ids.tolist())
    ours, allowed = (float(np.sqrt(np.square(x - expected).mean())) for x in (found, theirs))
    assert 0 < ours <= 1.5 * allowed
