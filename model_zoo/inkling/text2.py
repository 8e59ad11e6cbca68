"""Inkling-2's text model in canonical ops: attention over residual blocks, gated attention with computed sinks,
L2 clips, convolutions with computed taps, and soft caps.

The architecture is that of `Inkling2ForCausalLM` (transformers, `models/inkling2`); the parameter names are those that
it had in 5.23. Every tensor is [positions, features].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tmlc.errors import CheckpointError
from tmlc.ir.ops import functional as F
from tmlc.ir.ops.blocks import MAX_BLOCKS
from tmlc.model_zoo.interaction.backbone import Experts, RelativeBias, TokenEmbedding
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.layers import Linear, RMSNorm, ShortConv
from tmlc.model_zoo.interaction.modeling import TokenModel

from .config import build_section, check_layer_types

#: Of the norm of a residual block, which has no setting.
BLOCK_EPS = 1e-6

#: ("q", "k", "v" or "mlp", what that reads) → what it reads instead, before its norm.
Turn = Callable[[str, Tensor], Tensor]


class Text2Config(TextConfig):
    """The fields of `Inkling2TextConfig`; those of `TextConfig` that it has not are fixed."""

    qk_l2_clip_threshold: float = Field(default=22.627416997969522, gt=0)
    rel_l2_clip_threshold: float = Field(default=8.0, gt=0)
    n_layers_per_attn_res_block: int = Field(default=6, gt=0)
    mlp_gate_softcap: float = Field(default=4.0, gt=0)
    mlp_up_softcap: float = Field(default=25.0, gt=0)
    final_logit_softcapping: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _blocks_fit(self) -> Text2Config:
        blocks = -(-self.num_hidden_layers // self.n_layers_per_attn_res_block)
        if blocks >= MAX_BLOCKS:
            raise ValueError(f"{blocks} residual blocks; engines mix at most {MAX_BLOCKS - 1}")
        return self

    @property
    def logit_cap(self) -> float:
        return self.final_logit_softcapping

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What transformers takes for fields that are not there."""
        return DEFAULTS

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> Self:
        """From all of a config.json of the model type, with the aliases and defaults of transformers.

        Raises:
            CheckpointError: a field is wrong, or describes what this model has not.
        """
        for name, only in (("hidden_act", "silu"), ("scoring_func", "sigmoid")):
            if raw.get(name, only) != only:
                raise CheckpointError(f"{name} is {raw[name]!r}", where=f"{where}: {name}",
                                      fix=f"tmlc compiles Inkling-2 with {only} only")  # fmt: skip
        check_layer_types(raw, where)
        values = {**cls.defaults(), **{_ALIASES.get(key, key): v for key, v in raw.items() if v is not None}}
        layers = values["num_hidden_layers"]
        if isinstance(layers, int):
            usual = ["hybrid" if (i + 1) % 6 == 0 else "hybrid_sliding" for i in range(layers)]
            values["layer_types"] = values.get("layer_types", usual)
            values["mlp_layer_types"] = ["sparse"] * layers
        # Fields of the other family member that this one has not; nothing of this model reads them.
        values |= {"intermediate_size": 1, "n_shared_experts": 1, "logits_mup_width_multiplier": 1.0}
        return build_section(cls, {k: v for k, v in values.items() if k in cls.model_fields}, where)


DEFAULTS: dict[str, Any] = {
    "vocab_size": 201024, "unpadded_vocab_size": 200058, "hidden_size": 4608, "num_hidden_layers": 48,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "swa_num_attention_heads": 48,
    "swa_num_key_value_heads": 8, "swa_head_dim": 128, "sliding_window_size": 1024, "log_scaling_n_floor": 128000,
    "max_position_embeddings": 1048576, "moe_intermediate_size": 2304, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "eos_token_id": 200006,
}  # fmt: skip
_ALIASES = {
    "sliding_window": "sliding_window_size",
    "num_local_experts": "n_routed_experts",
    "sconv_kernel_size": "conv_kernel_size",
    "model_max_length": "max_position_embeddings",
    "intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "route_scale",
}


class BlockMix(nn.Module):
    """Residual blocks side by side [n, m·d] → for each query the blocks, normalised and weighed by likeness."""

    def __init__(self, size: int, queries: int = 1) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(size) if queries == 1 else torch.zeros(queries, size))

    def forward(self, blocks: Tensor) -> Tensor:
        return F.mix_blocks(blocks, self.query, BLOCK_EPS)


