"""What a profile finds out beside the session that it plays: other packages, other numbers of sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.report.ablate import ablation
from tmlc.report.profile.parts import Parts
from tmlc.report.scenario.case import Case
from tmlc.report.scenario.held import sessions_held
from tmlc.runtimes.media.recording import TickShape

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

Load = Callable[[Path, int], "Engine"]
Report = Callable[[str, int, int], None]


def add_ablation(
    view: dict[str, Any],
    engine: Engine,
    checkpoint: Path,
    names: Sequence[str],
    load: Load,
    case: Case,
    shape: TickShape,
    report: Report,
) -> None:
    """Fills `ablation`; `names`: passes, as `check_ablation` gave them."""
    seed = int(view["inputs"]["seed"])
    closed = case.model_copy(update={"loop": "closed"})

    def other(path: Path) -> Engine:
        return load(path, case.sessions)

    Parts.add(view, "ablation", ablation(engine, checkpoint, names, other, closed, shape, seed, report))


def add_sessions_held(
    view: dict[str, Any], package: Path, load: Load, case: Case, shape: TickShape, step_ms: float, report: Report
) -> None:
    """Fills `sessions_held`."""
    found = sessions_held(lambda sessions: load(package, sessions), case, shape, step_ms, report)
    Parts.add(view, "sessions_held", found)
