"""The look of all reports: one style of table, one way to write bytes and milliseconds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def printable(text: str) -> str:
    """The text with control characters written as escapes: it keeps its one line, and no terminal obeys it."""
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def grid(rows: list[tuple[str, str]]) -> RenderableType:
    """Label and value, line by line."""
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 2))
    for label, value in rows:
        lines.add_row(Text(label, style="bold"), Text(printable(value)))
    return lines


def table(title: str, *columns: str) -> Any:
    """A table in the style of all reports. Its cells may name what a stranger has named."""
    from rich import box
    from rich.table import Table

    class Printable(Table):
        def add_row(self, *cells: Any, **style: Any) -> None:
            super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **style)

    made = Printable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, overflow="fold", no_wrap=index == 0)
    return made


def plain_text(parts: list[RenderableType], width: int = 110) -> str:
    """The tables as plain text for a file."""
    from rich.console import Console

    sink = io.StringIO()
    console = Console(file=sink, width=width, highlight=False, markup=False, force_terminal=False, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def megabytes(count: float) -> str:
    """Bytes for a person: 1 MB = 10^6 bytes."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count < 1e3:
        return f"{count:.0f} B"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def milliseconds(value: float | None) -> str:
    """A duration for a person; a dash for none."""
    return "–" if value is None else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"
