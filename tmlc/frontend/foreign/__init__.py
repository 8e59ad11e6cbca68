"""Foreign decoders: a transformers model, traced with torch.export and matched to canonical ops.

The result is a Program like that of our own token models: `embed_text`, `decode`, `unembed`, `next_token`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tmlc.errors import FrontendError
from tmlc.frontend.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import fx

    from tmlc.ir.program import Program

#: Runtime defaults: such a checkpoint has none of its own.
CONTEXT, SINKS, MAX_APPEND = 4096, 16, 64
MATCH_RECORD = "canonicalize.foreign"


def families() -> tuple[str, ...]:
    """The model types that `load_foreign` takes."""
    from tmlc.frontend.foreign.model import FAMILIES

    return tuple(FAMILIES)


def runtime_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """limit, policy, sinks and max_append of a foreign decoder."""
    known = checkpoint.config.get("max_position_embeddings")
    limit = min(CONTEXT, known) if isinstance(known, int) and known > SINKS else CONTEXT
    return {"limit": limit, "policy": "ring_with_sinks", "sinks": SINKS, "max_append": MAX_APPEND}


def load_foreign(
    checkpoint: Checkpoint,
    context: Mapping[str, Any],
    tokenizer: str | None,
    on_progress: Callable[[str], None] | None = None,
) -> Program:
    """The stateless program of a checkpoint of one of `families()`.

    Raises:
        UsageError: transformers is not installed, or its version is outside the supported range.
        CheckpointError: the config is refused, or tensors are missing, extra or ill-shaped.
        FrontendError: the model was not understood; it lists the near misses.
    """
    from tmlc.frontend.foreign import attention, dense, experts
    from tmlc.frontend.foreign.lift import Lifter
    from tmlc.frontend.foreign.model import build, export
    from tmlc.frontend.foreign.rows import Param
    from tmlc.frontend.foreign.weights import ForeignWeights, tied_names
    from tmlc.ir.program import Method, PassRecord, Program
    from tmlc.ir.verify import verify

    assert attention and dense and experts  # importing them registers their matchers
    tell = on_progress or (lambda name: None)
    tell("config")
    model, notes = build(checkpoint)
    weights = ForeignWeights(checkpoint, model, tied_names(checkpoint, model))
    tell("export")
    exported = export(model)
    tell("match")
    lift = Lifter(exported.graph, exported.symbol, weights, exported.constants)
    for node, name in exported.parameters.items():
        lift.values[node] = Param(name, tuple(int(size) for size in node.meta["val"].shape))
    lift.run()
    results = next(node for node in reversed(exported.graph.nodes) if node.op == "output").args[0]
    x, hidden, logits = (lift.result(node) for node in results)
    most = int(context["max_append"])
    graphs = {
        "embed_text": _between(x, {}),
        "decode": _between(hidden, {x: "x"}),
        "unembed": _between(logits, {hidden: "hidden"}),
        "next_token": _between(logits, {hidden: "hidden"}, sample=True),
    }
    methods = {name: Method(name, graph, most) for name, graph in graphs.items()}
    meta: dict[str, Any] = {
        "kind": "tokens",
        "name": checkpoint.folder.resolve().name,
        "tick": {"duration_ms": 200, "text_out": 8, "eos": _eos(model)},
        "context": dict(context),
        "outputs": {"embed_text": ["x"], "decode": ["hidden"], "unembed": ["logits"], "next_token": ["ids"]},
        "tokenizer": tokenizer,
    }
    if notes:
        meta["notes"] = notes
    program = Program(methods, weights.map, meta=meta)
    program.weights.prune(program.used_weights())
    counts = match_counts(program)
    found = [f"{op}: {count}" for op, count in counts.items()]
    program.record.append(
        PassRecord(MATCH_RECORD, {"model_type": checkpoint.config["model_type"]}, sum(counts.values()), notes=found)
    )
    verify(program)
    return program


def match_counts(program: Program) -> dict[str, int]:
    """Calls of each canonical op in what was matched: `embed_text`, `decode` and `unembed`, by name."""
    methods = (program.methods[name] for name in ("embed_text", "decode", "unembed"))
    counts = Counter(node.target._schema.name.partition("::")[2] for m in methods for node in m.calls())  # type: ignore[union-attr]
    return dict(sorted(counts.items()))


def _between(result: fx.Node, given: Mapping[fx.Node, str], sample: bool = False) -> fx.Graph:
    """The graph that computes `result`, with the `given` values as its inputs; with `sample`, of a token from it."""
    from torch import fx

    from tmlc.frontend.trace import placeholder
    from tmlc.ir.dims import Dim
    from tmlc.ir.program import call, role
    from tmlc.ir.types import TensorType

    needed: set[fx.Node] = set()
    todo = [result]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [] if node in given else node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, name in given.items():
        copies[node] = placeholder(graph, name, ("input", name), node.meta["type"])
    if sample:
        extra = {"key": TensorType("i64", (Dim(1), 3)), "temperature": TensorType("f32", (Dim(1), 1))}
        inputs = [placeholder(graph, name, ("input", name), kind) for name, kind in extra.items()]
    for node in result.graph.nodes:
        if node not in needed or node in copies:
            continue
        if node.op == "placeholder" and role(node)[0] == "input" and given:
            raise FrontendError(
                "the layers read the tokens beside their embeddings",
                where=str(list(given.values())),
                fix="tmlc compiles models whose layers see embedded positions only",
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    last = copies[result]
    if sample:
        last = call(graph, "sample", (last, *inputs))
    if last.op == "placeholder":
        raise FrontendError("a method of the model computes nothing", where=last.name, fix="report the model")
    graph.output((last,))
    return graph


def _eos(model: Any) -> Sequence[int]:
    found = model.config.eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]
