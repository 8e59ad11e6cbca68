"""The key of a compilation: everything that decides which bytes come out, as named parts.

The parts are: every file of the checkpoint, every source file and kernel library of tmlc itself, the versions of what
computes for it, the pipeline with the settings it gives, target, precision, overrides, and third-party passes. Two
compilations with equal parts write the same package; where they differ, the part's name says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources, util
from pathlib import Path
from typing import Any

import yaml

from tmlc import __version__
from tmlc.errors import CheckpointError

FORMAT = "1"  # of the key and of the entries: a change here makes every older entry a miss
PLUGINS = "tmlc.passes"  # entry point group of third-party passes (tmlc.pipeline.registry)

_ROOMS = ("tmlc", "tmlc.passes", "tmlc.kernels", "tmlc.runtimes", "tmlc.model_zoo")
_SOURCES = (".py", ".yaml", ".cpp", ".h", ".so")
_LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "triton", "onnx", "tensorrt-rtx", "tensorrt")
#: Variables of the environment that change what Triton and the assembler make, and some of these names that do not.
_TOLD, _NOT_TOLD = ("TRITON_", "PTXAS_", "DISABLE_", "LLVM_"), ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET")
_NOT_READ = (".md", ".gitattributes", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_YOUNG_NS = 100_000_000  # a file this fresh may change again without its times showing it


@dataclass(frozen=True)
class CompileKey:
    """Named parts and the digest of them all."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()


class DigestMemo:
    """sha256 of files, remembered for as long as size, times and inode of a file stay what they were.

    Args:
        file: where the memo is kept; an unreadable one is forgotten. None keeps it in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, list[Any]] = {}
        self.read = 0  # files whose bytes were read
        self._changed = False
        if file is not None:
            try:
                loaded = json.loads(file.read_bytes())
                self.known = {k: v for k, v in loaded.items() if isinstance(v, list) and len(v) == 6}
            except (OSError, ValueError, AttributeError):
                pass

    def digest(self, path: Path) -> str:
        """The sha256 of a file, from the memo where its stat says that nothing has changed."""
        name, before = str(path), _stamp(path)
        found = self.known.get(name)
        if found is not None and found[:5] == before:
            return str(found[5])
        with path.open("rb") as handle:
            value = hashlib.file_digest(handle, "sha256").hexdigest()
        self.read += 1
        settled = time.time_ns() - max(before[1], before[2]) > _YOUNG_NS
        if settled and _stamp(path) == before:
            self.known[name] = [*before, value]
            self._changed = True
        return value

    def save(self) -> None:
        """Writes the memo, whole or not at all. Entries of files that are gone are dropped when it has grown long."""
        if self.file is None or not self._changed:
            return
        if len(self.known) > 4096:
            self.known = {name: entry for name, entry in self.known.items() if os.path.exists(name)}
        write_whole(self.file, json.dumps(self.known).encode())
        self._changed = False


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def compile_key(
    checkpoint: Path,
    *,
    target: str,
    precision: str | None,
    preset: str | None,
    pipeline: Path | None,
    passes: Sequence[str] | None,
    disable: Iterable[str],
    options: Mapping[str, Any],
    memo: DigestMemo,
) -> CompileKey:
    """The key of one call of the compiler.

    Args:
        options: everything else that reaches `tmlc.compile` and changes what it writes (context, folder, check, …).
        memo: digests of files that have been read before.

    Raises:
        CheckpointError: the checkpoint folder cannot be read.
        OSError: a pipeline file cannot be read.
    """
    parts = {"format": FORMAT, "tmlc": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for library in _LIBRARIES:
        parts[f"version of {library}"] = _version(library)
    if target.partition(":")[0] == "triton":
        parts |= {f"environment variable {name}": value for name, value in tool_settings(memo).items()}
    parts |= _checkpoint_parts(checkpoint, memo)
    parts |= {"target": target, "precision": str(precision)}
    parts |= {name: _option(value, memo) for name, value in sorted(options.items())}
    parts |= _pipeline_parts(target, preset, pipeline, passes, disable)
    parts |= _plugin_parts(memo)
    parts |= _source_parts(memo)
    return CompileKey(parts)


def tool_settings(memo: DigestMemo) -> dict[str, str]:
    """What the environment tells Triton and the assembler: variables by name; of a program that one names
    (TRITON_PTXAS_PATH) the digest of it."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(_TOLD) and name not in _NOT_TOLD:
            path = Path(value)
            found[name] = memo.digest(path) if path.is_absolute() and path.is_file() else value
    return found


