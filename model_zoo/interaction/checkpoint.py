"""Checkpoint folders of the reference model: written a tensor at a time, read back into a model.

The folder has the Hugging Face form: `config.json`, `model.safetensors` (or numbered shards with an index),
`tokenizer.json`, `preprocessor_config.json`. It is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tmlc.errors import CheckpointError, UsageError

from .config import PRESETS, InteractionConfig, read_preset
from .folders import require_unused
from .init import initial_tensor, is_random
from .modeling import InteractionModel, count_parameters
from .tokenizer import byte_level_tokenizer

Progress = Callable[[int, int], None]
Precision = Literal["float32", "bfloat16"]

_ST_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
# Small or delicate tensors that stay float32 in a bfloat16 checkpoint, as they do in Inkling's.
_KEEP_FLOAT32 = ("norm", "conv", "rel_logits_proj", "mlp.gate.", "window", "mel_filters", "bias", "times", "scale",
                 "self_voice")  # fmt: skip


@dataclass(frozen=True)
class PresetInfo:
    """What `tmlc zoo list` shows. `active_parameters` are those that one position of decode and unembed uses."""

    description: str
    parameters: int
    active_parameters: int


def presets() -> dict[str, PresetInfo]:
    """The presets by name, with their sizes (counted on the meta device)."""
    found = {}
    for name in PRESETS:
        total, active = count_parameters(InteractionConfig.from_preset(name))
        found[name] = PresetInfo(read_preset(name)["description"], total, active)
    return found


def create_checkpoint(
    preset: str | InteractionConfig,
    seed: int,
    out_dir: str | Path,
    shard_bytes: int = 1 << 30,
    dtype: Precision = "float32",
    on_progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint with random weights; the bytes depend on the arguments only.

    Args:
        preset: a preset's name, or a configuration.
        seed: of the weights.
        out_dir: the folder to make; it must not exist, or be empty.
        shard_bytes: a new shard begins where this would be exceeded; memory needed is that of the largest tensor.
        dtype: of matrices and embeddings; norms, convolutions, router and constants are always float32.
        on_progress: called with (bytes written, bytes in all).

    Returns:
        `out_dir`.

    Raises:
        UsageError: unknown preset or dtype, a folder that holds something, or too little disk.
    """
    config = InteractionConfig.from_preset(preset) if isinstance(preset, str) else preset
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"unknown dtype {dtype!r}", fix="choose float32 or bfloat16")
    if shard_bytes <= 0:
        raise UsageError(f"shards of {shard_bytes} bytes", fix="give a positive number of bytes")
    with torch.device("meta"):
        model = InteractionModel(config)
    _write_folder(_specs(model, dtype), config, seed, Path(out_dir), shard_bytes, on_progress)
    return Path(out_dir)


