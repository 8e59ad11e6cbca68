"""Files of a result: written under temporary names beside their places and renamed together when all are
done.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from tmlc.cli.common import check_output
from tmlc.errors import UsageError


class Outputs:
    """A set of files that appear together or not at all.

    Args:
        folder: where they go; made when it is missing, and removed again if it was made here and the work
            fails.
        names: the files that will be written.
        force: replace files that are already there; without it that is a UsageError before any work. So is a folder
            that nothing can be written into, and something that is no file in a file's place.
    """

    def __init__(self, folder: Path, names: list[str], force: bool) -> None:
        self.folder, self.names = folder, names
        if folder.exists() and not folder.is_dir():
            raise UsageError("the output is not a folder", where=str(folder), fix="give a folder with -o")
        taken = [name for name in names if (folder / name).exists()]
        if taken and not force:
            raise UsageError(
                f"the output already holds {', '.join(taken)}",
                where=str(folder),
                fix="choose another folder, or add --force to replace them",
            )
        for name in names:
            check_output(folder / name, force)
        self._made: list[Path] = []
        self._work: Path | None = None

    def path(self, name: str) -> Path:
        """Where to write the file `name` now."""
        assert self._work is not None and name in self.names
        return self._work / name

    def write(self, name: str, text: str) -> None:
        """The whole of a text file. A report names files, whose names may hold bytes that are no UTF-8: they are
        written as Python shows them (`\\udcff`), which in JSON means the same."""
        self.path(name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Outputs:
        missing = [p for p in (self.folder.absolute(), *self.folder.absolute().parents) if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)
        self._work = Path(tempfile.mkdtemp(prefix=".tmlc-", dir=self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._work is not None
        if isinstance(error, OSError) and str(error.filename or self._work).startswith(str(self._work)):
            error.filename = str(self.folder)  # nobody knows the temporary name
        try:
            if kind is None:
                for name in self.names:
                    if (self._work / name).exists():
                        os.replace(self._work / name, self.folder / name)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
            if kind is not None:
                for parent in reversed(self._made):
                    parent.rmdir()
