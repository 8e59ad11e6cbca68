"""Kernels that TensorRT for RTX compiles while a package is loaded, kept for the next load in a folder of the user's.

One file for each package, GPU and version of the library. What is in it is run on the GPU as it is, so the folder must
be one that nobody else can write to. Whether kernels fit the driver and the GPU that are there, TensorRT checks itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from tmlc.errors import UsageError

MAGIC = b"tmlc kernels 1\n"
DIGEST = 32
LARGEST = 1 << 30
FIX = "Name a folder of your own, e.g. one under your home folder."


class KernelFile:
    """Where the kernels of one package are kept.

    Args:
        folder: made where it is missing, with no rights for others.
        key: everything that kernels depend on: package, GPU, library, version.

    Raises:
        UsageError: it is no folder, another user's, or others can write to it.
    """

    def __init__(self, folder: Path, *key: str) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise UsageError(f"{folder} cannot be used: {error.strerror}", where="kernel_cache", fix=FIX) from error
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise UsageError(f"{folder} is another user's, and kernels are code", where="kernel_cache", fix=FIX)
        if os.name == "posix" and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            what = f"others can write to {folder}, and kernels are code"
            raise UsageError(what, where="kernel_cache", fix=f"{FIX} Or: chmod go-w {folder}")
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()
        self.path = folder / f"{name}.kernels"

    def read(self) -> bytes | None:
        """What was kept; None where there is nothing, or the file is not whole and will be written anew."""
        try:
            if self.path.stat().st_size > LARGEST:
                return None
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}", where="kernel_cache", fix=FIX) from error
        kept = data[len(MAGIC) + DIGEST :]
        whole = MAGIC + hashlib.sha256(kept).digest() == data[: len(MAGIC) + DIGEST]
        return kept if whole else None

    def write(self, kernels: bytes) -> None:
        """Keeps these. A load at the same time finds the old file or the new one, never a part."""
        temporary = None
        try:
            number, temporary = tempfile.mkstemp(prefix=".kernels-", dir=self.path.parent)
            with open(number, "wb") as file:
                file.write(MAGIC + hashlib.sha256(kernels).digest())
                file.write(kernels)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            what = f"{self.path.parent} cannot be written to: {error.strerror}"
            raise UsageError(what, where="kernel_cache", fix=FIX) from error
