"""What rounding one weight does to the model's outputs: the measure behind `sensitivity: output`.

Token ids go through embed_text, decode and unembed, once as the program stands and once for each weight with this
weight alone rounded, all in one walk over the graphs: a weight is read when an op needs it and dropped after its last
reader, and a variant has values of its own only behind the weight that it rounds. So the checkpoint is read once, and
memory holds one weight, its rounded form, and the activations between two ops (for every id and variant); logits are
made for one variant after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tmlc.errors import PipelineError
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.quantize import SCHEMES, dequantised, row_chunks
from tmlc.ir.run import one_thread
from tmlc.ir.weights import TensorSource
from tmlc.passes.match import arg

CHAIN = ("embed_text", "decode", "unembed")

#: The value of a node in the program as it stands (key "") and with one weight rounded (its name), where that differs.
_Value = dict[str, Any]


def output_effects(
    program: Program,
    schemes: Mapping[str, str],
    source: TensorSource,
    ids: Sequence[int],
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Mean KL divergence, in nats, of the next-token distributions when one weight alone is rounded.

    Args:
        program: stateless; its methods embed_text, decode and unembed are chained.
        schemes: weight → scheme. Weights that the chain does not read are not in the result.
        ids: token ids to measure on.

    Raises:
        PipelineError: the program is no such chain, there are no ids, or one is outside the vocabulary.
    """
    _refuse(program)
    vocabulary = min(int(type_of(arg(node, "table")).shape[0]) for node in program.methods[CHAIN[0]].calls("embedding"))
    if not ids or any(not 0 <= token < vocabulary for token in ids):
        what = f"an id is outside the vocabulary of {vocabulary}" if ids else "there is no text to measure effects on"
        raise PipelineError(what, where="calibration", fix="give ids of some text in this model's tokens (128 do)")
    value: _Value = {"": torch.tensor(ids)[:, None]}
    with one_thread(), torch.no_grad():
        for name in CHAIN[:-1]:
            progress(f"measuring what rounding does to the outputs ({name}, {len(ids)} positions)")
            method = program.methods[name]
            value = _walk(method, {method.inputs[0]: value}, lambda node: _weight(program, node, schemes, source))
        effects, plain = {}, torch.empty(0)
        for key, logits in _logits(program, value, schemes, source):
            found = torch.log_softmax(logits.double(), -1)
            if key:
                effects[key] = float((plain.exp() * (plain - found)).sum(-1).mean().clamp(min=0.0))
            else:
                plain = found
    return effects


def _refuse(program: Program) -> None:
    what = ""
    if missing := [name for name in CHAIN if name not in program.methods]:
        what = f"the model has no method {missing[0]}"
    elif program.states:
        what = "the program has states"
    elif not program.methods[CHAIN[0]].calls("embedding"):
        what = "embed_text looks nothing up"
    elif odd := [name for name in CHAIN if len(program.methods[name].inputs) != 1]:
        what = f"{odd[0]} takes more than one input"
    if what:
        raise PipelineError(
            f"sensitivity `output` cannot be measured: {what}",
            where="sensitivity",
            fix="write `sensitivity: weight`, or put the pass before state.insert",
        )


def _walk(method: Method, values: dict[fx.Node, _Value], weight: Callable[[fx.Node], _Value]) -> _Value:
    """The method's first output in every variant; `values` holds its input, `weight` gives what else is read."""
    left = {node: len(node.users) for node in method.graph.nodes}
    for node in method.graph.nodes:
        if node.op != "call_function":
            continue
        for read in node.all_input_nodes:
            if read not in values:
                values[read] = weight(read)
        inputs = {read: values[read] for read in node.all_input_nodes}
        variants = dict.fromkeys(key for value in inputs.values() for key in value)
        values[node] = {key: _apply(node, inputs, key) for key in variants}
        for read in node.all_input_nodes:
            left[read] -= 1
            if not left[read]:
                del values[read]
        del inputs
    return values[method.outputs[0]]


def _logits(
    program: Program, hidden: _Value, schemes: Mapping[str, str], source: TensorSource
) -> Iterator[tuple[str, Tensor]]:
    """(variant, logits) one after the other, the program as it stands first: logits are the widest values there are."""
    method = program.methods[CHAIN[-1]]
    weights = {node: _weight(program, node, schemes, source) for node in method.placeholders("weight")}
    for key in dict.fromkeys(["", *hidden, *(key for value in weights.values() for key in value)]):
        given = {node: {"": value.get(key, value[""])} for node, value in weights.items()}
        given[method.inputs[0]] = {"": hidden.get(key, hidden[""])}
        yield key, _walk(method, given, given.__getitem__)[""]


def _apply(node: fx.Node, inputs: Mapping[fx.Node, _Value], key: str) -> Any:
    args: Any = fx.node.map_arg(node.args, lambda read: inputs[read].get(key, inputs[read][""]))
    if node.target is operator.getitem:
        return args[0][args[1]]
    spec = spec_of(node.target)
    assert spec is not None, f"{node.target} is not a canonical op; the verifier refuses it"
    return spec.reference(*args)


def _weight(program: Program, node: fx.Node, schemes: Mapping[str, str], source: TensorSource) -> _Value:
    name = role(node)[1]
    getattr(source, "release", lambda: None)()  # what was read before is not needed any more
    weight = program.weights.evaluate(name, source)
    return {"": weight, name: rounded(weight, schemes[name])} if name in schemes else {"": weight}


def rounded(weight: Tensor, scheme: str) -> Tensor:
    """What the codes of a weight stand for, float32."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    flat, filled = weight.reshape(-1, weight.shape[-1]), out.reshape(-1, weight.shape[-1])
    for rows in row_chunks(*flat.shape):
        dequantised(flat[rows].float(), SCHEMES[scheme], filled[rows])
    return out
