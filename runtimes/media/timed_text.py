"""Timed text: a YAML list of `{at: seconds, text: ...}`, what a person types and when, checked line by
line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from tmlc.errors import MediaError, shown
from tmlc.yaml_text import Loader, YamlFault, compose_yaml

FIX = 'write a list of entries like `- {at: 1.5, text: "hello"}`, in the order of time'


@dataclass(frozen=True)
class TimedText:
    """`text` is typed `at` seconds after the start."""

    at: float
    text: str


def read_timed_text(path: str | os.PathLike[str]) -> list[TimedText]:
    """Read a timed-text file.

    Raises:
        MediaError: unreadable, not YAML, not a list, unknown or missing or repeated keys, a time that is not
            a finite
            number ≥ 0 or goes back, a text that is not a non-empty string. The message names the line.
    """
    path = Path(path)
    try:
        root = compose_yaml(path.read_bytes())
    except OSError as error:
        raise MediaError(
            "no such timed-text file" if isinstance(error, FileNotFoundError) else str(error.strerror),
            where=str(path),
            fix="check the path",
        ) from error
    except YamlFault as error:
        raise MediaError(f"not YAML: {error.what}", where=error.within(path), fix=FIX) from error
    if root is None:
        return []
    if not isinstance(root, yaml.SequenceNode):
        raise MediaError("the timed text is not a list", where=_at(path, root.start_mark.line), fix=FIX)
    entries: list[TimedText] = []
    for node in root.value:
        entry = _entry(node, _at(path, node.start_mark.line))
        if entries and entry.at < entries[-1].at:
            raise MediaError(
                f"the time goes back from {entries[-1].at:g} s to {entry.at:g} s",
                where=_at(path, node.start_mark.line),
                fix=FIX,
            )
        entries.append(entry)
    return entries


def _entry(node: yaml.Node, where: str) -> TimedText:
    if not isinstance(node, yaml.MappingNode):
        raise MediaError("an entry is not a mapping", where=where, fix=FIX)
    loader = Loader("")
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in ("at", "text"):
            raise MediaError(f"unknown key {key!r} in an entry", where=where, fix=FIX)
        if key in values:
            raise MediaError(f"the key {key!r} stands twice in an entry", where=where, fix=FIX)
        try:
            values[key] = loader.construct_object(value_node, deep=True)
        except yaml.YAMLError as error:
            raise MediaError(f"the value of {key!r} cannot be read", where=where, fix=FIX) from error
    for key in ("at", "text"):
        if key not in values:
            raise MediaError(f"an entry has no {key!r}", where=where, fix=FIX)
    at, text = values["at"], values["text"]
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < 1e9:
        raise MediaError(f"the time {shown(at)} is not a number of seconds from 0 on", where=where, fix=FIX)
    if not isinstance(text, str) or not text:
        raise MediaError(
            f"the text {shown(text)} is not a string with something in it",
            where=where,
            fix="put the text in quotes",
        )
    return TimedText(float(at), text)


def _at(path: Path, line: int) -> str:
    return f"{path}, line {line + 1}"
