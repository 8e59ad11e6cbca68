"""`--check`: after every pass the program still answers as the traced model did, on the same inputs.

A stateless program is called once over whole sequences. A stateful one is streamed in chunks of uneven sizes and
must say the same as the original said for the whole sequence. The first pass beyond the tolerance is named, with the op
where the program before it and the program after it part, and the line of the model that this op comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tmlc.errors import CheckError
from tmlc.ir.dims import Dim, at
from tmlc.ir.ops import OPS, OpSpec, spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.run import ProgramRunner
from tmlc.ir.weights import TensorSource
from tmlc.pipeline.locate import Trace, first_difference

#: Largest |difference|, relative to the root mean square of the expected output, for a pass that keeps the numbers.
TOLERANCE = 1e-3
#: Root mean square of the difference, relative to that of the expected output, for a pass that rounds weights.
LOSSY_TOLERANCE = 0.1
CHUNKS = (1, 3, 2, 7, 5, 16)
MOST_POSITIONS = 320

_Outputs = dict[str, tuple[Tensor, ...]]


class Checker:
    """Holds inputs for every method and what the original program answers to them.

    Inputs are made from what the graphs say of them (ids inside the table, noise at speech level for PCM), and inputs
    that another method produces (`x`, `hidden`, `mel`) are taken from that method's answers.

    Args:
        program: as it came from the frontend (stateless).
        source: checkpoint tensors by name.
        positions: about how many positions each method sees (decode sees more, where a ring needs them to wrap).
        seed: of the inputs.
    """

    def __init__(self, program: Program, source: TensorSource, *, positions: int = 40, seed: int = 0) -> None:
        self._source = source
        generator = torch.Generator().manual_seed(seed)
        session = ProgramRunner(program, source).session()
        produced: dict[str, list[Tensor]] = {}
        names = program.meta.get("outputs", {})
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.expected: _Outputs = {}
        for method in program.methods.values():
            n = _calls_for(method, max(positions, _until_rings_wrap(method)))
            inputs = tuple(_input(node, n, produced.get(role(node)[1], []), generator) for node in method.inputs)
            self.inputs[method.name] = inputs
            self.expected[method.name] = session.call(method.name, *inputs)
            for name, value in zip(names.get(method.name, ()), self.expected[method.name], strict=False):
                produced.setdefault(name, []).append(value)

    def check(
        self,
        name: str,
        program: Program,
        *,
        lossy: bool = False,
        tolerance: float | None = None,
        before: Program | None = None,
    ) -> float:
        """Compares `program`, as pass `name` left it, and returns the largest error over all outputs. With the program
        `before` the pass, an error names the first op that went wrong.

        Args:
            lossy: the pass rounds on purpose: errors are root mean squares, and later passes are compared with it.
            tolerance: of a lossy pass, where it has its own.

        Raises:
            CheckError: an output moved beyond the tolerance, is not finite, has another shape, or a method is gone.
        """
        runner = ProgramRunner(program, self._source)
        worst, answers = 0.0, {}
        for method, expected in self.expected.items():
            if method not in program.methods:
                raise CheckError(f"{name} removed the method {method}", where=name, fix="a pass keeps every method")
            found = self._run(runner, program.methods[method])
            answers[method] = found
            try:
                for index, (have, want) in enumerate(zip(found, expected, strict=True)):
                    worst = max(worst, _compare(name, method, index, have, want[: len(have)], lossy, tolerance))
            except CheckError as error:
                place = self._first_difference(before, program, method, lossy) if before is not None else ""
                error.where = f"{name}, {place}" if place else name
                raise
        if lossy:
            self.expected = {m: tuple(v) for m, v in answers.items()}
        return worst

    def _first_difference(self, before: Program, after: Program, method: str, lossy: bool) -> str:
        if method not in before.methods:
            return ""
        traces = Trace(), Trace()
        for program, trace in zip((before, after), traces, strict=True):
            self._run(ProgramRunner(program, self._source), program.methods[method], trace)
        tolerance = LOSSY_TOLERANCE if lossy else TOLERANCE
        return first_difference(
            traces[0], after.methods[method], traces[1], lambda have, want: not _error(have, want, lossy) <= tolerance
        )

    def _run(self, runner: ProgramRunner, method: Method, trace: Trace | None = None) -> tuple[Tensor, ...]:
        watch = trace.note if trace is not None else None
        inputs = self.inputs[method.name]
        if not method.placeholders("state"):
            return runner.session(watch).call(method.name, *inputs)
        total = _calls_of(method, inputs)
        if method.calls("advance"):
            # At the bound of the context a streaming program forgets on purpose; before it, it must not.
            total = min(total, int(runner.program.meta["context"]["limit"]))
        session, parts, start = runner.session(watch), [], 0
        for count in _chunks(total, method.max_n):
            parts.append(session.call(method.name, *_slice(method, inputs, start, count)))
            start += count
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _compare(
    name: str, method: str, index: int, have: Tensor, want: Tensor, lossy: bool, bound: float | None
) -> float:
    where = f"{method}, output {index}"
    fix = f"this pass breaks the model: report it, and compile with --disable {name} until it is fixed"
    if have.shape != want.shape or have.dtype != want.dtype:
        what = f"{name} changed the shape of {where} from {tuple(want.shape)} to {tuple(have.shape)}"
        raise CheckError(what, where=name, fix=fix)
    error = _error(have, want, lossy)
    if not want.is_floating_point():
        tolerance = 1.0 if lossy else 0.0
    else:
        tolerance = (bound or LOSSY_TOLERANCE) if lossy else TOLERANCE
    if not error <= tolerance:
        raise CheckError(f"{name} changed {where}: error {error:.3g}, allowed {tolerance:.3g}", where=name, fix=fix)
    return error


def _error(have: Tensor, want: Tensor, lossy: bool) -> float:
    """The largest difference (of a lossy pass: its root mean square) by the scale of what was expected; of whole
    numbers the part that is wrong."""
    if not want.is_floating_point():
        return int((have != want).sum()) / max(1, want.numel())
    difference = (have - want).double()
    scale = max(float(want.double().square().mean().sqrt()), 1e-12)
    size = difference.square().mean().sqrt() if lossy else difference.abs().max()
    return float(size) / scale


def _calls_for(method: Method, positions: int) -> int:
    """An n for which the first output has about `positions` rows."""
    rows = type_of(method.outputs[0]).rows
    return max(2, positions // rows.a) if isinstance(rows, Dim) and rows.a else positions


def _until_rings_wrap(method: Method) -> int:
    """Positions after which the rings of the sliding layers have been around, within reason."""
    windows = [int(node.args[OPS["attention"].args.index("window")]) for node in method.calls("attention")]  # type: ignore[arg-type]
    return min(MOST_POSITIONS, max(windows) + method.max_n + 32) if any(windows) else 0


def _calls_of(method: Method, inputs: tuple[Tensor, ...]) -> int:
    for node, value in zip(method.inputs, inputs, strict=True):
        rows = type_of(node).rows
        if isinstance(rows, Dim) and rows.a:
            return (len(value) - rows.b) // rows.a
    return 1


def _chunks(total: int, most: int) -> Iterator[int]:
    index = 0
    while total > 0:
        count = min(CHUNKS[index % len(CHUNKS)], most, total)
        yield count
        total, index = total - count, index + 1


def _slice(method: Method, inputs: tuple[Tensor, ...], start: int, count: int) -> tuple[Tensor, ...]:
    parts = []
    for node, value in zip(method.inputs, inputs, strict=True):
        rows = type_of(node).rows
        parts.append(value[rows.a * start : rows.a * (start + count)] if isinstance(rows, Dim) else value)
    return tuple(parts)


def _input(node: fx.Node, n: int, produced: list[Tensor], generator: torch.Generator) -> Tensor:
    kind = type_of(node)
    shape = (at(kind.rows, n), int(kind.cols))
    fitting = [value for value in produced if value.shape[1] == shape[1] and value.dtype == kind.torch_dtype]
    if fitting:
        rows = torch.cat(fitting)
        return rows[torch.randint(len(rows), (shape[0],), generator=generator)]
    readers = {(spec.name, name): user for user in node.users for spec, name in _argument(user, node)}
    if kind.dtype == "u8":
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    if kind.dtype in ("i64", "i32"):
        users = [(argument, tuple[Any, ...](user.args)) for (_, argument), user in readers.items()]
        limits = [type_of(args[0]).shape[0] for argument, args in users if argument == "ids"]
        limits += [args[2] for argument, args in users if argument == "levels"]
        return torch.randint(min(limits, default=1 << 30), shape, generator=generator).to(kind.torch_dtype)
    if any(argument == "temperature" for _, argument in readers):
        return torch.zeros(shape)
    value = torch.randn(shape, generator=generator)
    if any(argument == "pcm" for _, argument in readers):
        return value * 0.2 * torch.rand(shape[0], 1, generator=generator)
    return value


def _argument(user: fx.Node, node: fx.Node) -> Iterator[tuple[OpSpec, str]]:
    spec = spec_of(user.target)
    if spec is not None:
        for name, value in zip(spec.args, user.args, strict=False):
            if value is node:
                yield spec, name
