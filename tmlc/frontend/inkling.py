"""The frontend of Inkling checkpoints: text only (`inkling_text`), or with audio and images (`inkling_mm_model`).

`save_pretrained` and the original release write the parts of an `inkling_mm_model` under the release's names, with the
gate and up rows of every feed-forward interleaved; the names of the modules in transformers are read just as well.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from tmlc.errors import CheckpointError
from tmlc.frontend.checkpoint import Checkpoint
from tmlc.frontend.model import Frontend, Stored, Traceable
from tmlc.model_zoo.inkling.config import InklingConfig, flat_processor, text_config
from tmlc.model_zoo.inkling.multimodal import InklingModel, audio_constants
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.modeling import TokenModel, token_model

#: Runtime defaults: such a checkpoint has none of its own.
CONTEXT, SINKS, MAX_APPEND = 4096, 16, 64
TICK_MS, VIDEO_EVERY = 200, 5
#: Multi-token-prediction layers are for speculative decoding; the engine does not use them.
_NOT_NEEDED = "model.mtp."
_RELEASE = "model.llm."
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")

# A parameter's name here → the original release's, first match wins. What no pattern changes keeps its name.
_RELEASE_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lm_head\.weight$", "model.llm.unembed.weight"),
        (r"^model\.embed_tokens\.weight$", "model.llm.embed.weight"),
        (r"^model\.embed_tokens\.embed_norm\.", "model.llm.embed_norm."),
        (r"^audio_tower\.embed_audio_tokens\.embed_audio_tokens\.", "model.audio.encoder."),
        (r"^audio_tower\.norm\.", "model.audio.final_norm."),
        (r"^vision_tower\.encoder_layers\.(\d+)\.projection\.", r"model.visual.layers.linear_\1."),
        (r"^vision_tower\.encoder_layers\.(\d+)\.layer_norm\.", r"model.visual.layers.norm_\1."),
        (r"^vision_tower\.", "model.visual."),
        (r"^model\.layers\.(\d+)\.self_attn\.q_proj\.", r"model.llm.layers.\1.attn.wq_du."),
        (r"^model\.layers\.(\d+)\.self_attn\.k_proj\.", r"model.llm.layers.\1.attn.wk_dv."),
        (r"^model\.layers\.(\d+)\.self_attn\.v_proj\.", r"model.llm.layers.\1.attn.wv_dv."),
        (r"^model\.layers\.(\d+)\.self_attn\.r_proj\.", r"model.llm.layers.\1.attn.wr_du."),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj\.", r"model.llm.layers.\1.attn.wo_ud."),
        (r"^model\.layers\.(\d+)\.self_attn\.([kv]_sconv)\.conv1d\.", r"model.llm.layers.\1.attn.\2."),
        (r"^model\.layers\.(\d+)\.self_attn\.", r"model.llm.layers.\1.attn."),
        (r"^model\.layers\.(\d+)\.(attn_sconv|mlp_sconv)\.conv1d\.", r"model.llm.layers.\1.\2."),
        (r"^model\.layers\.(\d+)\.input_layernorm\.", r"model.llm.layers.\1.attn_norm."),
        (r"^model\.layers\.(\d+)\.post_attention_layernorm\.", r"model.llm.layers.\1.mlp_norm."),
        (r"^model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias$", r"model.llm.layers.\1.mlp.gate.bias"),
        (r"^model\.layers\.(\d+)\.mlp\.(gate|up)_proj\.", r"model.llm.layers.\1.mlp.w13_dn."),
        (r"^model\.layers\.(\d+)\.mlp\.down_proj\.", r"model.llm.layers.\1.mlp.w2_md."),
        (r"^model\.(.*\.experts)\.gate_up_proj$", r"model.llm.\1.w13_weight"),
        (r"^model\.(.*\.experts)\.down_proj$", r"model.llm.\1.w2_weight"),
        (r"^model\.(.*\.shared_experts)\.(gate|up)_proj$", r"model.llm.\1.shared_w13_weight"),
        (r"^model\.(.*\.shared_experts)\.down_proj$", r"model.llm.\1.shared_w2_weight"),
        (r"^model\.", "model.llm."),
    )
]  # fmt: skip


def inkling_text(checkpoint: Checkpoint) -> Frontend:
    """The text model on the meta device: embed_text, decode, unembed, next_token.

    Raises:
        CheckpointError: config.json lacks fields or describes what the backbone does not have.
    """
    config = text_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    with torch.device("meta"):
        model = token_model(config)
    return _frontend(checkpoint, model, config, {}, {}, {})


def inkling_mm(checkpoint: Checkpoint) -> Frontend:
    """The model with its stems on the meta device: the methods of the text model, embed_audio and embed_video.

    Raises:
        CheckpointError: config.json or a processor file lacks fields or describes what the engine cannot do.
    """
    where = str(checkpoint.folder / "config.json")
    config = InklingConfig.read(checkpoint.config, flat_processor(_processor_files(checkpoint)), where)
    with torch.device("meta"):
        model = InklingModel(config)
    audio, vision = config.audio, config.vision
    tick = {
        "audio_in": max(1, round(TICK_MS * audio.sample_rate / 1000 / audio.hop_length)),
        "sample_rate": audio.sample_rate,
        "hop": audio.hop_length,
        "video_every": VIDEO_EVERY,
        "video_frames": vision.temporal_patch_size,
        "frame_height": vision.height,
        "frame_width": vision.width,
        "video_positions": vision.positions,
    }
    constants = audio_constants(config)
    release = any(name.startswith(_RELEASE) for name in checkpoint.tensors)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in constants}
    place = _release_place if release else _module_place
    stored = {name: place(name, shape) for name, shape in shapes.items()}
    return _frontend(checkpoint, model, config.text, tick, stored, constants)


def _frontend(
    checkpoint: Checkpoint,
    model: TokenModel,
    config: TextConfig,
    tick: dict[str, Any],
    stored: dict[str, Stored],
    constants: dict[str, torch.Tensor],
) -> Frontend:
    eos = config.eos_token_id
    skipped = [name for name in checkpoint.tensors if name.startswith(_NOT_NEEDED)]
    notes = [f"{len(skipped)} multi-token-prediction tensors ({_NOT_NEEDED}*) are not used"] if skipped else []
    return Frontend(
        kind="tokens",
        name=checkpoint.folder.resolve().name,
        model=model,
        methods={name: Traceable.of(method) for name, method in model.methods().items()},
        context={
            "limit": min(CONTEXT, config.max_position_embeddings),
            "policy": "ring_with_sinks",
            "sinks": SINKS,
            "max_append": MAX_APPEND,
        },
        tick={
            "duration_ms": TICK_MS,
            "text_out": 8,
            "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
            **tick,
        },
        ignore=lambda name: name.startswith(_NOT_NEEDED),
        stored=stored,
        constants=constants,
        notes=tuple(notes),
    )


def _processor_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The processor's files that the checkpoint has, by name."""
    found = {}
    for name in _PROCESSOR:
        path = checkpoint.folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}", where=str(path), fix="export it again") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{name} is not a JSON object", where=str(path), fix="export it again")
        found[name] = value
    return found


