"""The figures of an evaluation for a person, and what of them is not good enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tmlc.report.tables import grid, table

if TYPE_CHECKING:
    from rich.console import RenderableType

ALLOWED_DROP = {"int4": 0.03}
"""How far a score may lie below the first package's, by precision; 0.01 for others."""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def tables(view: dict[str, Any]) -> list[RenderableType]:
    """Scores, rates and times of one package."""
    scores = table("scores (95 % interval)", "task", "score", "interval", "episodes")
    details = table("details", "task", "what", "figure", "of")
    for name, task in view["tasks"].items():
        low, high = task["interval"]
        scores.add_row(name, percent(task["score"]), f"{percent(low)} to {percent(high)}", str(task["episodes"]))
        for what, rate in task["rates"].items():
            details.add_row(name, what, percent(rate["rate"]), str(rate["of"]))
        for what, time in task["times"].items():
            shown = f"median {time['median']:.4g}, p95 {time['p95']:.4g}, max {time['max']:.4g}"
            details.add_row(name, what, shown, str(time["of"]))
        if task["errors"]:
            details.add_row(name, "sessions that an error ended", str(task["errors"]), str(task["episodes"]))
    words, clicks, speed = view["words"], view["clicks"], view["times_real_time"]
    rows = [
        ("model", f"{view['model']} on {view['target']}, {view['precision']}"),
        ("words", f"{percent(words['rate'])} of {words['of']} written words are heard as written"),
        ("clicks", f"{clicks['clicks']} at {clicks['edges']} edges of ticks that sound"),
        ("played", f"{view['seconds']:.0f} s of conversation, {speed:.1f} times faster than real time"),
    ]
    return [grid(rows), scores, details]


def comparison(views: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """All packages in one table: a row a task, a column a package, and the distance from the first."""
    made = table("scores, and points from the first", "task", *(f"{v['target']} {v['precision']}" for v in views))
    for name, task in views[0]["tasks"].items():
        cells = [percent(task["score"])]
        for view in views[1:]:
            score = view["tasks"][name]["score"]
            cells.append(f"{percent(score)} ({100 * (score - task['score']):+.1f})")
        made.add_row(name, *cells)
    return [made]


def fallen(views: Sequence[dict[str, Any]]) -> list[str]:
    """Scores that lie further below those of the first package than their precision may cost."""
    found = []
    for view in views[1:]:
        allowed = ALLOWED_DROP.get(view["precision"], 0.01)
        for name, task in view["tasks"].items():
            drop = views[0]["tasks"][name]["score"] - task["score"]
            if drop > allowed + 1e-9:
                shown = f"{100 * drop:.1f} points below {views[0]['target']} {views[0]['precision']}"
                found.append(f"{view['target']} {view['precision']}: {name} is {shown}")
    return found


def below(views: Sequence[dict[str, Any]], least: float) -> list[str]:
    """Scores below `least`, 0 to 1."""
    return [
        f"{view['target']} {view['precision']}: {name} is {percent(task['score'])}, below {percent(least)}"
        for view in views
        for name, task in view["tasks"].items()
        if task["score"] < least
    ]
