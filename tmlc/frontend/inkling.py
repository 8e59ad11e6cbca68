"""The frontend of Inkling text checkpoints as transformers saves them (`model_type: inkling_text`)."""

from __future__ import annotations

import torch

from tmlc.frontend.checkpoint import Checkpoint
from tmlc.frontend.model import Frontend, Traceable
from tmlc.model_zoo.interaction.config import TextConfig
from tmlc.model_zoo.interaction.modeling import token_model

#: Runtime defaults: such a checkpoint has none of its own.
CONTEXT, SINKS, MAX_APPEND = 4096, 16, 64
#: Multi-token-prediction layers are for speculative decoding; the engine does not use them.
_NOT_NEEDED = "model.mtp."


def inkling_text(checkpoint: Checkpoint) -> Frontend:
    """The text model on the meta device: embed_text, decode, unembed, next_token.

    Raises:
        CheckpointError: config.json lacks fields or describes what the backbone does not have.
    """
    config = TextConfig.from_inkling(checkpoint.config)
    with torch.device("meta"):
        model = token_model(config)
    eos = config.eos_token_id
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
        tick={"duration_ms": 200, "text_out": 8, "eos": eos if isinstance(eos, list) else [] if eos is None else [eos]},
        ignore=lambda name: name.startswith(_NOT_NEEDED),
    )