class L2Scale(nn.Module):
    """A learned scale of every column, before heads are shortened."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, columns))


class DynamicConv(nn.Module):
    """A short convolution whose taps are a learned part a column and a part a head computed from `source`."""

    def __init__(self, channels: int, size: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.static_weight = nn.Parameter(torch.zeros(kernel, channels))
        self.weight_proj = Linear(size, heads * kernel)
        self.level = 1.0 / math.sqrt(2 * kernel + 1)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return F.scale(F.dynamic_conv(x, self.static_weight, self.weight_proj(source)), self.level)


class LevelConv(ShortConv):
    """A short convolution with its residual, divided by the root of the number of terms."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, kernel)
        self.level = 1.0 / math.sqrt(kernel + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.scale(super().forward(x), self.level)


class Attention2(nn.Module):
    """Gated grouped-query attention; each position computes the sink logit of every head itself."""

    def __init__(self, config: Text2Config, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, head = config.heads(layer)
        self.sliding = config.is_sliding(layer)
        self.window = config.sliding_window_size if self.sliding else 0
        self.scale = head**-0.5
        self.log_floor = 0.0 if self.sliding else float(config.log_scaling_n_floor or 0)
        self.log_alpha = 0.0 if self.sliding else config.log_scaling_alpha
        self.clip, self.rel_clip = config.qk_l2_clip_threshold, config.rel_l2_clip_threshold
        size, wide, kv = config.hidden_size, self.num_heads * head, self.num_kv_heads * head
        self.q_proj, self.k_proj, self.v_proj = Linear(size, wide), Linear(size, kv), Linear(size, kv)
        self.r_proj = Linear(size, self.num_heads * config.d_rel)
        self.o_proj = Linear(wide, size)
        self.gate_proj = Linear(size, wide)
        self.sink_proj = Linear(size, self.num_heads)
        self.k_sconv, self.v_sconv = (self._conv(kv, size, config.conv_kernel_size) for _ in range(2))
        self.q_l2_clip, self.rel_l2_clip = L2Scale(wide), L2Scale(self.num_heads * config.d_rel)
        self.rel_logits_proj = RelativeBias(config.d_rel, config.extent(layer))
        self.v_norm = RMSNorm(head, config.rms_norm_eps)  # of ones: no checkpoint has it

    def _conv(self, channels: int, size: int, kernel: int) -> nn.Module:
        if self.sliding:
            return LevelConv(channels, kernel)
        return DynamicConv(channels, size, self.num_kv_heads, kernel)

    def forward(self, x: Tensor, for_keys: Tensor, for_values: Tensor) -> Tensor:
        q = F.l2_clip(self.q_proj(x), self.q_l2_clip.scale, self.num_heads, self.clip)
        k, v = self.k_proj(for_keys), self.v_proj(for_values)
        k, v = (self.k_sconv(k), self.v_sconv(v)) if self.sliding else (
            self.k_sconv(k, for_keys), self.v_sconv(v, for_values)
        )  # fmt: skip
        k = F.l2_clip(k, None, self.num_kv_heads, self.clip)
        rel = F.l2_clip(self.r_proj(x), self.rel_l2_clip.scale, self.num_heads, self.rel_clip)
        mixed = F.attention(
            q, k, self.v_norm(v), rel, self.rel_logits_proj.proj, self.num_heads, self.num_kv_heads, self.scale,
            self.window, 0, self.log_floor, self.log_alpha, self.sink_proj(x),
        )  # fmt: skip
        return self.o_proj(F.mul(mixed, F.sigmoid(self.gate_proj(x))))


class Router2(nn.Module):
    """Sigmoid scores; the chosen are weighed by their share of the scores chosen."""

    def __init__(self, config: Text2Config) -> None:
        super().__init__()
        self.top_k, self.route_scale = config.num_experts_per_tok, config.route_scale
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.get_buffer("e_score_correction_bias")
        return F.topk_router(F.linear(x, self.weight), bias, 1, self.top_k, True, 1, 1, self.route_scale)


class SoftcappedExperts(Experts):
    """Experts whose linear gate factor and whose `up` are bounded."""

    def __init__(self, config: Text2Config) -> None:
        super().__init__(config)
        self.caps = config.mlp_gate_softcap, config.mlp_up_softcap

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return F.moe(x, weights, experts, self.gate_up_proj, self.down_proj, None, None, 0.0, 0.0, *self.caps)


class MoE2(nn.Module):
    """The router and its experts; none is shared."""

    def __init__(self, config: Text2Config) -> None:
        super().__init__()
        self.gate = Router2(config)
        self.experts = SoftcappedExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x))


