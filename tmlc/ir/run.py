"""Runs a program in eager PyTorch through the reference ops: what passes and engines are checked against."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from tmlc.errors import ContextFullError, InputError, SessionError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.types import TensorType
from tmlc.ir.weights import TensorSource

__all__ = ["ProgramRunner", "RunnerSession", "one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch may sum in another order with another number of threads; what decides or enters a package must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ProgramRunner:
    """A program with the values of its weights, which are made when first used and then kept.

    Args:
        program: stateless or stateful.
        source: the checkpoint tensors, by name.
    """

    def __init__(self, program: Program, source: TensorSource) -> None:
        self.program, self._source = program, source
        self._weights: dict[str, torch.Tensor] = {}
        self._last_use = {name: _last_uses(method) for name, method in program.methods.items()}

    def weight(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            self._weights[name] = self.program.weights.evaluate(name, self._source)
        return self._weights[name]

    def session(self, watch: Callable[[fx.Node, Any], None] | None = None) -> RunnerSession:
        """Fresh states, all zero. `watch` gets every call's node and value, in order, as it is computed."""
        return RunnerSession(self, watch)


class RunnerSession:
    """The states of one conversation. A stateless program has none: each call is then a whole sequence."""

    def __init__(self, runner: ProgramRunner, watch: Callable[[fx.Node, Any], None] | None = None) -> None:
        self._runner, self._watch = runner, watch
        specs = runner.program.states.values()
        self.states = {s.name: torch.zeros(s.shape, dtype=s.type.torch_dtype) for s in specs}

    @torch.no_grad()
    def call(self, method: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs one method; inputs in the order of its placeholders. States are kept for the next call.

        n may exceed the method's max_n as far as the ring caches allow. Raises InputError for inputs that do
        not fit, and ContextFullError before any state changes when the bounded context would be passed.
        """
        program = self._runner.program
        if method not in program.methods:
            raise SessionError(f"no method {method!r}", fix=f"use one of {', '.join(program.methods)}")
        graph = program.methods[method].graph
        values = self._bind(program.methods[method], inputs)
        last_use = self._runner._last_use[method]
        for node in graph.nodes:
            if node.op == "call_function":
                args = fx.node.map_arg(node.args, values.__getitem__)
                values[node] = _apply(node.target, args)
                if self._watch is not None:
                    self._watch(node, values[node])
                for spent in last_use.get(node, ()):
                    del values[spent]
        return tuple(values[node] for node in program.methods[method].outputs)

    def _bind(self, method: Method, inputs: tuple[torch.Tensor, ...]) -> dict[fx.Node, Any]:
        nodes = method.inputs
        if len(inputs) != len(nodes):
            fix = f"give {', '.join(role(node)[1] for node in nodes)}, in this order"
            raise InputError(f"{len(inputs)} inputs given, {len(nodes)} needed", where=method.name, fix=fix)
        n: int | None = None
        values: dict[fx.Node, Any] = {}
        for node, tensor in zip(nodes, inputs, strict=True):
            n = _match(type_of(node), tensor, n, f"{method.name}.{role(node)[1]}")
            values[node] = tensor
        self._check_context(method, n or 1)
        for node in method.placeholders("weight"):
            values[node] = self._runner.weight(role(node)[1])
        for node in method.placeholders("state"):
            values[node] = self.states[role(node)[1]]
        return values

    def _check_context(self, method: Method, n: int) -> None:
        for node in method.calls("advance"):
            state, _, limit = node.args
            position = int(self.states[role(state)[1]])  # type: ignore[arg-type]
            if limit and position + n > limit:  # type: ignore[operator]
                raise ContextFullError(
                    f"{n} new positions after {position} pass the context of {limit}",
                    where=method.name,
                    fix="close the session, or compile with a larger context or the policy ring_with_sinks",
                )


def _apply(target: Any, args: tuple[Any, ...]) -> Any:
    if target is operator.getitem:
        return args[0][args[1]]
    spec = spec_of(target)
    assert spec is not None, f"{target} is not a canonical op; the verifier refuses it"
    return spec.reference(*args)


def _match(want: TensorType, tensor: torch.Tensor, n: int | None, where: str) -> int | None:
    """The n for which `tensor` has the wanted type (agreeing with the n found before)."""
    fits = tensor.dtype == want.torch_dtype and tensor.dim() == len(want.shape)
    for size, have in zip(want.shape, tensor.shape, strict=False):
        if isinstance(size, Dim) and n is None and (have - size.b) % size.a == 0:
            n = (have - size.b) // size.a
        fits = fits and have == (size.at(n or 0) if isinstance(size, Dim) else size)
    if not fits or (n is not None and n < 1):
        given = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        what = f"{given} is not {want}" + (f" with n = {n}" if n else "")
        raise InputError(what, where=where, fix="give it this dtype and shape, with the same n >= 1 in all inputs")
    return n


def _last_uses(method: Method) -> dict[fx.Node, list[fx.Node]]:
    """For each call, the values that nothing reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in method.graph.nodes:
        for value in (*node.all_input_nodes, node):
            last[value] = node
    spent: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if node.op == "call_function":
            spent.setdefault(node, []).append(value)
    return spent
