"""What the tests of passes share: run a pass over text IR, compare structures, compare numbers on random weights."""

import pytest
import torch

from tmlc.ir.run import ProgramRunner
from tmlc.ir.text import parse_program, print_program
from tmlc.ir.verify import verify
from tmlc.pipeline.check import Checker
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import Pipeline, Step


def parse(text):
    program = parse_program("tmlc-ir 1\n" + text)
    verify(program)
    return program


@pytest.fixture
def program_of():
    """Text without its first line → verified Program."""
    return parse


@pytest.fixture
def run_pass():
    """(pass name, program or text, settings) → the rewritten program; its record[-1] has matches and near misses."""

    def run(name, program, **config):
        before = parse(program) if isinstance(program, str) else program
        return run_pipeline(before, Pipeline("test", (Step(name, config),)))

    return run


def structure(program):
    lines = print_program(program, record=False, numbered=True).splitlines()
    return [line for line in lines if not line.startswith(("meta", "facts"))]


@pytest.fixture
def same_structure():
    """Asserts that a program prints like the expected text, values renumbered."""

    def check(program, expected):
        assert structure(program) == structure(parse(expected))

    return check


@pytest.fixture
def weights_for():
    """Random values for every checkpoint tensor that a program reads; keyword arguments override some by name."""

    def make(program, seed=0, **fixed):
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for _, entry in program.weights.items():
            if entry.op == "source":
                value = torch.randn(entry.shape, generator=generator).to(entry.type.torch_dtype)
                values[entry.srcs[0]] = fixed.get(entry.srcs[0], value)
        return values

    return make


@pytest.fixture
def equivalent():
    """Largest error of `after` against `before` on these weights; raises CheckError beyond the tolerance."""

    def check(before, after, weights, **kwargs):
        return Checker(before, weights, **kwargs).check("the pass", after)

    return check


@pytest.fixture
def stream():
    """(program, weights, method, inputs, chunk sizes) → the method's first output, streamed in one session."""

    def run(program, weights, method, inputs, chunks, session=None):
        session = session or ProgramRunner(program, weights).session()
        parts, start = [], 0
        for count in chunks:
            parts.append(session.call(method, inputs[start : start + count])[0])
            start += count
        return torch.cat(parts)

    return run
