"""What the compile cost in quality, beside the speed: from the package's own record, and from `tmlc eval --json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tmlc.errors import UsageError, reason
from tmlc.report.layers import read_layer

MAX_BYTES = 64 << 20
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Task(BaseModel):
    model_config = ConfigDict(extra="ignore")
    score: Number
    interval: tuple[Number, Number] | None = None


class _Eval(BaseModel):
    """What is read of the JSON form of `tmlc eval`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    version: Annotated[int, Field(alias="schema", ge=1, le=1)]
    model: str
    tasks: dict[str, _Task]


def read_scores(path: Path) -> dict[str, Any]:
    """The scores in a file of `tmlc eval`: {"model", "scores": {task: {"score", "interval"}}}.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    fix = "give a file that `tmlc eval … --json` wrote"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"the file is larger than {MAX_BYTES >> 20} MiB", where=str(path), fix=fix)
        found = _Eval.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"these are no scores: {place}: {first['msg']}", where=str(path), fix=fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the scores cannot be read: {reason(error)}", where=str(path), fix=fix) from error
    scores = {
        name: {"score": task.score, "interval": None if task.interval is None else list(task.interval)}
        for name, task in found.tasks.items()
    }
    return {"model": found.model, "scores": scores}


def quality(pipeline: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Any] | None) -> dict[str, Any] | str:
    """The record `quality` of a profile, or why there is none.

    `kl`, in nats: the sum over the layers of what rounding each of them alone does to the next-token distributions on
    the calibration text of the quantize pass; a layer that got a higher precision counts with the part of its squared
    error that is left. It is an estimate of the whole: effects of single layers add up only while they are small.
    """
    effects = [effect for record in pipeline for effect in _effects(record)]
    scores = None if evaluated is None else dict(evaluated["scores"])
    if not effects and scores is None:
        return (
            "the package's record has no effects on outputs (a quantize pass measures them with a budget and a "
            "calibration text), and no --quality was given"
        )
    against = f"the weights before rounding: sum over {len(effects)} layers, each rounded alone" if effects else ""
    told = "" if evaluated is None else f"scores of {evaluated['model']}"
    return {
        "kl": sum(effects) if effects else None,
        "against": "; ".join(part for part in (against, told) if part),
        "scores": scores,
    }


def _effects(record: Mapping[str, Any]) -> list[float]:
    """The effects that a quantize pass noted, each as it stands after what was spared."""
    notes = record.get("notes")
    if not str(record.get("pass")).startswith("quantize.") or not isinstance(notes, list):
        return []
    layers = [layer for note in notes if (layer := read_layer(note))]
    return [float(effect) * _left(layer) for layer in layers if (effect := layer["effect"])]


def _left(layer: Mapping[str, str | None]) -> float:
    """The part of a layer's effect that is left: it is taken to fall as the squared error of the weight does."""
    spared, error = layer["spared"], float(layer["error"] or 0.0)
    if spared is None:
        return 1.0
    words = spared.split()
    try:
        return (float(words[-1]) / error) ** 2 if error else 0.0
    except ValueError:
        return 0.0  # left as it is


def pass_records(pipeline: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The record `passes` of a profile. A package keeps no times, so that one input gives one package to the bit: how
    long a pass took is told by `tmlc compile`."""
    return [
        {
            "pass": record["pass"], "config": record.get("config", {}), "matches": record.get("matches"),
            "ops_before": record.get("ops_before"), "ops_after": record.get("ops_after"),
        }
        for record in pipeline
    ]  # fmt: skip
