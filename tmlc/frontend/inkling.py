"""The frontend of Inkling checkpoints: text only (`inkling_text`), or with audio and images (`inkling_mm_model`); and
of Inkling-2's text models, with a loop (`inkling2_loop_text`) or without.

`save_pretrained` and the original release write the parts of an `inkling_mm_model` under the release's names, with the
gate and up rows of every feed-forward interleaved; the names of the modules in transformers are read just as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from tmlc.errors import CheckpointError
from tmlc.frontend.checkpoint import Checkpoint
from tmlc.frontend.inkling_names import (
    is_release,
    message_place,
    module_place,
    norm_place,
    release_place,
    text2_place,
)
from tmlc.frontend.model import Frontend, Stored, Traceable
from tmlc.model_zoo.inkling.config import InklingConfig, flat_processor, text_config
from tmlc.model_zoo.inkling.loop import LoopConfig, LoopModel
from tmlc.model_zoo.inkling.multimodal import InklingModel, audio_constants
from tmlc.model_zoo.inkling.text2 import Text2Config, TokenModel2
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.modeling import TokenModel, token_model

#: Runtime defaults: such a checkpoint has none of its own.
CONTEXT, SINKS, MAX_APPEND = 4096, 16, 64
TICK_MS, VIDEO_EVERY = 200, 5
#: Multi-token-prediction layers are for speculative decoding; the engine does not use them.
_NOT_NEEDED = "model.mtp."
#: The vision tower of Inkling-2, by the release's names and by those of the module.
_VISION = ("model.visual.", "model.vision_tower.")
_EMBED_NORM = "model.embed_tokens.embed_norm.weight"
#: Norms without a weight.
_ONES = (".v_norm.weight", "_message_gate.norm.weight")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")

def inkling_text(checkpoint: Checkpoint) -> Frontend:
    """The text model on the meta device: embed_text, decode, unembed, next_token.

    Raises:
        CheckpointError: config.json lacks fields or describes what the backbone does not have.
    """
    config = text_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    with torch.device("meta"):
        model = token_model(config)
    norm = norm_place(Stored(_EMBED_NORM, (config.hidden_size,)), checkpoint.tensors)
    stored = {_EMBED_NORM: norm} if norm.tensor != _EMBED_NORM else {}
    return _frontend(checkpoint, model, config, {}, stored, {})


def inkling2_text(checkpoint: Checkpoint) -> Frontend:
    """Inkling-2's text model on the meta device, with the methods of `inkling_text`. Of a checkpoint with a vision
    tower (`inkling2`) that is all that is read.

    Raises:
        CheckpointError: config.json describes what the model has not.
    """
    config = Text2Config.read(*_text_section(checkpoint))
    with torch.device("meta"):
        model = TokenModel2(config)
    return _second(checkpoint, model, config, lambda name, shape: None)


def inkling2_loop_text(checkpoint: Checkpoint) -> Frontend:
    """As `inkling2_text` of a looped model (of `inkling2_loop`, if it comes with a vision tower).

    Raises:
        CheckpointError: config.json describes what the model has not.
    """
    config = LoopConfig.read(*_text_section(checkpoint))
    with torch.device("meta"):
        model = LoopModel(config)
    first, layers = config.loop_layer_index_start, config.loop_layer_index_end - config.loop_layer_index_start
    return _second(
        checkpoint, model, config, lambda name, shape: message_place(name, shape, checkpoint.tensors, first, layers)
    )


def _text_section(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """What describes the text model, and where: all of config.json, or its `text_config`."""
    where, kind = str(checkpoint.folder / "config.json"), checkpoint.config["model_type"]
    if kind.endswith("_text"):
        return checkpoint.config, where
    section = checkpoint.config.get("text_config")
    if not isinstance(section, dict) or section.get("model_type", f"{kind}_text") != f"{kind}_text":
        raise CheckpointError(f"text_config does not describe a text model of type {kind}_text", where=where,
                              fix="take config.json from the same export as the weights")  # fmt: skip
    return section, f"{where}: text_config"


def _second(
    checkpoint: Checkpoint,
    model: TokenModel2,
    config: Text2Config,
    place: Callable[[str, tuple[int, ...]], Stored | None],
) -> Frontend:
    """The second generation's; `place` says where parameters are that a model has beside those of `inkling2_text`."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    ones = {name: torch.ones(shape) for name, shape in shapes.items() if name.endswith(_ONES)}
    heads = {
        f"model.layers.{i}.self_attn.{name}.scale": config.heads(i)[0]
        for i in range(config.num_hidden_layers)
        for name in ("q_l2_clip", "rel_l2_clip")
    }
    stored = {
        n: place(n, shape) or text2_place(n, shape, checkpoint.tensors, heads.get(n, 1), config.vocab_size)
        for n, shape in shapes.items()
        if n not in ones
    }
    return _frontend(checkpoint, model, config, {}, stored, ones)


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
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in constants}
    place = release_place if is_release(checkpoint.tensors) else module_place
    stored = {name: norm_place(place(name, shape), checkpoint.tensors) for name, shape in shapes.items()}
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
    seeing = _VISION if isinstance(config, Text2Config) else ()
    skipped = [name for name in checkpoint.tensors if name.startswith(_NOT_NEEDED)]
    notes = [f"{len(skipped)} multi-token-prediction tensors ({_NOT_NEEDED}*) are not used"] if skipped else []
    if seen := [name for name in checkpoint.tensors if name.startswith(seeing)]:
        notes.append(f"text alone: the {len(seen)} tensors of the vision tower are not used, images cannot be given")
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
        ignore=lambda name: name.startswith((_NOT_NEEDED, *seeing)),
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
