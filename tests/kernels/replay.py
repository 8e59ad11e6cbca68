"""Feeds kernel cases to kernels/cpu/fuzz/plan_replay.cpp: one stream of cases into several libraries at once."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "kernels/cpu/fuzz/plan_replay.cpp"


@dataclass(frozen=True)
class Target:
    """A library and the program that runs it; `heap` guards operands by poison (sanitized builds), `pages` by pages."""

    name: str
    program: Sequence[str | Path]
    library: Path
    guard: str = "pages"
    portable: bool = False
    threads: int = 1
    output: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def compile_replay(folder: Path, compiler: str, *flags: str) -> Path:
    """The driver; the library that it loads decides on the kernels."""
    target = folder / "plan_replay"
    command = [compiler, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, str(SOURCE), "-o", str(target), "-ldl"], check=True)
    return target


def host_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler


def replay(targets: Sequence[Target], cases: Iterable[Any], library: Any) -> int:
    """Runs every case on every target; returns their number. `library`, any loaded variant, numbers the operations.

    Raises AssertionError, with what it said, when a target did not like a case.
    """
    running = []
    for t in targets:
        command = [*t.program, t.library, t.guard, str(int(t.portable)), str(t.threads)]
        command += [] if t.output is None else [t.output]
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below, with the process)
        env = {**os.environ, **t.env}
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=said, stderr=said, env=env)
        running.append((t, process, said))
    count = 0
    for case in cases:
        stream = io.BytesIO()
        case.write(stream, library)
        for _, process, _ in running:
            try:
                process.stdin.write(stream.getbuffer())
            except BrokenPipeError:
                break  # it died: its last words are read below
        else:
            count += 1
            continue
        break
    wrong = []
    for t, process, said in running:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        said.seek(0)
        text = said.read()
        said.close()
        if code != 0:
            wrong.append(f"{t.name}: exit code {code}\n{text[-3000:]}")
    assert not wrong, "\n".join(wrong)
    return count
