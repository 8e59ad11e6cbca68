"""Opens a package and checks it before anything is used: every byte, every size, every field.

The weights are not read into memory: they are mapped, and the kernels use them where they lie.
"""

import hashlib
import mmap
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tmlc.errors import PackageError
from tmlc.package import zipfile_io
from tmlc.package.fields import check_member_name, parse_json
from tmlc.package.manifest import Manifest, parse_manifest
from tmlc.package.safetensors_io import TensorEntry, parse_header, view
from tmlc.package.writer import MANIFEST, SEAL, WEIGHTS, seal

_AGAIN = "Get the package again from its source, or compile it again."


class Package:
    """An open package. Made by `open_package`.

    Attributes:
        path: the file or folder.
        manifest: the checked manifest.
        digest: sha256 of the manifest, which lists the digests of all files: one name for the content, the
            same for the file form and the folder form.
        weights: the data section of `weights.safetensors`, uint8, read-only, mapped, 64-byte aligned.
        tensors: where each tensor lies in `weights`.
    """

    def __init__(
        self, path: Path, members: dict[str, memoryview], maps: list[mmap.mmap], starts: dict[str, int]
    ) -> None:
        self.path, self._members, self._maps, self._starts = path, members, maps, starts
        raw = self._raw(MANIFEST)
        self.manifest: Manifest = parse_manifest(bytes(raw), f"{path}: {MANIFEST}")
        self.digest: str = hashlib.sha256(raw).hexdigest()
        self._check_files()
        data = self._raw(WEIGHTS)
        self.tensors: dict[str, TensorEntry]
        self.tensors, start, total = parse_header(data, f"{path}: {WEIGHTS}")
        self.weights: np.ndarray = np.frombuffer(data, np.uint8, total, start)
        if self.weights.size and self.weights.ctypes.data % 64:
            raise PackageError("the weights are not aligned", where=f"{path}: {WEIGHTS}", fix=_AGAIN)

    def names(self) -> list[str]:
        """The files of the package, sorted."""
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises PackageError when it is missing or not what the manifest lists."""
        data = bytes(self._raw(name))
        info = self.manifest.files.get(name)
        if info is not None and hashlib.sha256(data).hexdigest() != info.sha256:
            raise PackageError("the file was altered", where=f"{self.path}: {name}", fix=_AGAIN)
        return data

    def json(self, name: str) -> Any:
        """One file as JSON."""
        return parse_json(self.read(name), f"{self.path}: {name}")

    def tensor(self, name: str) -> np.ndarray:
        """One tensor of the weights, no copy; bf16 comes as uint16."""
        if name not in self.tensors:
            raise PackageError(f"the package has no tensor {name!r}", where=str(self.path), fix=_AGAIN)
        return view(self.weights, self.tensors[name])

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a member, and where in it the member starts: for libraries that map files themselves."""
        self._raw(name)
        path = self.path.resolve()
        return (path, self._starts[name]) if self._starts else (path / name, 0)

    def close(self) -> None:
        """Lets go of the mapped files. Arrays that were handed out stay valid until they are gone."""
        self.weights = np.empty(0, np.uint8)
        self._members = {}
        for mapped in self._maps:
            with suppress(BufferError):  # still in use by an array of the caller, which keeps it alive
                mapped.close()
        self._maps = []

    def __enter__(self) -> "Package":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _raw(self, name: str) -> memoryview:
        if name not in self._members:
            raise PackageError(f"{name} is missing", where=str(self.path), fix=_AGAIN)
        return self._members[name]

    def _check_files(self) -> None:
        """The files that are there are the files that the manifest lists, at their sizes."""
        there, listed = set(self._members) - {MANIFEST}, set(self.manifest.files)
        if there != listed:
            name = min(there ^ listed)
            what = "is missing" if name in listed else "does not belong to the package"
            raise PackageError(f"{name} {what}", where=str(self.path), fix=_AGAIN)
        for name, info in self.manifest.files.items():
            if len(self._members[name]) != info.bytes:
                what = f"{name} has {len(self._members[name])} bytes, expected {info.bytes}"
                raise PackageError(what, where=str(self.path), fix=_AGAIN)


def open_package(path: str | Path, verify: bool = True) -> Package:
    """Opens a package, a file or a folder.

    Args:
        path: the package.
        verify: read every byte once and compare digests. Without it, sizes, structure and the manifest are
            still checked, and `read` still compares the file it gives; only the weights are trusted.

    Raises:
        PackageError: no such file, not a package, cut short, altered, foreign, or of a newer format.
    """
    path = Path(path)
    maps: list[mmap.mmap] = []
    try:
        opened = _open_folder(path, maps, verify) if path.is_dir() else _open_file(path, maps, verify)
        members, digests, starts = opened
        package = Package(path, members, maps, starts)
    except OSError as error:
        raise PackageError(
            f"cannot read the package: {error.strerror or error}", where=str(path), fix="Check the path."
        ) from error
    for name, info in package.manifest.files.items():
        if digests.get(name, info.sha256) != info.sha256:
            raise PackageError(f"{name} was altered or damaged", where=str(path), fix=_AGAIN)
    return package


def _map(path: Path, maps: list[mmap.mmap]) -> memoryview:
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return memoryview(b"")
        maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if hasattr(mmap, "MADV_WILLNEED"):
        with suppress(OSError):  # a hint: what is not cached is read ahead of the digests
            maps[-1].madvise(mmap.MADV_WILLNEED)
    return memoryview(maps[-1])


# The members, the sha256 of each where they were read, and where each starts in the single-file form.
Opened = tuple[dict[str, memoryview], dict[str, str], dict[str, int]]


def _open_file(path: Path, maps: list[mmap.mmap], verify: bool) -> Opened:
    data = _map(path, maps)
    zipfile_io.check_ends(data, str(path))
    members = zipfile_io.read_members(data, str(path))
    digests = zipfile_io.check_digests(data, members, str(path)) if verify else {}
    starts = {name: m.offset for name, m in members.items()}
    return {name: data[m.offset : m.offset + m.size] for name, m in members.items()}, digests, starts


def _open_folder(path: Path, maps: list[mmap.mmap], verify: bool) -> Opened:
    if not (path / MANIFEST).is_file() or not (path / SEAL).is_file():
        raise PackageError(
            "not a tmlc package",
            where=str(path),
            fix="Give a folder or .tmlc file that `tmlc compile` wrote.",
        )
    members: dict[str, memoryview] = {}
    for file in sorted(path.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            continue
        name = check_member_name(file.relative_to(path).as_posix())
        if len(members) > zipfile_io.MAX_MEMBERS or not file.is_file() or file.is_symlink():
            raise PackageError(f"{name} does not belong to the package", where=str(path), fix=_AGAIN)
        if name != SEAL:
            members[name] = _map(file, maps)
    if (path / SEAL).read_bytes() != seal(bytes(members[MANIFEST])):
        raise PackageError("the manifest was altered or damaged", where=str(path), fix=_AGAIN)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()} if verify else {}
    return members, digests, {}
