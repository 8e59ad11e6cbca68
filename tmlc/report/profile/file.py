"""The JSON file of a profile: written so that a person can page through it, read back with its form checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tmlc.errors import UsageError, reason
from tmlc.report.profile.parts import SCHEMA
from tmlc.report.profile.sittings import STEP

MAX_BYTES = 256 << 20
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Sittings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ticks: Annotated[int, Field(ge=1)]
    figures: Annotated[dict[str, list[Time]], Field(min_length=1)]
    busy: Annotated[list[Time | None], Field(min_length=1)]

    @model_validator(mode="after")
    def whole(self) -> _Sittings:
        if any(len(values) != len(self.busy) for values in self.figures.values()):
            raise ValueError("figures of the sittings differ in length")
        if STEP not in self.figures:
            raise ValueError("the sittings have no step")
        return self


class _Compared(BaseModel):
    """What a comparison reads of a profile; profile.schema.json describes all of it."""

    package: str
    digest: str
    machine: dict[str, Any]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    sittings: _Sittings


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
        raise UsageError(f"the profile cannot be read: {reason(error)}", where=str(path), fix=fix) from error
    version = value.get("schema") if isinstance(value, dict) else None
    if version != SCHEMA:
        raise UsageError(f"this is no profile of version {SCHEMA}", where=str(path), fix=fix)
    if value.get("sittings", 0) is None:
        raise UsageError(
            "this profile has no sittings, so nothing says how far its figures move from one process to the next",
            where=str(path), fix="profile again without --sittings 0",
        )  # fmt: skip
    try:
        return _Compared.model_validate(value).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ": ".join(str(part) for part in first["loc"])
        raise UsageError(f"the profile is damaged: {place}: {first['msg']}", where=str(path), fix=fix) from error
