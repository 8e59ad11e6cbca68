"""Writes a package: to a temporary name beside its place, tensor by tensor, renamed when it is whole.

Whatever goes wrong (an error, Ctrl-C, a full disk), nothing stays behind and what stood at the place before
still does.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tmlc.errors import PackageError
from tmlc.package.fields import check_member_name
from tmlc.package.manifest import FileInfo, Manifest, parse_manifest
from tmlc.package.safetensors_io import PAGE, WeightItem, layout, stream
from tmlc.package.zipfile_io import ZipWriter

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
SEAL = "SHA256"  # in the folder form: protects the manifest, which protects every other file


class PackageWriter:
    """Context manager that writes one package. Leaving it without `finish` removes everything.

    Args:
        path: where the package shall stand; a package that is there already is replaced at the end.
        folder: write a folder instead of one file.

    Attributes:
        digest, size: of the package, once it is finished: `Package.digest`, and the bytes of all its files.
    """

    def __init__(self, path: str | Path, folder: bool = False) -> None:
        self.path, self.folder = Path(path), folder
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self.files: dict[str, FileInfo] = {}
        self.finished = False
        self.digest, self.size = "", 0
        self._made: list[Path] = []
        self._file: BinaryIO | None = None
        self._zip: ZipWriter | None = None

    def __enter__(self) -> "PackageWriter":
        if self.path.is_dir() and not (self.folder and replaceable(self.path)):
            raise PackageError(
                f"{self.path} is a folder",
                where="output",
                fix="Give another name, or remove the folder." if self.folder else "Give a file name.",
            )
        try:
            with disk_errors(self.path):
                self._made = make_parents(self.path)
                if self.folder:
                    self.temporary.mkdir()
                else:
                    self._file = open(self.temporary, "xb")
                    self._zip = ZipWriter(self._file)
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self.finished:
            self._clean()
            if isinstance(error, OSError) and error.errno in _FULL:
                raise _full(self.path) from error

    def add_bytes(self, name: str, data: bytes) -> None:
        """Adds a small file."""
        self._add(name, len(data), [data])

    def add_json(self, name: str, value: Any) -> None:
        """Adds JSON text, keys in the order given. NaN and Infinity are refused."""
        self.add_bytes(name, (json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n").encode())

    def add_weights(self, items: Iterable[WeightItem | tuple]) -> None:
        """Adds `weights.safetensors`.

        Args:
            items: `WeightItem`s or tuples (name, dtype, shape, producer). A producer is called when its
                tensor's turn has come and returns the bytes (array or buffer), or pieces of them one after
                the other.
        """
        tensors = [item if isinstance(item, WeightItem) else WeightItem(*item) for item in items]
        head, _, total = layout(tensors)
        self._add(WEIGHTS, len(head) + total, stream(tensors), PAGE)

    def finish(self, manifest: Manifest) -> Manifest:
        """Writes the manifest with the list of files, and puts the package in its place.

        Returns:
            The manifest as written.
        """
        manifest = replace(manifest, files=dict(self.files))
        data = manifest.to_bytes()
        parse_manifest(data)  # never write what the reader would refuse
        self._add(MANIFEST, len(data), [data], listed=False)
        with disk_errors(self.path):
            if self.folder:
                self._write_file(SEAL, [seal(data)])
                self.size = sum(info.bytes for info in self.files.values()) + len(data) + len(seal(data))
                swap_folder(self.temporary, self.path)
            else:
                assert self._zip is not None and self._file is not None
                self._zip.finish()
                self.size = self._file.tell()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self.temporary, self.path)
        self.finished = True
        self.digest = hashlib.sha256(data).hexdigest()
        return manifest

    def _add(
        self, name: str, size: int, pieces: Iterable[bytes | memoryview], align: int = 1, listed: bool = True
    ) -> None:
        check_member_name(name)
        if name in self.files or (listed and name in (MANIFEST, SEAL)):
            fix = f"Give each file a name of its own; {MANIFEST} and {SEAL} are written by `finish`."
            raise PackageError(f"{name} is in the package already", where="output", fix=fix)
        with disk_errors(self.path):
            if self._zip is not None:
                digest = self._zip.add(name, size, pieces, align)
            else:
                digest = self._write_file(name, pieces)
        if listed:
            self.files[name] = FileInfo(size, digest)

    def _write_file(self, name: str, pieces: Iterable[bytes | memoryview]) -> str:
        path = self.temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(path, "xb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _clean(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # closing flushes: on a full disk this fails too
                self._file.close()
        if self.folder:
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # it may never have been made
                self.temporary.unlink(missing_ok=True)
        remove_parents(self._made)


def make_parents(path: Path) -> list[Path]:
    """Makes the folders around `path` that are missing; those that were made, outermost first."""
    made: list[Path] = []
    try:
        for folder in reversed([parent for parent in path.parents if not parent.exists()]):
            folder.mkdir(exist_ok=True)
            made.append(folder)
    except BaseException:
        remove_parents(made)
        raise
    return made


def remove_parents(made: list[Path]) -> None:
    """Takes back what `make_parents` made, as far as nobody has put something there meanwhile."""
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()


def seal(manifest: bytes) -> bytes:
    """The text of the folder form's `SHA256` file (`sha256sum -c SHA256` reads it too)."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def swap_folder(temporary: Path, path: Path) -> None:
    """Puts a finished folder in its place; what stood there goes when the new one stands."""
    if not path.is_dir():
        os.rename(temporary, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    if old.is_symlink():
        old.unlink()  # the folder that it led to is another's
    else:
        shutil.rmtree(old)


def replaceable(path: Path) -> bool:
    """Whether a folder is a package, or empty."""
    return (path / MANIFEST).is_file() or not any(path.iterdir())


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _full(path: Path) -> PackageError:
    return PackageError(
        "the disk is full; nothing was left behind",
        where=str(path),
        fix="Free space there, or write the package to another disk.",
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about files into a PackageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path) from error
        raise PackageError(
            f"cannot write the package: {error.strerror or error}",
            where=str(path),
            fix="Give a place where you may write.",
        ) from error
