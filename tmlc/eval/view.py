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
        _details(details, name, task, task["episodes"])
    words, clicks = view["words"], view["clicks"]
    rows = [
        _model(view),
        ("words", f"{percent(words['rate'])} of {words['of']} written words are heard as written"),
        ("clicks", f"{clicks['clicks']} at {clicks['edges']} edges of ticks that sound; {all_edges(clicks)}"),
        _played(view),
    ]
    return [grid(rows), scores, details]


def all_edges(clicks: dict[str, Any]) -> str:
    """What is said of the edges of ticks when all are looked at together."""
    if clicks["stand_out"] is None:
        return "too few of them to look at all together"
    verdict = "stand out" if clicks["stand_out"] else "do not stand out"
    rank, elsewhere, spread = (100 * clicks[name] for name in ("rank", "elsewhere", "spread"))
    return f"all together they {verdict}: rank {rank:.0f} %, elsewhere {elsewhere:.0f} ± {spread:.0f} %"


def data_tables(view: dict[str, Any]) -> list[RenderableType]:
    """Rates and times of one package on recordings of others."""
    details = table("recordings", "set", "what", "figure", "of")
    for name, figures in view["sets"].items():
        _details(details, name, figures, figures["recordings"])
    return [grid([_model(view), _played(view)]), details]


def _details(made: Any, name: str, figures: dict[str, Any], count: int) -> None:
    for what, rate in figures["rates"].items():
        made.add_row(name, what, percent(rate["rate"]), str(rate["of"]))
    for what, time in figures["times"].items():
        shown = f"median {time['median']:.4g}, p95 {time['p95']:.4g}, max {time['max']:.4g}"
        made.add_row(name, what, shown, str(time["of"]))
    for what, mean in figures.get("means", {}).items():
        low, high = mean["interval"]
        made.add_row(name, what, f"mean {mean['mean']:.3g} ({low:.3g} to {high:.3g})", str(mean["of"]))
    if figures["errors"]:
        made.add_row(name, "sessions that an error ended", str(figures["errors"]), str(count))


def _model(view: dict[str, Any]) -> tuple[str, str]:
    return "model", f"{view['model']} on {view['target']}, {view['precision']}"


def _played(view: dict[str, Any]) -> tuple[str, str]:
    speed = view["times_real_time"]
    return "played", f"{view['seconds']:.0f} s of conversation, {speed:.1f} times faster than real time"


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
