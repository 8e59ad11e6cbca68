"""The checkpoint reader: a folder in the Hugging Face form, validated before use and read one tensor at a time.

Every shard's header is checked against the file's real size when the checkpoint is opened, so that a truncated
download is refused in milliseconds, before any compile work; the numbers themselves are read lazily.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from tmlc.errors import CheckpointError, reason, shown

if TYPE_CHECKING:
    from tmlc.frontend.quantized import StoredWeight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 * 1024 * 1024

#: safetensors dtype → (torch dtype as read, bytes per element). float16 is widened to float32 when read (exactly).
DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F32": (torch.float32, 4),
    "BF16": (torch.bfloat16, 2),
    "F16": (torch.float32, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "F8_E8M0": (torch.float8_e8m0fnu, 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: the shard that holds it, its safetensors dtype name and its shape."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of what `Checkpoint.get` returns."""
        return DTYPES[self.dtype][0]


class Checkpoint:
    """An opened checkpoint. Reads like a mapping from tensor name to tensor, one tensor in memory at a time.

    `constants` are small tensors that a frontend has computed from the config (rotary frequencies); `get` gives them
    out like the checkpoint's own.
    """

    #: Whether there are values to read, under the names and in the layouts that the checkpoint chose.
    has_values = True

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder, self.config, self.tensors = folder, config, tensors
        self.constants: dict[str, torch.Tensor] = {}
        self._open: tuple[str, Any] | None = None

    @cached_property
    def weights(self) -> dict[str, StoredWeight]:
        """The model's weights: the tensors, where several that are one quantised weight count as that weight.

        Raises:
            CheckpointError: a quantisation that tmlc does not read, or tensors that do not fit the one named.
        """
        from tmlc.frontend.quantized import stored_weights

        return stored_weights(self)

    @property
    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return sorted({info.shard for info in self.tensors.values()})

    def get(self, name: str) -> torch.Tensor:
        """Reads one tensor (float16 comes as float32).

        Raises:
            CheckpointError: there is no such tensor, or its shard cannot be read.
        """
        if name in self.constants:
            return self.constants[name]
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"tensor {name!r} is missing", where=str(self.folder), fix=FIX_INCOMPLETE)
        try:
            if self._open is None or self._open[0] != info.shard:
                self._open = (info.shard, safe_open(str(self.folder / info.shard), framework="pt"))
            tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"tensor {name!r} cannot be read: {error}", where=str(self.folder / info.shard), fix=FIX_INCOMPLETE
            ) from None
        return tensor.float() if info.dtype == "F16" else tensor

    def release(self) -> None:
        """Closes the shard that is open. Its pages stay resident for as long as it is mapped, so whoever is done with a
        large tensor says so; the next `get` opens the shard again."""
        self._open = None

    __getitem__ = get

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def keys(self) -> Iterable[str]:
        """Names of all tensors."""
        return self.tensors.keys()

    def digest(self, on_progress: Callable[[str], None] | None = None) -> dict[str, str]:
        """sha256 of `config.json`, the index, the tokenizer and processor files, and every shard, by file name."""
        names = [
            n
            for n in ("config.json", INDEX, "tokenizer.json", "preprocessor_config.json", "processor_config.json")
            if (self.folder / n).is_file()
        ]
        digests = {}
        for name in [*names, *self.shards]:
            if on_progress is not None:
                on_progress(name)
            with (self.folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def scan_finite(self, names: Iterable[str] | None = None, on_progress: Callable[[str], None] | None = None) -> None:
        """Reads every float tensor (or the named ones) and refuses NaN and infinity.

        Raises:
            CheckpointError: names the first tensors that hold such values and counts them.
        """
        bad = []
        chosen = self.tensors if names is None else names
        for name in sorted(chosen, key=lambda n: (self.tensors[n].shard, n)):
            if on_progress is not None:
                on_progress(name)
            tensor = self.get(name)
            if tensor.is_floating_point() and tensor.itemsize == 1:
                tensor = tensor.bfloat16()  # exact, and torch does not know what is finite in one byte
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
                kinds = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "infinite")) if count]
                bad.append(f"{name} ({', '.join(kinds)} of {tensor.numel()})")
            del tensor
            self.release()
        if bad:
            raise CheckpointError(
                f"values that are not finite in {listed(bad)}",
                where=str(self.folder),
                fix="the checkpoint is damaged or the training diverged: export it again, or take an earlier one",
            )

    def require(self, expected: dict[str, tuple[tuple[int, ...], bool]], ignore: Callable[[str], bool]) -> None:
        """Compares the checkpoint with what a model needs.

        Args:
            expected: weight name → (shape, whether it must be of a floating dtype).
            ignore: tells of a surplus weight that it is known and not needed.

        Raises:
            CheckpointError: tensors are missing, or there are extra ones, or shapes or dtypes are wrong.
        """
        where, weights = str(self.folder), self.weights
        missing = [n for n in expected if n not in weights]
        if missing:
            raise CheckpointError(f"missing tensors: {listed(missing)}", where=where, fix=FIX_INCOMPLETE)
        extra = [n for n in weights if n not in expected and not ignore(n)]
        if extra:
            raise CheckpointError(
                f"tensors that the model in config.json does not have: {listed(extra)}",
                where=where,
                fix="config.json and the shards belong to different models: take both from the same export",
            )
        wrong = [
            f"{n} is {list(weights[n].shape)}, config.json says {list(shape)}"
            for n, (shape, _) in expected.items()
            if weights[n].shape != tuple(shape)
        ]
        if wrong:
            raise CheckpointError(
                f"wrong shapes: {listed(wrong)}",
                where=where,
                fix="config.json and the shards belong to different models",
            )
        dtypes = [
            f"{n} is {weights[n].stored}"
            for n, (_, floating) in expected.items()
            if weights[n].floating != floating
        ]
        if dtypes:
            raise CheckpointError(
                f"wrong dtypes: {listed(dtypes)}", where=where, fix="export the checkpoint in float32 or bfloat16"
            )


