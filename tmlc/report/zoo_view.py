"""The presets of the zoo with their sizes, and the writing of one. Imports torch (sizes are counted on real
shapes).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tmlc.errors import UsageError
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import PRESETS, InteractionConfig, read_preset
from tmlc.model_zoo.interaction.modeling import count_parameters


def presets() -> list[dict[str, Any]]:
    """One entry a preset: name, purpose, parameters in all and used by one position, layers, experts,
    context.
    """
    return [_entry(name) for name in PRESETS]


def _entry(name: str) -> dict[str, Any]:
    config = InteractionConfig.from_preset(name)
    text = config.text_config
    total, active = count_parameters(config)
    return {
        "name": name,
        "purpose": read_preset(name)["description"],
        "parameters": total,
        "active_parameters": active,
        "layers": text.num_hidden_layers,
        "experts": f"{text.n_routed_experts} + {text.n_shared_experts}, top {text.num_experts_per_tok}",
        "context": config.runtime_config.context,
        "tick_ms": config.tick_config.duration_ms,
    }


def create_preset(
    name: str,
    seed: int,
    out: Path,
    shard_bytes: int,
    dtype: Literal["float32", "bfloat16"],
    force: bool,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Write the checkpoint; with `force`, an older folder at `out` goes only when the new one is complete.

    Raises:
        UsageError: unknown preset, or `out` holds something that is no checkpoint (it is never removed).
    """
    read_preset(name)
    if force and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UsageError("the folder is not a checkpoint, so --force does not replace it", where=str(out),
                         fix="name another folder, or remove this one yourself")  # fmt: skip
    fresh = out.with_name(f".{out.name}.new") if force and out.exists() else out
    try:
        tell = partial(report, "writing")
        create_checkpoint(name, seed, fresh, shard_bytes, dtype, on_progress=tell)
        if fresh != out:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            fresh.rename(out)
    finally:
        if fresh != out:
            shutil.rmtree(fresh, ignore_errors=True)
    entry = _entry(name)
    files = sorted(p.name for p in out.iterdir())
    return {
        "path": str(out),
        "preset": name,
        "seed": seed,
        "parameters": entry["parameters"],
        "shards": sum(file.endswith(".safetensors") for file in files),
        "files": files,
        "bytes": sum(p.stat().st_size for p in out.iterdir()),
    }
