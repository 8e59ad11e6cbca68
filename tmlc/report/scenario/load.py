"""What else runs on the machine while a case is played: `python -m tmlc.report.scenario.load KIND [PACKAGE THREADS]` in
processes of its own, which end with the one that started them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.errors import KernelError
from tmlc.processes import python_module
from tmlc.report.scenario.case import Load

BYTES = 256 << 20
"""What a process of kind `memory` reads over and over: more than a cache holds."""
READY = "ready"


@contextmanager
def background_load(loads: Sequence[Load], package: Path) -> Iterator[None]:
    """Runs the loads meanwhile; inside, all of them are at work.

    Raises:
        KernelError: one did not start; its last line is in the message.
    """
    running: list[subprocess.Popen[str]] = []
    try:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        for load in loads:
            arguments = (load.kind, load.nice, load.path or package, load.threads)
            command = python_module("tmlc.report.scenario.load", *arguments)
            running += [subprocess.Popen(command, text=True, **pipes) for _ in range(load.count)]
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != READY:
                told = (process.communicate()[1].strip().splitlines() or ["no message"])[-1]
                raise KernelError(
                    f"a background load did not start: {told}",
                    where="load",
                    fix="correct the case, or leave its load out",
                )
        yield
        for process in running:
            if process.poll() is not None:
                raise KernelError("a background load ended before the case", where="load", fix="play the case again")
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _end_with_the_parent() -> None:
    """The parent keeps the other end of stdin open as long as it lives."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _at_work() -> None:
    print(READY, flush=True)


def _busy() -> None:
    value = 1
    _at_work()
    while True:
        value = (value * 6364136223846793005 + 1442695040888963407) % (1 << 64)


def _memory() -> None:
    block = np.ones(BYTES // 8, np.float64)
    _at_work()
    while True:
        block.sum()


def _model(package: str, threads: int) -> None:
    import tmlc

    with tmlc.load(package, threads=threads, sessions=1) as engine:
        random = np.random.default_rng(0)
        samples = engine.layout.audio_in * engine.layout.hop
        _at_work()
        while True:
            with engine.session() as session:
                for _ in range(600):
                    audio = random.normal(0, 0.1, samples).astype(np.float32) if samples else None
                    session.tick(tmlc.TickInput(audio=audio, tokens=() if samples else [0]))


def _child(kind: str, nice: int, package: str, threads: int) -> None:
    _end_with_the_parent()
    os.nice(nice)
    if kind == "model":
        _model(package, threads)
    elif kind == "memory":
        _memory()
    else:
        _busy()


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
