"""The JSON file of a profile: written so that a person can page through it, read back with its form checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tmlc.errors import UsageError
from tmlc.report.profile.parts import SCHEMA

MAX_BYTES = 256 << 20
Time = Annotated[float, Field(allow_inf_nan=False)]


class _Samples(BaseModel):
    model_config = ConfigDict(extra="forbid")
    every: Annotated[int, Field(ge=1)]
    step_ms: Annotated[list[Time], Field(min_length=1)]
    wait_ms: list[Time]
    between_calls_ms: list[Time]
    first_audio_ms: list[Time | None]
    stages_ms: dict[str, list[Time | None]]

    @model_validator(mode="after")
    def one_length(self) -> _Samples:
        columns: list[list[Any]] = [self.wait_ms, self.between_calls_ms, self.first_audio_ms, *self.stages_ms.values()]
        if any(len(column) != len(self.step_ms) for column in columns):
            raise ValueError("lists of samples differ in length")
        return self


class _Compared(BaseModel):
    """What a comparison reads of a profile; profile.schema.json describes all of it."""

    package: str
    digest: str
    ticks: int
    machine: dict[str, Any]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    preempted: int
    samples: _Samples


def profile_text(view: dict[str, Any]) -> str:
    """A profile as indented JSON, each list of numbers on one line."""
    text = json.dumps(view, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\n([-+.\deE,\snul]*?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def read_profile(path: Path) -> dict[str, Any]:
    """A profile that `profile_text` wrote, as far as a comparison needs it.

    Raises:
        UsageError: it cannot be read, is no profile, or one of another version.
    """
    fix = "give a JSON file that `tmlc profile PACKAGE -o STEM` of this version wrote"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"the file is larger than {MAX_BYTES >> 20} MiB", where=str(path), fix=fix)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the profile cannot be read: {error}", where=str(path), fix=fix) from error
    version = value.get("schema") if isinstance(value, dict) else None
    if version != SCHEMA:
        raise UsageError(f"this is no profile of version {SCHEMA}", where=str(path), fix=fix)
    try:
        return _Compared.model_validate(value).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ": ".join(str(part) for part in first["loc"])
        raise UsageError(f"the profile is damaged: {place}: {first['msg']}", where=str(path), fix=fix) from error
