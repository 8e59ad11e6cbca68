"""The frontend: a checkpoint folder becomes a stateless Program.

`load_program` picks the architecture by `model_type`, compares the checkpoint with what the model needs, traces every
method, and lists where each weight comes from. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import CheckpointError, UsageError, shown
from tmlc.frontend.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from tmlc.frontend.model import Frontend, Stored
    from tmlc.ir.program import Program
    from tmlc.ir.types import TensorType
    from tmlc.ir.weights import WeightMap

__all__ = ["Checkpoint", "load_program", "open_checkpoint"]

TOKENIZER = "tokenizer.json"
_POLICIES = ("ring_with_sinks", "end")
_OVERRIDES = {"context": "limit", "policy": "policy", "sinks": "sinks", "max_append": "max_append"}


def _architectures() -> dict[str, Callable[[Checkpoint], Frontend]]:
    from tmlc.frontend.inkling import inkling2_loop_text, inkling2_text, inkling_mm, inkling_text
    from tmlc.frontend.interaction import interaction

    return {"tmlc_interaction": interaction, "inkling_text": inkling_text, "inkling_mm_model": inkling_mm,
            "inkling2": inkling2_text, "inkling2_text": inkling2_text, "inkling2_loop": inkling2_loop_text,
            "inkling2_loop_text": inkling2_loop_text}


def load_program(
    checkpoint: Checkpoint | str | Path,
    overrides: Mapping[str, Any] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Program:
    """Traces the model of a checkpoint.

    Args:
        checkpoint: an opened checkpoint, or its folder.
        overrides: of the runtime defaults: `context`, `policy`, `sinks`, `max_append` (None leaves one as it is).
        on_progress: gets the name of each method before it is traced.

    Raises:
        CheckpointError: unknown architecture, wrong config, or missing, extra or ill-shaped tensors.
        FrontendError: a method that cannot be traced.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    from tmlc.frontend.foreign import families, load_foreign, runtime_defaults
    from tmlc.frontend.model import Stored

    known, found = _architectures(), opened.config.get("model_type")
    if isinstance(found, str) and found in families():
        context = runtime_defaults(opened)
        _override(context, overrides)
        return load_foreign(opened, context, _tokenizer(opened), on_progress)
    if not isinstance(found, str) or found not in known:
        raise CheckpointError(
            f"unknown architecture: model_type is {shown(found)}",
            where=str(opened.folder / "config.json"),
            fix=f"tmlc compiles {', '.join((*known, *families()))}",
        )
    frontend = known[found](opened)
    _override(frontend.context, overrides)
    tensors = frontend.model.state_dict(keep_vars=True)
    expected: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, tensor in tensors.items():
        if name not in frontend.constants:
            for part in frontend.stored.get(name, Stored(name, tuple(tensor.shape))).parts:
                expected[part.tensor] = (part.shape, tensor.is_floating_point())
    opened.require(expected, frontend.ignore)
    return _trace(opened, frontend, {id(t): n for n, t in tensors.items()}, on_progress)


def _override(context: dict[str, Any], overrides: Mapping[str, Any] | None) -> None:
    """Puts the runtime defaults that a caller gave into a model's. UsageError for those that make no sense."""
    for name, value in (overrides or {}).items():
        if name not in _OVERRIDES:
            raise UsageError(f"unknown override {name!r}", fix=f"known: {', '.join(_OVERRIDES)}")
        least = 0 if name == "sinks" else 1
        if name == "policy" and value not in (None, *_POLICIES):
            fix = f"choose one of {', '.join(_POLICIES)}"
            raise UsageError(f"unknown context policy {value!r}", where="context_policy", fix=fix)
        if name != "policy" and value is not None and (type(value) is not int or value < least):
            raise UsageError(f"{name} is {value!r}", fix=f"give a whole number of positions, at least {least}")
        if value is not None:
            context[_OVERRIDES[name]] = value


def _tokenizer(checkpoint: Checkpoint) -> str | None:
    return TOKENIZER if (checkpoint.folder / TOKENIZER).is_file() else None


def _trace(
    checkpoint: Checkpoint, frontend: Frontend, names: dict[int, str], on_progress: Callable[[str], None] | None
) -> Program:
    from tmlc.frontend.trace import trace_method
    from tmlc.ir.program import Method, Program, role, type_of
    from tmlc.ir.verify import verify
    from tmlc.ir.weights import WeightMap

    weights, methods = WeightMap(), {}
    for name, method in frontend.methods.items():
        if on_progress is not None:
            on_progress(name)
        graph = trace_method(name, method.module, method.inputs, names)
        methods[name] = Method(name, graph, _max_n(graph, frontend.context["max_append"]))
        for node in methods[name].placeholders("weight"):
            weight = role(node)[1]
            if weight not in weights:
                _define(weights, weight, type_of(node), checkpoint, frontend)
    meta: dict[str, Any] = {
        "kind": frontend.kind,
        "name": frontend.name,
        "tick": frontend.tick,
        "context": frontend.context,
        "outputs": {name: list(method.outputs) for name, method in frontend.methods.items()},
        "tokenizer": _tokenizer(checkpoint),
    }
    if frontend.notes:
        meta["notes"] = list(frontend.notes)
    program = Program(methods, weights, meta=meta)
    verify(program)
    return program


def _define(weights: WeightMap, name: str, needed: TensorType, checkpoint: Checkpoint, frontend: Frontend) -> None:
    """Adds one parameter to the map: a checkpoint tensor, in the layout and dtype that the graph reads."""
    from tmlc.frontend.model import Stored

    if name in frontend.constants:
        weights.constant(name, frontend.constants[name])
        return
    # The traced model is a float32 one; quantize.cast decides later what the engine reads.
    stored = frontend.stored.get(name, Stored(name, ()))
    if len(stored.parts) == 1:
        _rows(weights, name, needed.dtype, checkpoint, stored)
        return
    parts = [
        _rows(weights, f"{name}.rows{number}", needed.dtype, checkpoint, part)
        for number, part in enumerate(stored.parts)
    ]
    weights.concat(name, parts)


def _rows(weights: WeightMap, name: str, dtype: str, checkpoint: Checkpoint, stored: Stored) -> str:
    """Adds what one checkpoint tensor gives to a parameter, as `name`; returns the name."""
    weight = checkpoint.weights[stored.tensor]
    if not stored.steps:
        return weight.declare(weights, name, dtype)
    at = weight.declare(weights, f"{name}.stored", weight.dtype)
    steps = [*stored.steps, *([("cast", {"dtype": dtype})] if weight.dtype != dtype else [])]
    for number, (op, args) in enumerate(steps, 1):
        at = weights.add(name if number == len(steps) else f"{name}.{op}{number}", op, [at], args)
    return at


def _max_n(graph: Any, max_append: int) -> int:
    """As many calls at once as make about `max_append` positions."""
    from tmlc.ir.dims import Dim

    (returned, *_) = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    inputs = [
        node.meta["type"].rows for node in graph.nodes if node.op == "placeholder" and node.meta["role"][0] == "input"
    ]
    rows = returned.meta["type"].rows
    growth = [size.a for size in inputs if isinstance(size, Dim)]
    if not isinstance(rows, Dim) or min(growth, default=1) == 1:
        return max_append
    return max(1, max_append // rows.a)
