"""The looped text model of Inkling-2: some layers run several times, and each pass hears from the one before.

The architecture is that of `Inkling2LoopForCausalLM` (transformers 5.24, `models/inkling2_loop`). Layers
[loop_layer_index_start, loop_layer_index_end) run `loop_num_passes` times. Every pass starts from what came into the
first; from the second on each layer reads **messages**: mixes of the last pass's residual blocks, one for queries, one
for keys, one for values and one for the experts, that a gate lets into what these read. A pass has keys, values and
convolution states of its own; the weights are those of the other passes.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from tmlc.ir.ops import functional as F
from tmlc.model_zoo.interaction.config import MOST_LAYERS, TextConfig
from tmlc.model_zoo.interaction.layers import Linear, RMSNorm

from .text2 import DEFAULTS, Backbone2, BlockMix, DecoderLayer2, Text2Config, TokenModel2

#: What a layer's messages are for, in the order in which their queries are stacked here.
KINDS = ("q", "mlp", "k", "v")

_LOOP = {
    "core_start": "loop_layer_index_start", "core_end": "loop_layer_index_end", "num_passes": "loop_num_passes",
    "gate_rank": "loop_gate_rank",
}  # fmt: skip


class LoopConfig(Text2Config):
    """The fields of `Inkling2LoopTextConfig`."""

    loop_layer_index_start: int = Field(default=6, gt=0)
    loop_layer_index_end: int = Field(default=18, gt=0)
    loop_num_passes: int = Field(default=3, gt=0, le=MOST_LAYERS)
    loop_gate_rank: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _loop_fits(self) -> LoopConfig:
        block, start, end = self.n_layers_per_attn_res_block, self.loop_layer_index_start, self.loop_layer_index_end
        for name, layer in (("loop_layer_index_start", start), ("loop_layer_index_end", end)):
            if layer % block:
                raise ValueError(f"{name} is {layer}, inside a residual block of {block} layers")
        if not start < end <= self.num_hidden_layers:
            raise ValueError(f"the loop goes over layers {start}..{end - 1} of {self.num_hidden_layers}")
        visited = self.num_hidden_layers + (self.loop_num_passes - 1) * (end - start)
        if visited > MOST_LAYERS:  # passes are unrolled
            raise ValueError(f"{self.loop_num_passes} passes make {visited} layers, more than {MOST_LAYERS}")
        return self

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return DEFAULTS | {
            "hidden_size": 2304, "num_hidden_layers": 24, "num_attention_heads": 24, "swa_num_attention_heads": 24,
            "log_scaling_n_floor": 8192, "moe_intermediate_size": 1152, "n_routed_experts": 128,
        }  # fmt: skip

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> LoopConfig:
        """As `Text2Config.read`; the release keeps what concerns the loop in a section of its own, `loop_config`."""
        loop = raw.get("loop_config")
        given = {_LOOP[key]: value for key, value in loop.items() if key in _LOOP} if isinstance(loop, dict) else {}
        return super().read({**raw, **given}, where)


class MessageGate(nn.Module):
    """x and a message → (1 - forget)·x + let·message, both gates tanh of a narrow reading of the two."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        size, rank = config.hidden_size, config.loop_gate_rank
        self.norm = RMSNorm(size, config.rms_norm_eps)  # of ones: no checkpoint has it
        self.down_proj = Linear(2 * size, rank)
        self.forget_gate_proj, self.message_gate_proj = Linear(rank, size), Linear(rank, size)

    def forward(self, x: Tensor, message: Tensor) -> Tensor:
        narrow = self.down_proj(F.concat_columns(self.norm(x), self.norm(message)))
        forget, let = (F.softcap(gate(narrow), 1.0) for gate in (self.forget_gate_proj, self.message_gate_proj))
        return F.add_scaled(F.add(x, F.mul(let, message)), F.mul(forget, x), -1.0)


class LoopLayer(DecoderLayer2):
    """A layer of the loop."""

    def __init__(self, config: LoopConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.message_input = BlockMix(config.hidden_size, len(KINDS))
        for kind in KINDS:
            self.add_module(f"{kind}_message_gate", MessageGate(config))

    def forward(self, x: Tensor, blocks: Tensor | None, earlier: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of every layer; `earlier` are the residual blocks of the pass before, none in the first pass."""
        if earlier is None:
            return super().forward(x, blocks)
        messages = self.message_input(earlier)

        def turn(kind: str, mixed: Tensor) -> Tensor:
            at = KINDS.index(kind) * self.size
            return self.get_submodule(f"{kind}_message_gate")(mixed, F.columns(messages, at, at + self.size))

        return self._run(x, blocks, turn)


class LoopBackbone(Backbone2):
    """The layers, those of the loop as often as it has passes."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config)
        self.start, self.end, self.passes = (
            config.loop_layer_index_start, config.loop_layer_index_end, config.loop_num_passes
        )  # fmt: skip
        self.size = config.hidden_size
        for layer in range(self.start, self.end):
            self.layers[layer] = LoopLayer(config, layer)

    def _through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks: Tensor | None = None
        for layer in self.layers[: self.start]:
            x, blocks = layer(x, blocks)
        assert blocks is not None
        before, earlier = (x, blocks), None
        for _ in range(self.passes):
            x, blocks = before
            for layer in self.layers[self.start : self.end]:
                x, blocks = layer(x, blocks, earlier)
            # The first block that a pass adds is what it began with, the same in all.
            own = before[1].shape[1] + self.size
            earlier = x if blocks.shape[1] == own else F.concat_columns(F.columns(blocks, own, blocks.shape[1]), x)
        for layer in self.layers[self.end :]:
            x, blocks = layer(x, blocks)
        return x, blocks


class LoopModel(TokenModel2):
    """Text in, text out."""

    def _backbone(self, config: TextConfig) -> nn.Module:
        assert isinstance(config, LoopConfig)
        return LoopBackbone(config)