def _option(value: Any, memo: DigestMemo) -> str:
    """An option as a part of the key: of a file that the compiler reads, its contents."""
    return memo.digest(value) if isinstance(value, Path) else str(value)


def _stamp(path: Path) -> list[int]:
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _checkpoint_parts(folder: Path, memo: DigestMemo) -> dict[str, str]:
    """Every file of the folder that a frontend may read, and the folder's name, which a package may carry."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        wanted = [name for name in names if not name.startswith(".") and not name.endswith(_NOT_READ)]
        digests = {f"checkpoint file {name}": memo.digest(folder / name) for name in wanted}
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {error.strerror or error}",
            where=str(folder),
            fix="name a folder with config.json and safetensors shards",
        ) from None
    return {"checkpoint name": folder.resolve().name, **digests}


def _pipeline_parts(
    target: str, preset: str | None, pipeline: Path | None, passes: Sequence[str] | None, disable: Iterable[str]
) -> dict[str, str]:
    """The passes in order, and a part for each setting that the pipeline gives. Defaults are in the sources."""
    parts = {"disabled passes": ", ".join(sorted(set(disable)))}
    if passes is not None:
        return {**parts, "passes": ", ".join(passes)}
    if pipeline is not None:
        text = pipeline.read_text("utf-8")
    else:
        # A level is the target's own pipeline up to that level; an unknown name is the compiler's to refuse.
        folder = resources.files("tmlc.pipeline") / "presets"
        parts["preset"] = preset or target
        named = [folder / f"{name}.yaml" for name in (preset or target, target.partition(":")[0])]
        text = next((file.read_text("utf-8") for file in named if file.is_file()), "[]")
    try:
        steps = [{"pass": s} if isinstance(s, str) else dict(s) for s in yaml.safe_load(text)]
    except (yaml.YAMLError, TypeError, ValueError):
        return {**parts, "passes": hashlib.sha256(text.encode()).hexdigest()}  # the compiler says what is wrong
    parts["passes"] = ", ".join(str(step.get("pass")) for step in steps)
    seen: dict[str, int] = {}
    for step in steps:
        name = str(step.pop("pass", None))
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name} ({seen[name]})"
        config = step.pop("config", None) or {}
        settings = {**step, **config} if isinstance(config, dict) else {**step, "config": config}
        parts |= {f"pass {label}, {key}": str(value) for key, value in settings.items()}
    return parts


def _plugin_parts(memo: DigestMemo) -> dict[str, str]:
    """Version and sources of every distribution that brings passes."""
    parts = {}
    for point in metadata.entry_points(group=PLUGINS):
        found = util.find_spec(point.module.partition(".")[0])
        files: list[Path] = []
        if found is not None and found.submodule_search_locations:
            files = _files(Path(next(iter(found.submodule_search_locations))))
        elif found is not None and found.origin:
            files = [Path(found.origin)]
        digest = hashlib.sha256("".join(memo.digest(file) for file in files).encode()).hexdigest()
        dist = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown"
        parts[f"plugin {point.name}"] = f"{dist}, {point.value}, {digest}"
    return parts


def _source_parts(memo: DigestMemo) -> dict[str, str]:
    """The files of tmlc itself: what compiles is part of what is compiled."""
    parts = {}
    for room in _ROOMS:
        found = util.find_spec(room)
        if found is None or not found.submodule_search_locations:
            continue
        root = Path(next(iter(found.submodule_search_locations)))
        for file in _files(root):
            parts[f"source {room.replace('.', '/')}/{file.relative_to(root).as_posix()}"] = memo.digest(file)
    return parts


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix in _SOURCES and p.is_file())
