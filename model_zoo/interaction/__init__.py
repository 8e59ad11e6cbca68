"""The reference interaction model: its configurations, the model in canonical ops, and its checkpoints.

Names are resolved on first use, so that reading a configuration needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "InteractionConfig": "config",
    "TextConfig": "config",
    "InteractionModel": "modeling",
    "MethodDef": "modeling",
    "TokenModel": "modeling",
    "token_model": "modeling",
    "PresetInfo": "checkpoint",
    "create_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "presets": "checkpoint",
}

__all__ = ["InteractionConfig", "InteractionModel", "MethodDef", "PresetInfo", "TextConfig", "TokenModel",
           "create_checkpoint", "load_model", "presets", "token_model"]  # fmt: skip

if TYPE_CHECKING:
    from .checkpoint import PresetInfo, create_checkpoint, load_model, presets
    from .config import InteractionConfig, TextConfig
    from .modeling import InteractionModel, MethodDef, TokenModel, token_model


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
