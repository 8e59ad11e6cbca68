"""The aten graph of a foreign model, made plain: no-ops and in-place forms are gone, and every node can say where it
comes from. Names of operations are short: `mul` for aten.mul.Tensor and its in-place form, `reshape` for all views.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from tmlc.errors import FrontendError

_RENAMED = {"view": "reshape", "_unsafe_view": "reshape", "__and__": "bitwise_and", "__or__": "bitwise_or"}
_DEAD = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
_NO_OPS = {"alias", "detach", "contiguous", "clone", "lift_fresh", "lift_fresh_copy"}
_CASTS = {"to", "_to_copy", "type_as"}
_VIEWS = {"reshape", "transpose", "permute", "unsqueeze", "squeeze", "slice", "expand", "select", "split_with_sizes",
          "split", "chunk", "getitem", "t"}  # fmt: skip


def name_of(node: object) -> str:
    """Short name of what a node calls; "" for anything but a call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        plain = node.target._schema.name.partition("::")[2]
        plain = plain if plain.startswith("__") else plain.removesuffix("_")
        return _RENAMED.get(plain, plain)
    return getattr(node.target, "__name__", str(node.target))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node (ints and SymInts); () for anything else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dtype_of(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def number(value: object) -> float | None:
    """A plain number, or None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def inputs_of(node: fx.Node, count: int) -> tuple[Any, ...]:
    """The first `count` positional arguments, missing ones None."""
    return tuple(node.args[i] if i < len(node.args) else None for i in range(count))


def under(node: Any, *ops: str) -> Any:
    """The first argument of a call of one of `ops`; None for anything else."""
    return node.args[0] if name_of(node) in ops else None


def module_of(node: fx.Node) -> str:
    """Path of the module that a node was traced in, as the checkpoint names it (`model.layers.0.mlp`)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("model.") if stack else ""


def source_of(node: fx.Node) -> str:
    """`modeling_x.py:12`, the innermost line outside torch."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [f"{file.rpartition('/')[2]}:{line}" for file, line in found if "/torch/" not in file]
    return lines[-1] if lines else ""


def simplify(graph: fx.Graph) -> None:
    """Removes no-ops, empty parts and checks, and turns buffers that are filled piece by piece into a concatenation.

    Raises:
        FrontendError: a tensor is changed in place while something else still reads it.
    """
    for node in list(graph.nodes):
        if name_of(node) == "new_empty":
            _assembled(graph, node)
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        kind = name_of(node)
        if kind in _DEAD:
            graph.erase_node(node)
        elif kind and _changes(node):
            _read_what_was_changed(node, order)
            _refuse_shared(node, order)
        elif kind == "cat" and len(full := _not_empty(node.args[0])) == 1:
            node.replace_all_uses_with(full[0])
            graph.erase_node(node)
        elif kind and _is_no_op(node, kind):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _not_empty(parts: Any) -> list[fx.Node]:
    """Those of some tensors that have no size of 0."""
    return [part for part in parts if not any(isinstance(size, int) and size == 0 for size in shape_of(part))]


def _is_no_op(node: fx.Node, kind: str) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if kind in _NO_OPS:
        return True
    same = shape_of(node) == shape_of(source)
    if kind in _CASTS:
        return dtype_of(node) == dtype_of(source)
    if kind == "dropout":
        return bool(node.args[1] == 0 or node.args[2] is False)
    return kind in ("expand", "slice", "reshape") and same and shape_of(node) != ()


def _changes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _read_what_was_changed(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """After x.clamp_(…) whoever reads x reads the result: the graph of the plain op names it."""
    changed = node.args[0]
    if isinstance(changed, fx.Node):
        changed.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _refuse_shared(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """An in-place op reads as the plain one when no one looks at the memory it changes under another name."""
    changed, last = node.args[0], node
    while isinstance(changed, fx.Node):
        for user in changed.users:
            if user is not last and (_is_view(user) or order[user] > order[node]):
                raise FrontendError(
                    f"{node.target} changes {changed.name}, which {user.name} reads too",
                    where=f"{module_of(node)}, {source_of(node)}",
                    fix="the model cannot be compiled with this version of transformers",
                )
        last = changed
        changed = changed.args[0] if _is_view(changed) else None


def _is_view(node: fx.Node) -> bool:
    """Whether a node's memory is its first argument's (an item of a split is, one of a topk is not)."""
    name = name_of(node)
    return name in _VIEWS and (name != "getitem" or name_of(node.args[0]) in _VIEWS)


def _assembled(graph: fx.Graph, empty: fx.Node) -> None:
    """x = new_empty; x[..., :a] = p; x[..., a:] = q becomes x = cat([p, q], -1)."""
    rank, pieces, others = len(shape_of(empty)), [], []
    for user in empty.users:
        copies = list(user.users)
        if name_of(user) == "slice" and len(copies) == 1 and name_of(copies[0]) == "copy" and copies[0].args[0] is user:
            _, axis, start, stop, step = (*inputs_of(user, 4), user.args[4] if len(user.args) > 4 else 1)
            if axis != rank - 1 or step != 1:
                return
            pieces.append((start or 0, min(stop, shape_of(empty)[-1]), copies[0].args[1], copies[0], user))
        else:
            others.append(user)
    pieces.sort(key=lambda piece: piece[0])
    ends = [0, *(piece[1] for piece in pieces)]
    if not pieces or [piece[0] for piece in pieces] != ends[:-1] or ends[-1] != shape_of(empty)[-1]:
        return
    order = {node: at for at, node in enumerate(graph.nodes)}
    last = max((piece[3] for piece in pieces), key=order.__getitem__)
    if any(order[user] < order[last] for user in others):
        return
    with graph.inserting_after(last):
        whole = graph.call_function(torch.ops.aten.cat.default, ([piece[2] for piece in pieces], -1))
    whole.meta = dict(empty.meta)
    for user in others:
        user.replace_input_with(empty, whole)
    for _, _, _, copy, part in pieces:
        graph.erase_node(copy)
        graph.erase_node(part)
    graph.erase_node(empty)
