"""What errors advise: the options, verbs, documents and sections that they name are there."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from tmlc.cli.main import VERBS, cli

ROOT = Path(__file__).parents[2]
ROOMS = ("tmlc", "kernels", "passes", "model_zoo", "perf", "runtimes")
#: Options of programs that are not ours: pip and docker.
FOREIGN = {"--force-reinstall", "--upgrade", "--ulimit"}


@cache
def advised() -> tuple[tuple[str, ast.expr], ...]:
    """(place, expression) of all that is given as `fix`, or kept under a name for it."""
    found = []
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [to.id for to in node.targets if isinstance(to, ast.Name)] if isinstance(node, ast.Assign) else []
            if (isinstance(node, ast.keyword) and node.arg == "fix") or any("fix" in name.lower() for name in names):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.value))
    return tuple(found)


def advice() -> Iterator[tuple[str, str]]:
    """(place, text); values in a text are left out."""
    for place, node in advised():
        strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        yield place, "…".join(strings)


@cache
def options() -> set[str]:
    """Of every verb, and of the programs beside them."""
    found = set(FOREIGN)
    context = click.Context(cli)
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        commands = [command, *command.commands.values()] if isinstance(command, click.Group) else [command]
        found |= {name for c in commands for p in c.get_params(context) for name in (*p.opts, *p.secondary_opts)}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    return found


def test_no_advice_is_empty():
    assert len(advised()) > 500
    assert not [place for place, node in advised() if isinstance(node, ast.Constant) and not node.value]


@pytest.mark.parametrize(
    ("pattern", "known"),
    [(r"(?<![\w-])(--[a-z][\w-]*)", options), (r"`tmlc ([a-z]+)\b", lambda: set(VERBS))],
    ids=["options", "verbs"],
)
def test_what_advice_names_is_there(pattern, known):
    named = {(place, name) for place, text in advice() for name in re.findall(pattern, text)}
    assert named and not {(place, name) for place, name in named if name not in known()}


def test_documents_that_advice_names_have_these_sections():
    named = 0
    for place, text in advice():
        for document, section in re.findall(r"(docs/[\w-]+\.md)(?:,? \(?“([^”]+)”)?", text):
            named += 1
            lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
            titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
            assert not section or section in titles, f"{place}: {document} has no section {section}"
    assert named > 15