def save_checkpoint(model: InteractionModel, out_dir: str | Path, dtype: Precision = "float32") -> Path:
    """Writes a checkpoint with the weights of a model, in one shard.

    Args:
        model: the model; its tensors may be on any device.
        out_dir: the folder to make; it must not exist, or be empty.
        dtype: of matrices and embeddings; norms, convolutions, router and constants are always float32.

    Returns:
        `out_dir`.

    Raises:
        UsageError: a folder that holds something, or too little disk.
    """
    _write_folder(_specs(model, dtype, trained=True), model.config, 0, Path(out_dir), 1 << 40, None)
    return Path(out_dir)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _write_folder(
    tensors: list[_TensorSpec], config: InteractionConfig, seed: int, out: Path, shard_bytes: int,
    on_progress: Progress | None,
) -> None:  # fmt: skip
    """The folder under a temporary name, renamed when it is whole."""
    require_unused(out)
    total = sum(spec.nbytes for spec in tensors)
    tokenizer = byte_level_tokenizer(config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if total > free:
            raise UsageError(f"the checkpoint needs {_size(total)} and {_size(free)} are free",
                             where=str(out), fix="choose a smaller preset, --dtype bfloat16, or another disk")
        partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            _write_json(partial / "config.json", config.to_dict())
            _write_json(partial / "preprocessor_config.json", preprocessor(config))
            _write_json(partial / "tokenizer.json", tokenizer, compact=True)
            _write_shards(partial, tensors, config, seed, shard_bytes, total, on_progress)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise UsageError("the disk is full" if full else f"the checkpoint cannot be written: {error.strerror}",
                         where=str(out), fix="free some space, or name another folder") from error  # fmt: skip


def preprocessor(config: InteractionConfig) -> dict[str, Any]:
    """`preprocessor_config.json` in the words of Inkling's feature extractor, processor and image processor."""
    audio, vision = config.audio_config, config.vision_config
    return {
        "feature_extractor_type": "InklingFeatureExtractor",
        "feature_size": audio.n_mel_bins,
        "sampling_rate": audio.sample_rate,
        "audio_token_duration_s": audio.hop_length / audio.sample_rate,
        "window_size_multiplier": audio.window_length / audio.hop_length,
        "num_dmel_bins": audio.mel_vocab_size,
        "dmel_min_value": audio.dmel_min,
        "dmel_max_value": audio.dmel_max,
        "image_processor_type": "InklingImageProcessor",
        "size": {"height": vision.patch_size, "width": vision.patch_size},
        "image_mean": vision.image_mean,
        "image_std": vision.image_std,
        "frame_size": {"height": vision.height, "width": vision.width},
        "frames_per_clip": vision.temporal_patch_size,
    }


def load_model(folder: str | Path) -> InteractionModel:
    """The model of a checkpoint folder, float32 on the CPU.

    Raises:
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
    """
    config = InteractionConfig.from_folder(folder)
    with torch.device("meta"):
        model = InteractionModel(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for path in _shards_of(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    state[name] = file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the shard cannot be read: {error}", where=str(path),
                                  fix="restore the file from where the checkpoint came from") from error
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of the model" for name in state if name not in expected]
    wrong += [f"{name} is {list(state[name].shape)} instead of {list(shape)}"
              for name, shape in expected.items() if name in state and state[name].shape != shape]  # fmt: skip
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError("; ".join(wrong[:3]) + more, where=str(folder),
                              fix="check that config.json and the shards belong together")
    model.load_state_dict(state, assign=True)
    return model


@dataclass(frozen=True)
class _TensorSpec:
    """One tensor to write; `constant` is set for what is not drawn: windows, filters, and trained weights."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def values(self, config: InteractionConfig, seed: int) -> Tensor:
        if self.constant is not None:
            return self.constant.detach().to(self.dtype).cpu()
        return torch.from_numpy(initial_tensor(self.name, self.shape, config, seed)).to(self.dtype)


def _specs(model: InteractionModel, dtype: Precision, trained: bool = False) -> list[_TensorSpec]:
    specs = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        narrow = dtype == "bfloat16" and not any(part in name for part in _KEEP_FLOAT32)
        drawn = is_random(name, tensor) and not trained
        kind = torch.bfloat16 if narrow else torch.float32
        specs.append(_TensorSpec(name, tuple(tensor.shape), kind, None if drawn else tensor))
    return specs


def _write_shards(
    folder: Path, tensors: list[_TensorSpec], config: InteractionConfig, seed: int, shard_bytes: int, total: int,
    on_progress: Progress | None,
) -> None:  # fmt: skip
    shards = list(_cut(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / file_name, "wb") as file:
            file.write(_header(shard))
            for spec in shard:
                file.write(spec.values(config, seed).contiguous().view(torch.uint8).numpy().data)
                weight_map[spec.name] = file_name
                done += spec.nbytes
                if on_progress is not None:
                    on_progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _cut(tensors: list[_TensorSpec], shard_bytes: int) -> Iterator[list[_TensorSpec]]:
    """Consecutive groups of at most `shard_bytes` (a larger tensor is a group of its own)."""
    group: list[_TensorSpec] = []
    size = 0
    for spec in tensors:
        if group and size + spec.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(spec)
        size += spec.nbytes
    yield group


def _header(shard: list[_TensorSpec]) -> bytes:
    """The safetensors header: its length, then JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        entries[spec.name] = {"dtype": _ST_NAMES[spec.dtype], "shape": list(spec.shape),
                              "data_offsets": [offset, offset + spec.nbytes]}  # fmt: skip
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_json(path: Path, value: Any, compact: bool = False) -> None:
    if compact:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _shards_of(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError("neither model.safetensors nor a readable model.safetensors.index.json",
                              where=str(folder), fix="restore the missing file") from error  # fmt: skip
    return [folder / name for name in sorted(set(names))]