class ConfigOnly(Checkpoint):
    """What `config.json` says of a checkpoint whose shards are not there: it has every weight that the model needs, in
    bfloat16 under the model's own names, and no values. For whoever reads none: dry runs, plans, machine code.

    How a checkpoint is quantised (`quantization_config`) is left out: that decides how values are read, and nothing of
    the program.
    """

    has_values = False

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, {key: value for key, value in config.items() if key != "quantization_config"}, {})

    def require(self, expected: dict[str, tuple[tuple[int, ...], bool]], ignore: Callable[[str], bool]) -> None:
        for name, (shape, floating) in expected.items():
            self.tensors[name] = TensorInfo(name, "", "BF16" if floating else "I64", tuple(shape))
        self.__dict__.pop("weights", None)  # made anew from what is known now

    def get(self, name: str) -> torch.Tensor:
        if name in self.constants:
            return self.constants[name]
        what = f"tensor {name!r} has no values: config.json is there, and no shards"
        raise CheckpointError(what, where=str(self.folder), fix="put the checkpoint's safetensors files beside it")


FIX_INCOMPLETE = "the checkpoint is incomplete: copy or download it again"


def listed(names: list[str], most: int = 3) -> str:
    """`a, b, c and 4 more (7 in all)`."""
    head = ", ".join(names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most} more ({len(names)} in all)"


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens a checkpoint folder and validates config, index and shard headers.

    Raises:
        CheckpointError: no such folder, no or unreadable `config.json`, missing or truncated shards, an index that does
            not fit the shards, or a dtype that tmlc does not read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {str(path)!r}",
            fix="name a folder with config.json and safetensors shards, or make one: tmlc zoo create nano -o DIR",
        )
    config = _read_json(path / "config.json")
    index_file = path / INDEX
    if not index_file.is_file():
        if not (path / SINGLE).is_file():
            fix = f"{FIX_INCOMPLETE}; config.json alone does for `tmlc plan` and `tmlc compile --dry-run`"
            raise CheckpointError(f"neither {INDEX} nor {SINGLE}", where=str(path), fix=fix)
        return Checkpoint(path, config, read_header(path / SINGLE))
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no `weight_map`", where=str(index_file), fix=FIX_INCOMPLETE)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise CheckpointError(
                f"the shard of {name!r} is {shard!r}, not a file name", where=str(index_file), fix=FIX_INCOMPLETE
            )
    absent = [s for s in sorted(set(weight_map.values())) if not (path / s).is_file()]
    if absent:
        raise CheckpointError(f"missing shards: {listed(absent)}", where=str(path), fix=FIX_INCOMPLETE)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(path / shard).items():
            if name not in weight_map:
                raise CheckpointError(
                    f"{shard} holds {name!r}, which the index does not list",
                    where=str(index_file),
                    fix="index and shards belong to different exports: take both from the same one",
                )
            if weight_map[name] == shard:
                tensors[name] = info
    lost = [f"{n} (in {weight_map[n]})" for n in weight_map if n not in tensors]
    if lost:
        raise CheckpointError(
            f"listed in the index, not in its shard: {listed(lost)}", where=str(path), fix=FIX_INCOMPLETE
        )
    return Checkpoint(path, config, {n: tensors[n] for n in weight_map})


