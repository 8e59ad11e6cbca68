"""The difference of two programs in text form, as data: what a pass, an option or a newer compiler changed.

It reads lines, not programs, so that it costs no torch and works on packages of other versions. Where values lie in
the arena and which line of the model they come from is left out: it would drown what changed.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tmlc.errors import IRError

_PLACES = re.compile(r' @(?:arena=\[[\[\]\d, ]*\]|source="(?:[^"\\]|\\.)*")')
_METHOD = re.compile(r"method (\w[\w.]*)\((.*)\) \{")
_OP = re.compile(r"\s*%\w+ = (\w+)\(")
_NAMED = re.compile(r'(weight|state) ("(?:[^"\\]|\\.)*") (.*)')


@dataclass
class _Parts:
    """A program's text, taken apart."""

    lines: dict[str, str] = field(default_factory=dict)  # meta, facts, and every weight and state by its name
    methods: dict[str, list[str]] = field(default_factory=dict)


def diff_programs(before: str, after: str, context: int = 2) -> dict[str, Any]:
    """Compares two programs in text form.

    Returns:
        `changed` (one line each: [what, before, after], of facts, weights and states), and `methods`: for each one that
        differs `ops` {op: [count before, count after]} and `lines` (a unified diff with `context` lines around).

    Raises:
        IRError: a text is not a program.
    """
    one, two = _parts(before), _parts(after)
    changed = [
        [name, one.lines.get(name, ""), two.lines.get(name, "")]
        for name in dict.fromkeys([*one.lines, *two.lines])
        if one.lines.get(name) != two.lines.get(name)
    ]
    methods = {}
    for name in dict.fromkeys([*one.methods, *two.methods]):
        a, b = one.methods.get(name, []), two.methods.get(name, [])
        if a == b:
            continue
        then, now = _ops(a), _ops(b)
        ops = {op: [then[op], now[op]] for op in sorted({*then, *now}) if then[op] != now[op]}
        lines = list(difflib.unified_diff(a, b, "before", "after", lineterm="", n=context))[2:]
        methods[name] = {"ops": ops, "lines": lines}
    return {"changed": changed, "methods": methods}


def _parts(text: str) -> _Parts:
    if not text.startswith("tmlc-ir "):
        raise IRError("not a program in text form", fix="give a package, or a file that --dump wrote")
    found = _Parts()
    body: list[str] | None = None
    for raw in text.splitlines()[1:]:
        line = _PLACES.sub("", raw)
        method, named = _METHOD.match(line), _NAMED.match(line)
        if method:
            body = found.methods.setdefault(method[1], [f"({method[2]})"])
        elif line == "}":
            body = None
        elif body is not None:
            body.append(line.strip())
        elif named:
            found.lines[f"{named[1]} {named[2]}"] = named[3]
        elif line.startswith(("meta ", "facts")):
            kind, _, rest = line.partition(" ")
            found.lines[kind] = rest
    return found


def _ops(lines: list[str]) -> Counter[str]:
    return Counter(found[1] for line in lines if (found := _OP.match(line)))
