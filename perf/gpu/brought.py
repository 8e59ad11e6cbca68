"""Machine code that is made before there is a GPU, and brought along: where one is lent for minutes, another version of
Triton may be installed than the one whose code is to be measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobs import Job

from tmlc.emit.triton.build import kept_folder, sources
from tmlc.errors import UsageError
from tmlc.report.gpu_plan import plan_on_meta
from tmlc.report.machine import installed

FACTS = "made.json"


def make(folder: Path, jobs: Iterable[Job], sm: int, tell: Callable[[str], None]) -> None:
    """Compiles the kernels of engines into a folder, without their weights.

    Raises EmitError where a kernel does not compile.
    """
    os.environ["TMLC_CACHE"] = str(folder / "cache")
    for job in jobs:
        view = plan_on_meta(job.preset, f"triton:sm{sm}", job.precision, pipeline=job.pipeline())
        tell(f"{job.name}: {view['variants']} variants, {len(view['spills'])} spill")
    kept = kept_folder()
    assert kept is not None
    for file in kept.glob("*.json"):
        file.replace(folder / file.name)
    shutil.rmtree(folder / "cache")
    facts = {"sources": sources(), "triton": installed("triton"), "sm": sm}
    (folder / FACTS).write_text(json.dumps(facts) + "\n", "utf-8")


def bring(folder: Path) -> dict[str, Any]:
    """Puts the machine code of a folder into this process's compile cache, where compilations find it. Returns what
    made it.

    Raises:
        UsageError: there is none, there is no cache, or the kernels have changed since.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no machine code", fix="make it with --make-kernels") from error
    kept = kept_folder()
    if kept is None or facts["sources"] != sources():
        why = "there is no compile cache" if kept is None else "the kernels have changed since"
        raise UsageError(f"the machine code of {folder} cannot be used: {why}", fix="make it again, or leave it out")
    kept.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.sm*.json"):
        shutil.copyfile(file, kept / file.name)
    return facts
