"""Folders that the model zoo makes. No torch is needed."""

from __future__ import annotations

from pathlib import Path

from tmlc.errors import UsageError


def require_unused(out: Path) -> None:
    """Raises UsageError where `out` is a file, or a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the output folder is not empty", where=str(out), fix="name a new folder, or remove this one")
