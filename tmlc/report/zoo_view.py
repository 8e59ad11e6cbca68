"""The reference models with their sizes, and the writing of one: a preset with random weights, or the trained weights
that come with tmlc. Imports torch (sizes are counted on real shapes).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tmlc.errors import CheckpointError, UsageError
from tmlc.model_zoo.interaction.checkpoint import create_checkpoint
from tmlc.model_zoo.interaction.config import PRESETS, InteractionConfig, read_preset
from tmlc.model_zoo.interaction.modeling import count_parameters
from tmlc.model_zoo.interaction.shipped import SHIPPED, copy_shipped, shipped
from tmlc.package.writer import swap_folder


def models() -> list[dict[str, Any]]:
    """One entry a model: name, purpose, weights ("random", "trained" or "not here"), parameters in all and used by one
    position, layers, experts, context. Of a model whose trained weights are not here, sizes are None.
    """
    return [_preset(name) for name in PRESETS] + [_trained(name) for name in SHIPPED]


def _preset(name: str) -> dict[str, Any]:
    about = {"name": name, "purpose": read_preset(name)["description"], "weights": "random"}
    return about | _sizes(InteractionConfig.from_preset(name))


def _trained(name: str) -> dict[str, Any]:
    about = {"name": name, "purpose": SHIPPED[name]}
    try:
        return about | {"weights": "trained"} | _sizes(InteractionConfig.from_folder(shipped(name)))
    except CheckpointError:
        return about | {"weights": "not here"} | _sizes(None)


def _sizes(config: InteractionConfig | None) -> dict[str, Any]:
    if config is None:
        return dict.fromkeys(("parameters", "active_parameters", "layers", "experts", "context", "tick_ms"))
    text = config.text_config
    total, active = count_parameters(config)
    return {
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
    """Write a checkpoint with random weights; with `force`, an older folder at `out` goes only when the new one is
    complete.

    Raises:
        UsageError: unknown model, or `out` holds something that is no checkpoint (it is never removed).
    """
    if name not in PRESETS:
        known = ", ".join([*PRESETS, *SHIPPED])
        raise UsageError(f"unknown model {name!r}", where="MODEL", fix=f"choose one of: {known}")
    tell = partial(report, "writing")
    _replacing(out, force, lambda fresh: create_checkpoint(name, seed, fresh, shard_bytes, dtype, on_progress=tell))
    return {"path": str(out), "preset": name, "weights": "random", "seed": seed} | _written(out)


def create_trained(name: str, out: Path, force: bool) -> dict[str, Any]:
    """Copy a trained checkpoint, in the same way.

    Raises:
        UsageError: as `create_preset`.
        CheckpointError: its weights are not in this installation.
    """
    _replacing(out, force, lambda fresh: copy_shipped(name, fresh))
    return {"path": str(out), "preset": name, "weights": "trained", "seed": None} | _written(out)


def _replacing(out: Path, force: bool, write: Callable[[Path], object]) -> None:
    if force and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UsageError("the folder is not a checkpoint, so --force does not replace it", where=str(out),
                         fix="name another folder, or remove this one yourself")  # fmt: skip
    fresh = out.with_name(f".{out.name}.{os.getpid()}.new") if force and out.exists() else out
    try:
        write(fresh)
        if fresh != out:
            swap_folder(fresh, out)
    finally:
        if fresh != out:
            shutil.rmtree(fresh, ignore_errors=True)


def _written(out: Path) -> dict[str, Any]:
    files = sorted(p.name for p in out.iterdir())
    return {
        "parameters": count_parameters(InteractionConfig.from_folder(out))[0],
        "shards": sum(file.endswith(".safetensors") for file in files),
        "files": files,
        "bytes": sum(p.stat().st_size for p in out.iterdir()),
    }
