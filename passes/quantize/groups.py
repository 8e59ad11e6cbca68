"""What quantize.int8, .int4 and .fp8 share: which weights get codes, what that costs, and which are spared."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field
from torch import fx

from tmlc.errors import PipelineError
from tmlc.ir.ops import OPS
from tmlc.ir.program import Program, replace, role, type_of
from tmlc.ir.quantize import SCHEMES, dequantised, row_chunks
from tmlc.ir.weights import TensorSource
from tmlc.passes.match import arg, fresh_name, op_of
from tmlc.passes.quantize.sensitivity import output_effects
from tmlc.pipeline.pass_base import NearMiss, PassConfig, PassContext, PassResult

#: The operands whose kernels read codes. Embeddings are looked up, not multiplied, and stay as they are.
_CODED = {("linear", "weight"), ("moe", "gate_up"), ("moe", "down")}
_FLOATS = ("f32", "bf16")


class GroupConfig(PassConfig):
    """Settings of these passes.

    Attributes:
        exclude: patterns (`*.head.*`) of weights to leave alone.
        budget: bytes that the worst layers may take more than at the plain precision, as a part of all quantised
            bytes: they get the next higher precision, in order of their error for each byte that this costs.
        sensitivity: what decides which layers are worst: `output`, how far the next-token distributions on the
            calibration text move when the layer alone is rounded; `weight`, the relative squared error of its weight.
            Default: `output` where there is a calibration text.
        calibration: token ids of text as the model will see it.
        report: measure the error of each layer (needs one more reading of the checkpoint; the budget needs it).
    """

    exclude: list[str] = Field(default_factory=list)
    budget: float = Field(default=0.0, ge=0.0)
    sensitivity: Literal["output", "weight"] | None = None
    calibration: list[int] = Field(default_factory=list, max_length=4096)
    report: bool = True


@dataclass
class Layer:
    """One weight that is to be quantised: where it is read, its scheme, and its error once that was measured."""

    name: str
    nodes: list[tuple[str, fx.Node]]
    scheme: str
    spare: str | None  # the scheme (None: left to quantize.cast) that a budget would buy
    error: float = 0.0
    spare_error: float = 0.0
    effect: float | None = None  # on the outputs, in nats, where that was measured

    @property
    def gain(self) -> float:
        """What a higher precision removes: of the squared error of the weight, or of its effect on the outputs (which
        is taken to fall as that squared error does)."""
        if self.effect is None:
            return self.error**2 - self.spare_error**2
        return self.effect * (1 - (self.spare_error / self.error) ** 2) if self.error else 0.0

    def nbytes(self, program: Program, scheme: str | None) -> int:
        shape = program.weights[self.name].shape
        rows = program.weights[self.name].type.numel() // shape[-1]
        return rows * shape[-1] * 2 if scheme is None else SCHEMES[scheme].nbytes(rows, shape[-1])


def run_groups(
    program: Program, ctx: PassContext, config: GroupConfig, schemes: dict[str, str], other: str, spares: dict[str, str]
) -> PassResult:
    """Quantises every weight that a kernel can read as codes.

    Args:
        schemes: by method, the scheme of a weight that only these methods read; `other` for the rest.
        spares: what a scheme is replaced by where the budget allows.
    """
    result = PassResult(program, 0)
    layers = _layers(program, config, schemes, other, spares, result)
    if config.report and ctx.source is not None:
        for number, layer in enumerate(layers):
            ctx.progress(f"measuring {layer.name} ({number + 1} of {len(layers)})")
            layer.error = _error(program, layer.name, layer.scheme, ctx.source)
            if config.budget > 0 and layer.spare is not None:
                layer.spare_error = _error(program, layer.name, layer.spare, ctx.source)
        if config.budget > 0 and (config.sensitivity or ("output" if config.calibration else "weight")) == "output":
            coded = {layer.name: layer.scheme for layer in layers}
            effects = output_effects(program, coded, ctx.source, config.calibration, ctx.progress)
            for layer in layers:
                layer.effect = effects.get(layer.name, 0.0)
    elif config.budget > 0:
        raise PipelineError(
            "a budget needs the checkpoint's values and `report: true`",
            where="budget",
            fix="run the pass on a checkpoint (`tmlc compile`), or leave the budget out",
        )
    spared = _spend(program, layers, config.budget)
    for layer in layers:
        scheme = layer.spare if layer.name in spared else layer.scheme
        if scheme is not None:
            _rewrite(program, layer, scheme)
            result.matches += 1
    measured = config.report and ctx.source is not None
    result.notes += _notes(program, layers, spared, measured)
    return result


def _layers(
    program: Program,
    config: GroupConfig,
    schemes: dict[str, str],
    other: str,
    spares: dict[str, str],
    result: PassResult,
) -> list[Layer]:
    readers: dict[str, list[tuple[str, fx.Node]]] = {}
    for method in program.methods.values():
        for node in method.placeholders("weight"):
            readers.setdefault(role(node)[1], []).append((method.name, node))
    layers = []
    for name, nodes in readers.items():
        if program.weights[name].dtype not in _FLOATS or any(fnmatchcase(name, p) for p in config.exclude):
            continue
        kinds = {kind for _, node in nodes for kind in _kinds(node)}
        if not kinds & {"coded", "shared_experts"}:
            continue
        reason = ""
        if "shared_experts" in kinds:
            reason = f"{name} belongs to shared_experts, which has no kernel for codes: run route.stack_experts before"
        elif kinds != {"coded"}:
            reason = f"{name} is also read by an op that needs its numbers ({', '.join(sorted(kinds - {'coded'}))})"
        if reason:
            result.near_misses += [NearMiss(method, node.name, reason) for method, node in nodes[:1]]
            continue
        wanted = {schemes.get(method, other) for method, _ in nodes}
        scheme = wanted.pop() if len(wanted) == 1 else other
        layers.append(Layer(name, nodes, scheme, spares.get(scheme)))
    return layers


def _kinds(node: fx.Node) -> set[str]:
    """How a weight is read: `coded` by kernels that take codes; router weights and lookups as they are."""
    kinds = set()
    for user in node.users:
        op = str(op_of(user))
        names = [name for name in OPS[op].args if arg(user, name) is node]
        routes = op == "linear" and any("router" in str(op_of(reader)) for reader in user.users)
        kinds.add("coded" if not routes and all((op, name) in _CODED for name in names) else op)
    return kinds


def _error(program: Program, name: str, scheme: str, source: TensorSource) -> float:
    """‖rounded - weight‖ / ‖weight‖, read in pieces."""
    weight = program.weights.evaluate(name, source)
    flat = weight.reshape(-1, weight.shape[-1])
    missed = total = 0.0
    for rows in row_chunks(*flat.shape):
        wide = flat[rows].float()
        rounded = torch.empty_like(wide)
        dequantised(wide, SCHEMES[scheme], rounded)
        missed += _total(rounded.sub_(wide).square_())
        total += _total(torch.mul(wide, wide, out=rounded))
    return (missed / total) ** 0.5 if total else 0.0


def _total(squares: torch.Tensor) -> float:
    return float(squares.sum(-1).double().sum())


def _spend(program: Program, layers: list[Layer], budget: float) -> set[str]:
    """The layers that get the higher precision: most error removed for each byte first, while the budget lasts."""
    left = budget * sum(layer.nbytes(program, layer.scheme) for layer in layers)
    price = {x.name: x.nbytes(program, x.spare) - x.nbytes(program, x.scheme) for x in layers}
    gain = {x.name: x.gain / max(price[x.name], 1) for x in layers}
    spared = set()
    for layer in sorted(layers, key=lambda x: -gain[x.name]):
        able = layer.spare is not None or SCHEMES[layer.scheme].bits == 8
        if able and layer.gain > 0 and price[layer.name] <= left:
            spared.add(layer.name)
            left -= price[layer.name]
    return spared


def _rewrite(program: Program, layer: Layer, scheme: str) -> None:
    coded = program.weights.quantize(fresh_name(program, f"{layer.name}.{scheme}"), layer.name, scheme)
    for method, node in layer.nodes:
        made = program.add_weight_input(method, coded)
        node.meta["type"] = type_of(made)
        replace(node, made)


def _notes(program: Program, layers: list[Layer], spared: set[str], measured: bool) -> list[str]:
    final = {x.name: x.spare if x.name in spared else x.scheme for x in layers}
    total = sum(x.nbytes(program, final[x.name]) for x in layers)
    counts: dict[str, int] = {}
    for name in final.values():
        counts[name or "kept"] = counts.get(name or "kept", 0) + 1
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    notes = [f"{total} bytes of codes, scales and spared weights in {len(layers)} layers ({kinds})"]
    if not measured:
        return [*notes, "errors were not measured"]
    for layer in sorted(layers, key=lambda x: (-(x.effect or 0.0), -x.error)):
        higher = "" if layer.effect is None else f", effect {layer.effect:.2e} nats"
        if layer.name in spared:
            higher += f", spared: {layer.spare} {layer.spare_error:.4f}" if layer.spare else ", spared: left as it is"
        notes.append(f"{layer.name}: {layer.scheme} relative error {layer.error:.4f}{higher}")
    return notes
