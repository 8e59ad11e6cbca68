"""The backbone computes what transformers' Inkling computes, on random tiny models with shared weights."""

import pytest
import torch
from transformers import InklingForCausalLM, InklingTextConfig

from tmlc.errors import CheckpointError
from tmlc.model_zoo.interaction import InteractionConfig, InteractionModel, TextConfig, token_model

TINY = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 6, "d_rel": 4, "rel_extent": 9, "conv_kernel_size": 4, "intermediate_size": 48,
    "moe_intermediate_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "logits_mup_width_multiplier": 4.0, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "mlp_layer_types": ["dense", "sparse", "sparse"], "pad_token_id": 0,
}  # fmt: skip

VARIANTS = {
    "plain": {},
    "log scaling acts": {"log_scaling_n_floor": 5, "log_scaling_alpha": 0.4},
    "padded vocabulary": {"unpadded_vocab_size": 41},
    "sliding layers have other heads": {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 3, "swa_head_dim": 4},
    "all global": {"layer_types": ["hybrid"] * 3},
    "one expert of each kind": {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 1},
    "all experts chosen": {"num_experts_per_tok": 6},
    "odd widths": {"head_dim": 10, "d_rel": 3, "conv_kernel_size": 3, "route_scale": 1.5, "vocab_size": 37},
    "one head group": {"num_key_value_heads": 1, "swa_num_key_value_heads": 1},
}


def reference(changes: dict, seed: int = 0) -> InklingForCausalLM:
    """A transformers model whose every tensor (norms, gates, correction bias too) is random."""
    config = InklingTextConfig(**{**TINY, **changes}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = InklingForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            one = "norm" in name or "global_scale" in name
            tensor.copy_(torch.randn_like(tensor) * 0.3 + (1.0 if one else 0.0))
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_equal_transformers(changes: dict) -> None:
    theirs = reference(changes)
    ours = token_model(TextConfig.from_inkling(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, TINY["vocab_size"] - 12, (29, 1), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids.T).logits[0]
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_methods_compose_to_the_whole_model() -> None:
    theirs = reference({})
    ours = token_model(TextConfig.from_inkling(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    methods = ours.methods()
    (ids,) = methods["embed_text"].example_inputs(12)
    hidden = methods["decode"].module(methods["embed_text"].module(ids))
    logits = methods["unembed"].module(hidden)
    assert torch.equal(logits, ours(ids))
    _, key, temperature = methods["next_token"].example_inputs(12)
    chosen = methods["next_token"].module(hidden, key, temperature)
    assert torch.equal(chosen[:, 0], logits.argmax(1))


def test_layer_patterns_follow_from_the_short_forms_of_inkling_configs() -> None:
    raw = {"num_hidden_layers": 13, "dense_mlp_idx": 2, "intermediate_size": 64, "dense_intermediate_size": 512,
           "sliding_window": 33, "sconv_kernel_size": 5}  # fmt: skip
    config = TextConfig.from_inkling(raw)
    assert [i for i in range(13) if not config.is_sliding(i)] == [5, 11]
    assert config.mlp_layer_types == ["dense"] * 2 + ["sparse"] * 11
    assert (config.moe_intermediate_size, config.intermediate_size) == (64, 512)
    assert (config.sliding_window_size, config.conv_kernel_size) == (33, 5)
    theirs = InklingTextConfig(num_hidden_layers=13, dense_mlp_idx=2)
    assert config.layer_types == theirs.layer_types
    assert TextConfig.from_inkling({**raw, "local_layer_ids": [0, 2]}).layer_types[:4] == [
        "hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"]  # fmt: skip


def test_an_inkling_config_that_the_backbone_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="hidden_act"):
        TextConfig.from_inkling({"hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match="multiple"):
        TextConfig.from_inkling({"num_key_value_heads": 7})


def test_a_random_nano_spreads_its_positions_over_the_experts() -> None:
    model = InteractionModel.random(InteractionConfig.from_preset("nano"), seed=0)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[1][:, : module.top_k]))
    ids = torch.tensor(list(b"one two three four five six seven"))[:, None]
    with torch.no_grad():
        model(ids)
    touched = [len(experts[start : start + 16].unique()) for experts in chosen for start in (0, 16)]
    assert min(touched) >= 12, touched
