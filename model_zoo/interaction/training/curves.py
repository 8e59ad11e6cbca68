"""The curves of a training run, from its log, as a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from tmlc.errors import UsageError

PANELS = (
    ("vocoder", ("wave", "spectral")),
    ("model", ("text", "flow")),
    ("model", ("silent_right", "spoken_right")),
)


def draw(log: Path, out: Path) -> None:
    """Draws the losses and shares of `PANELS` over steps, each with a running mean.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("matplotlib is needed to draw the curves", fix="pip install 'tmlc[train]'") from error
    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if "begins" not in row and isinstance(value, float):
                series[row["stage"], key].append((row["step"], value))
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axis, (stage, names) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for name in names:
            points = series[stage, name]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, _smooth(values), label=name)
        axis.set_title(stage)
        axis.set_xlabel("step")
        if "text" in names or "wave" in names:
            axis.set_yscale("log")
        axis.legend()
    figure.savefig(out, dpi=100)


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    out: list[float] = []
    for value in values:
        held = out[-1] if out else value
        out.append(held if value != value else keep * held + (1 - keep) * value)
    return out
