"""Checkpoints with trained weights that are part of tmlc: where they lie, and their copies. No torch is needed.

They stand beside this file in `checkpoints/NAME/`, in the form of every other checkpoint, with the model card that
`train.py --export --scores` wrote; the wheel carries them.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from tmlc.errors import CheckpointError, UsageError

from .folders import require_unused

SHIPPED = {"interaction-nano": "Trained on the tasks of tmlc eval, for the demo and to hold compiles against"}
"""Name → what for."""
FOLDER = Path(__file__).parent / "checkpoints"
FILES = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint; it belongs to the installation, so copy it before changing anything.

    Raises:
        UsageError: no checkpoint of that name is shipped.
        CheckpointError: its weights, or another of its files, are not in this installation.
    """
    if name not in SHIPPED:
        raise UsageError(f"no checkpoint {name!r} comes with tmlc", fix=f"choose one of: {', '.join(SHIPPED)}")
    folder = FOLDER / name
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"the trained checkpoint {name} is not in this installation: it lacks {', '.join(missing)}",
            where=str(folder), fix="train it as docs/training.md says, or use the preset nano with random weights",
        )  # fmt: skip
    return folder


def copy_shipped(name: str, out: Path) -> Path:
    """Copies a shipped checkpoint to `out`, a folder that does not exist or is empty; whole or not at all.

    Raises:
        UsageError: as `shipped`, `out` holds something, or it cannot be written.
        CheckpointError: as `shipped`.
    """
    folder = shipped(name)
    require_unused(out)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(folder / file, partial / file)
        partial.rename(out)
    except OSError as error:
        raise UsageError(f"the checkpoint cannot be written: {error.strerror}", where=str(out),
                         fix="free some space, or name another folder") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