def _module_place(name: str, shape: tuple[int, ...]) -> Stored:
    """Where `InklingForConditionalGeneration.state_dict()` keeps a parameter."""
    if name.startswith("model."):
        return Stored(f"model.language_model.{name.removeprefix('model.')}", shape)
    return Stored(name if name.startswith("lm_head.") else f"model.{name}", shape)


def _release_place(name: str, shape: tuple[int, ...]) -> Stored:
    """Where the original release keeps a parameter: gate and up of a feed-forward share a tensor, row by row."""
    tensor = next((p.sub(new, name) for p, new in _RELEASE_NAMES if p.search(name)), name)
    if tensor.endswith("experts.w13_weight"):
        experts, rows, size = shape
        return Stored(tensor, shape, (
            ("reshape", {"shape": [experts, rows // 2, 2, size]}),
            ("transpose", {"axes": [0, 2, 1, 3]}),
            ("reshape", {"shape": list(shape)}),
        ))  # fmt: skip
    if "w13" in tensor:
        *before, rows, size = shape
        axis, half = len(before) + 1, int("up_proj" in name)
        return Stored(tensor, (*before, 2 * rows, size), (
            ("reshape", {"shape": [*before, rows, 2, size]}),
            ("slice", {"axis": axis, "start": half, "stop": half + 1}),
            ("reshape", {"shape": list(shape)}),
        ))  # fmt: skip
    return Stored(tensor, shape)
