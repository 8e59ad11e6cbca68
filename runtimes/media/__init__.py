"""Recorded media for the runtime: audio and video files and timed text in, WAV out.

The engine itself needs none of this; `tmlc run` and `tmlc profile` do. The decoders (soundfile, soxr, PyAV,
Pillow) come with the extra `media` and are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from tmlc.errors import UsageError


def require(module: str, purpose: str) -> ModuleType:
    """Import `module` of the extra `media`; UsageError with the command that installs it when it is
    missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs the Python package {module.split('.')[0]}, which is not installed",
            fix="install it with: pip install 'tmlc[media]'",
        ) from error
