"""The transformer: sliding and global attention with learned relative bias, short convolutions, Mixture of Experts.

The architecture is Inkling's (transformers 5.24, `models/inkling`); the parameter names are those of its
`InklingForCausalLM.state_dict()`. Every tensor is [positions, features]; the graph holds canonical ops only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tmlc.ir.ops import functional as F

from .config import TextConfig
from .layers import Linear, RMSNorm, ShortConv


class RelativeBias(nn.Module):
    """The bank of bias-over-distance profiles of one layer, proj[d_rel, extent]."""

    def __init__(self, d_rel: int, extent: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(d_rel, extent))


class Attention(nn.Module):
    """Causal grouped-query attention without rotary embedding; queries and keys are RMS-normalised a head."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.heads(layer)
        sliding = config.is_sliding(layer)
        self.window = config.sliding_window_size if sliding else 0
        scaled = not sliding and config.log_scaling_n_floor is not None
        self.log_floor = float(config.log_scaling_n_floor or 0) if scaled else 0.0
        self.log_alpha = config.log_scaling_alpha if scaled else 0.0
        size, kv = config.hidden_size, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(size, self.num_heads * self.head_dim)
        self.k_proj = Linear(size, kv)
        self.v_proj = Linear(size, kv)
        self.r_proj = Linear(size, self.num_heads * config.d_rel)
        self.o_proj = Linear(self.num_heads * self.head_dim, size)
        self.k_sconv = ShortConv(kv, config.conv_kernel_size)
        self.v_sconv = ShortConv(kv, config.conv_kernel_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.rel_logits_proj = RelativeBias(config.d_rel, config.extent(layer))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_norm(self.q_proj(x))
        k = self.k_norm(self.k_sconv(self.k_proj(x)))
        v = self.v_sconv(self.v_proj(x))
        mixed = F.attention(
            q, k, v, self.r_proj(x), self.rel_logits_proj.proj, self.num_heads, self.num_kv_heads,
            1.0 / self.head_dim, self.window, 0, self.log_floor, self.log_alpha,
        )  # fmt: skip
        return self.o_proj(mixed)


class DenseMLP(nn.Module):
    """SwiGLU, times a learned scalar."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.global_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.scale_by(self.down_proj(F.swiglu(self.gate_proj(x), self.up_proj(x))), self.global_scale)


class Router(nn.Module):
    """Scores of the routed and the shared experts in one softmax (the shared ones act as a sink)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k, self.n_shared = config.num_experts_per_tok, config.n_shared_experts
        self.route_scale = config.route_scale
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts + self.n_shared, config.hidden_size))
        self.global_scale = nn.Parameter(torch.ones(1))
        # Inkling keeps the correction outside the gradient (it is balanced by counting), hence a buffer.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        bias = self.get_buffer("e_score_correction_bias")
        return F.sink_router(logits, bias, self.global_scale, self.top_k, self.n_shared, self.route_scale)


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj[E, 2f, d] (gate rows first), down_proj[E, d, f]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, inner, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.zeros(experts, size, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return F.moe(x, weights, experts, self.gate_up_proj, self.down_proj)


class SharedExperts(nn.Module):
    """The experts that every position uses: gate_proj, up_proj [S, f, d], down_proj [S, d, f]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        shared, inner, size = config.n_shared_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.zeros(shared, inner, size))
        self.up_proj = nn.Parameter(torch.zeros(shared, inner, size))
        self.down_proj = nn.Parameter(torch.zeros(shared, size, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return F.shared_experts(x, weights, self.gate_proj, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Top-k routed experts plus the shared ones, each weighted by the router."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k, self.total = config.num_experts_per_tok, config.num_experts_per_tok + config.n_shared_experts
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.gate(x)
        routed = self.experts(x, F.columns(weights, 0, self.top_k), F.columns(experts, 0, self.top_k))
        return F.add(routed, self.shared_experts(x, F.columns(weights, self.top_k, self.total)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and followed by a short convolution and the residual."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config) if config.mlp_layer_types[layer] == "sparse" else DenseMLP(config)
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.attn_sconv = ShortConv(size, config.conv_kernel_size)
        self.mlp_sconv = ShortConv(size, config.conv_kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.add(x, self.attn_sconv(self.self_attn(self.input_layernorm(x))))
        return F.add(x, self.mlp_sconv(self.mlp(self.post_attention_layernorm(x))))


class TokenEmbedding(nn.Module):
    """ids[n, 1] → rows of the table [V, d], RMS-normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_norm(F.embedding(self.weight, ids))


class Backbone(nn.Module):
    """Embedded positions x[n, d] → hidden states [n, d], after the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config)
        self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def unembed(hidden: Tensor, weight: Tensor, config: TextConfig) -> Tensor:
    """hidden[n, d] → logits [n, logits_size]: muP scaling, the head, a soft cap if the model has one, and the
    padding of the vocabulary, where the head has it, cut off."""
    logits = F.linear(F.scale(hidden, 1.0 / config.logits_mup_width_multiplier), weight)
    if config.logit_cap:
        logits = F.softcap(logits, config.logit_cap)
    if weight.shape[0] == config.logits_size:
        return logits
    return F.columns(logits, 0, config.logits_size)
