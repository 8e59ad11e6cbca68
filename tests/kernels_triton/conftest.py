"""Kernels run in Triton's interpreter, in a child process that the tests of this folder share; in the slow suite they
also run as the PTX that they compile to, for four architectures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton extra is not installed")

from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.kernels.triton.worker import Interpreter, open_interpreter

sys.path.insert(0, str(Path(__file__).parent))  # triton_harness.py


@pytest.fixture(
    scope="session",
    params=["interpreter", *(pytest.param(f"ptx{sm}", marks=pytest.mark.slow) for sm in (80, 90, 100, 120))],
)
def machine(request: pytest.FixtureRequest) -> Iterator[Interpreter | PtxMachine]:
    name = request.param
    if name != "interpreter":
        from triton_harness import with_compiler_for

        with_compiler_for(int(name[3:]))
    with open_interpreter() if name == "interpreter" else PtxMachine(int(name[3:])) as opened:
        yield opened
