"""Whose folder is the current one: no process that tmlc starts imports from it."""

import ast
import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from tmlc import __version__
from tmlc.kernels.triton.worker import open_interpreter
from tmlc.processes import python_module, safe_path
from tmlc.runtimes.gateway.frames import FrameDecoder

ROOT = Path(__file__).parents[2]
PLANTED = ("json", "pickle", "socket", "numpy", "tmlc")


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A current folder full of traps; the file that they leave behind."""
    mark = tmp_path / "mark"
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit('planted {name}')\n")
    monkeypatch.chdir(tmp_path)
    return mark


def test_modules_of_tmlc_run_as_processes_are_those_that_are_installed(mark):
    done = subprocess.run(python_module("tmlc.cli.main", "--version"), capture_output=True, text=True, check=True)
    assert __version__ in done.stdout and not mark.exists()


def test_the_traps_work(mark):
    command = [part for part in python_module("tmlc.cli.main", "--version") if part != "-P"]
    assert subprocess.run(command, capture_output=True, check=False).returncode and mark.exists()


def test_the_interpreter_of_kernels_and_the_decoder_of_pictures_start(mark):
    open_interpreter(1 << 20).close()

    async def decoder() -> None:
        one = FrameDecoder(8, 8)
        try:
            await one.start()
        finally:
            one.close()

    asyncio.run(decoder())
    assert not mark.exists()


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_as_before_afterwards(monkeypatch, before):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    with safe_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ.get("PYTHONSAFEPATH") == before


def test_every_process_is_started_in_that_way():
    """A command line of Python's own stands in tmlc/processes.py alone."""
    found = []
    for room in ("tmlc", "passes", "kernels", "runtimes", "model_zoo"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "executable":
                    found.append(path.relative_to(ROOT).as_posix())
    assert set(found) == {"tmlc/processes.py"}