class DecoderLayer2(nn.Module):
    """One layer over (its input x, the residual blocks before it): the inputs of attention and of the experts are mixed
    from the blocks. At a block boundary the residual starts anew, and x becomes a block."""

    def __init__(self, config: Text2Config, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.size, self.first, self.sliding = size, layer == 0, config.is_sliding(layer)
        self.boundary = layer % config.n_layers_per_attn_res_block == 0
        if not self.first:
            self.attention_input = BlockMix(size, 1 if self.sliding else 3)
        self.mlp_input = BlockMix(size)
        self.self_attn = Attention2(config, layer)
        self.mlp = MoE2(config)
        if self.sliding:
            self.input_layernorm = RMSNorm(size, eps)
        else:
            self.q_input_layernorm, self.k_input_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
            self.v_input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.post_attention_convolution = LevelConv(size, config.conv_kernel_size)
        self.post_mlp_convolution = LevelConv(size, config.conv_kernel_size)

    def forward(self, x: Tensor, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(x, blocks, lambda kind, mixed: mixed)

    def _run(self, x: Tensor, blocks: Tensor | None, turn: Turn) -> tuple[Tensor, Tensor]:
        mixed = [turn(kind, source) for kind, source in zip("qkv", self._sources(x, blocks), strict=True)]
        attended = self.post_attention_convolution(self.self_attn(*self._normed(mixed)))
        if self.boundary:
            blocks, residual = x if blocks is None else F.concat_columns(blocks, x), attended
        else:
            residual = F.add(x, attended)
        assert blocks is not None  # the first layer is a boundary
        h = turn("mlp", self.mlp_input(F.concat_columns(blocks, residual)))
        return F.add(residual, self.post_mlp_convolution(self.mlp(self.post_attention_layernorm(h)))), blocks

    def _sources(self, x: Tensor, blocks: Tensor | None) -> list[Tensor]:
        """What queries, keys and values are made of, before its norm."""
        mixed = x if blocks is None else self.attention_input(F.concat_columns(blocks, x))
        if self.sliding or blocks is None:
            return [mixed] * 3
        return [F.columns(mixed, i * self.size, (i + 1) * self.size) for i in range(3)]

    def _normed(self, mixed: list[Tensor]) -> list[Tensor]:
        if not self.sliding:
            norms = (self.q_input_layernorm, self.k_input_layernorm, self.v_input_layernorm)
            return [norm(one) for norm, one in zip(norms, mixed, strict=True)]
        if all(one is mixed[0] for one in mixed):
            return [self.input_layernorm(mixed[0])] * 3
        return [self.input_layernorm(one) for one in mixed]


class Backbone2(nn.Module):
    """The embedding, the layers, and the mix of all blocks that the final norm reads."""

    def __init__(self, config: Text2Config) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config)
        self.layers = nn.ModuleList([DecoderLayer2(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_input = BlockMix(config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Embedded positions x[n, d] → hidden states [n, d]."""
        x, blocks = self._through(x)
        return self.norm(self.final_input(F.concat_columns(blocks, x)))

    def _through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Through all layers: what the last one gives, and the residual blocks before it."""
        blocks: Tensor | None = None
        for layer in self.layers:
            x, blocks = layer(x, blocks)
        assert blocks is not None
        return x, blocks


class TokenModel2(TokenModel):
    """Text in, text out, under the names that `Inkling2ForCausalLM` had in transformers 5.23. The head has no rows for
    the vocabulary's padding."""

    def __init__(self, config: Text2Config) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.hidden_size, config.logits_size)

    def _backbone(self, config: TextConfig) -> nn.Module:
        assert isinstance(config, Text2Config)
        return Backbone2(config)

    def _decode(self) -> nn.Module:
        return self.model
