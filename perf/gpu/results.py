"""What was measured so far, in one JSON file that is whole at any moment: a later command goes on where one stopped."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

VERSION = 3


class Results:
    """The file of a run.

    Args:
        path: read where it exists, and written whole by `save`.

    Raises:
        ValueError: the file is of another version or no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body: dict[str, Any] = {"version": VERSION, "runs": [], "steps": {}}
        if path.exists():
            self.body = json.loads(path.read_text("utf-8"))
            if self.body.get("version") != VERSION:
                raise ValueError(f"{path} is not of this version: write to another file")

    def get(self, job: str, step: str) -> dict[str, Any] | None:
        """What a step found; None where it has not run, or failed."""
        row = self.body["steps"].get(job, {}).get(step)
        return row if row is not None and "error" not in row else None

    def error(self, job: str, step: str) -> str:
        """Why a step failed; "" where it did not."""
        return str(self.body["steps"].get(job, {}).get(step, {}).get("error", ""))

    def has(self, job: str, step: str) -> bool:
        """Whether it ran, failed or not."""
        return step in self.body["steps"].get(job, {})

    def put(self, job: str, step: str, row: dict[str, Any]) -> None:
        """Keeps what a step found, or `{"error": why}`, and saves."""
        self.body["steps"].setdefault(job, {})[step] = {"at": now(), **row}
        self.save()

    def save(self) -> None:
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(self.body, indent=1) + "\n", "utf-8")
        new.replace(self.path)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
