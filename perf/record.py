"""The file of recorded figures, perf/results/<machine>.json, and its table: what a run of a part of perf/ measured
takes the place of what the same tests measured before, and everything else stays.

Each figure says which test measured it, when, beside what load, and with which options. A figure of another machine
(the same processor with another system, say) carries that machine's description, and the table says so.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def merged(
    before: Mapping[str, Any] | None,
    now: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
    passed: Collection[str],
) -> dict[str, Any]:
    """The content of the file after a run.

    Args:
        before: its content until now; None where there is none.
        now: `date`, `machine`, and facts, of this run.
        figures: of this run; each has `name` and `test`.
        passed: tests that ran to their end. All older figures of theirs go; of a test that failed half-way, or of a
            file from before figures named their tests, go those that were measured again under the same name.
    """
    old = dict(before or {})
    again = {(figure["test"], figure["name"]) for figure in figures} | {(None, figure["name"]) for figure in figures}
    kept = [
        figure
        for figure in old.get("figures", [])
        if figure.get("test") not in passed and (figure.get("test"), figure["name"]) not in again
    ]
    facts = {key: value for key, value in old.items() if key != "load_average"}
    return {**facts, **now, "figures": [*(_as_of(figure, old, now) for figure in kept), *map(dict, figures)]}


def _as_of(figure: Mapping[str, Any], old: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An older figure with its own date, load and machine, wherever they differ from those of the file now."""
    made = {**figure, **{key: figure.get(key, old.get(key)) for key in ("date", "load_average")}}
    machine = figure.get("machine", old.get("machine"))
    made.pop("machine", None)
    return made if machine == now["machine"] else {**made, "machine": machine}


def read(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(path: Path, body: Mapping[str, Any]) -> None:
    """The file, and the table beside it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(body), encoding="utf-8")


def markdown(body: Mapping[str, Any]) -> str:
    """The figures as a table, for a page."""
    box = body["machine"]
    lines = [
        f"`make perf` on {box['cpu']}, {box['cores']} cores ({box['system']}, Python {box['python']}).",
        "", "| figure | value | target | | measured | load average |", "| --- | ---: | ---: | --- | --- | ---: |",
    ]  # fmt: skip
    others: list[Mapping[str, Any]] = []
    for f in body["figures"]:
        target = "" if f["target"] is None else f"≤ {f['target']:g} {f['unit']}"
        met = {None: "", True: "met", False: "missed"}[f["met"]]
        name, when = f["name"], f["date"]
        if f.get("options"):
            name += f" ({f['options']})"
        if "machine" in f:
            others += [] if f["machine"] in others else [f["machine"]]
            when += f" on another machine ({others.index(f['machine']) + 1})"
        lines.append(f"| {name} | {f['value']:.4g} {f['unit']} | {target} | {met} | {when} | {f['load_average']:.1f} |")
    lines += [f"\n({k}) {_differing(other, box)}" for k, other in enumerate(others, 1)]
    return "\n".join(lines) + "\n"


def _differing(other: Mapping[str, Any], box: Mapping[str, Any]) -> str:
    """In what another machine is another."""
    parts = [key for key in {**box, **other} if box.get(key) != other.get(key)]
    return ", ".join(f"{key} {other.get(key)} instead of {box.get(key)}" for key in parts)
