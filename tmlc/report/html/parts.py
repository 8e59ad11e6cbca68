"""The pieces of HTML that the sections are made of: tables, figures with their names, legends. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tmlc.report.html.svg import escape


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, the number that it is sorted by, the colour of a chip before it."""

    shown: str
    value: float | None = None
    chip: str = ""
    long: bool = False


def section(name: str, title: str, lead: str, *body: str) -> str:
    """A section with an anchor; nothing when it has no body."""
    inside = "".join(body)
    if not inside:
        return ""
    told = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{told}{inside}</section>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[Cell | str]], label: str, sortable: bool = False) -> str:
    """A table in a box of its own that scrolls sideways. Columns whose cells carry a value are set to the right. Tables
    of names and values wrap instead.
    """
    lines = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    right = [bool(lines) and any(line[k].value is not None for line in lines) for k in range(len(head))]
    top = "".join(f'<th scope="col"{" class=n" if right[k] else ""}>{escape(name)}</th>' for k, name in enumerate(head))
    body = "".join("<tr>" + "".join(_cell(c, right[k]) for k, c in enumerate(line)) + "</tr>" for line in lines)
    look = ' class="sortable"' if sortable else ' class="pairs"' if len(head) == 2 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table{look}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell, right: bool) -> str:
    look = " class=n" if right else ' class="long"' if cell.long else ""
    value = f' data-v="{cell.value:.9g}"' if cell.value is not None else ""
    chip = f'<i class="{cell.chip}"></i>' if cell.chip else ""
    return f"<td{look}{value}>{chip}{escape(cell.shown)}</td>"


def facts(pairs: Iterable[tuple[str, str] | tuple[str, str, str]]) -> str:
    """Figures with their names above them, and a remark beside them."""
    out = []
    for name, value, *more in pairs:
        remark = f" <small>{escape(more[0])}</small>" if more else ""
        out.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{remark}</dd></div>")
    return f'<dl class="facts">{"".join(out)}</dl>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What the colours mean: class and name."""
    rows = "".join(f'<li><i class="{look}"></i>{escape(name)}</li>' for look, name in entries)
    return f'<ul class="legend">{rows}</ul>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def percent(share: float | None) -> Cell:
    return Cell("–" if share is None else f"{share:.1%}", -1.0 if share is None else share)
