"""Kernels run in Triton's interpreter, in a child process that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton extra is not installed")

from tmlc.kernels.triton.worker import Interpreter, open_interpreter

sys.path.insert(0, str(Path(__file__).parent))  # triton_harness.py


@pytest.fixture(scope="session")
def machine() -> Iterator[Interpreter]:
    with open_interpreter() as interpreter:
        yield interpreter