def open_unread(folder: str | Path) -> Checkpoint:
    """`open_checkpoint` for whoever reads no weight: a folder with `config.json` and no shards will do.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / name).exists() for name in (INDEX, SINGLE)):
        return ConfigOnly(path, _read_json(path / "config.json"))
    return open_checkpoint(path)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file against the file's size.

    Raises:
        CheckpointError: cut short, not safetensors, overlapping or unused bytes, or an unsupported dtype.
    """
    where = str(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"the shard is cut short at {size} bytes", where=where, fix=FIX_INCOMPLETE)
            if length > MAX_HEADER:
                raise CheckpointError("not a safetensors file", where=where, fix=FIX_INCOMPLETE)
            header = json.loads(handle.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"not a safetensors file: {error}", where=where, fix=FIX_INCOMPLETE) from None
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file", where=where, fix=FIX_INCOMPLETE)
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not name.isprintable():  # names are shown in errors and tables, on a terminal
            what = f"the name {shown(name)} of a tensor cannot be printed"
            raise CheckpointError(what, where=where, fix="give tensors names of printable characters")
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(v) is int and v >= 0 for v in (*shape, begin, end)) and isinstance(dtype, str)
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise CheckpointError(f"the header entry of {name!r} is malformed", where=where, fix=FIX_INCOMPLETE)
        if dtype not in DTYPES:
            fix = f"export the checkpoint in one of {', '.join(DTYPES)}"
            raise CheckpointError(f"{name!r} has dtype {shown(dtype)}", where=where, fix=fix)
        if end - begin != math.prod(shape) * DTYPES[dtype][1]:
            raise CheckpointError(f"the bytes of {name!r} do not fit its shape", where=where, fix=FIX_INCOMPLETE)
        spans.append((begin, end, name))
        tensors[name] = TensorInfo(name, file.name, dtype, shape)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"the bytes before {name!r} are not accounted for", where=where, fix=FIX_INCOMPLETE)
        at = end
    have = size - 8 - length
    if have != at:
        what = "is cut short" if have < at else "has bytes after its end"
        raise CheckpointError(
            f"the shard {what}: {have} bytes of tensors, the header says {at}", where=where, fix=FIX_INCOMPLETE
        )
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name}", where=str(file.parent), fix=FIX_INCOMPLETE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read: {reason(error)}", where=str(file.parent), fix=FIX_INCOMPLETE
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object", where=str(file.parent), fix=FIX_INCOMPLETE)
    return value
