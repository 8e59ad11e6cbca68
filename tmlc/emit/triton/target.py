"""NVIDIA GPUs through Triton, compiled ahead of time: `triton:sm90`, or several at once: `triton:sm80+sm90`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmlc.emit.graph import slot_layout
from tmlc.emit.targets import Coverage, Emitted, Progress, Target
from tmlc.errors import EmitError, TargetError
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Program
from tmlc.ir.quantize import SCHEMES
from tmlc.ir.weights import TensorSource

try:
    import triton
except ImportError as error:
    raise TargetError(
        "target triton needs Triton, which is not installed", where="--target",
        fix="Install it with: pip install 'tmlc[triton]'.",
    ) from error  # fmt: skip

from tmlc.emit.triton.build import build_variants
from tmlc.emit.triton.chains import chains_of, glue
from tmlc.emit.triton.lower import MethodLowering
from tmlc.emit.triton.plan import PLAN, cubin_name, launches_json, least_driver, plan_json, variants_json
from tmlc.emit.triton.weights import TritonWeight, stored_weights
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Launch, Pointer, Variant
from tmlc.kernels.triton.overlap import OVERLAP_FROM
from tmlc.kernels.triton.registry import REFUSED, VIEWS, supported
from tmlc.kernels.triton.tuning import Tiles, table
from tmlc.kernels.triton.variants import Compiled
from tmlc.kernels.triton.versions import check_triton, doubts
from tmlc.runtimes.cuda.plan import code_name

FEATURES = ("triton.plan.v1", "weights.rows")
CHAINS, OVERLAP = "triton.chains.v1", "triton.overlap.v1"
NO_CHAINS = (
    "ticks run method by method, for there are no graphs of whole ticks: {lacking}; give calls room for all that a "
    "tick brings and says (--max-append), and memory.buckets the sizes"
)


@dataclass
class Lowerings:
    """A program's launches, before any kernel is compiled.

    Attributes:
        methods: one for each method of the program, in its order.
        buckets: of each method.
        launches: by architecture, method and bucket.
        chains: those between the methods of a tick, by architecture and chain.
        arena_bytes, scratch_bytes: what the largest bucket needs.
        notes: what whoever compiles should know.
    """

    methods: list[MethodLowering]
    buckets: dict[str, list[Bucket]]
    launches: dict[int, dict[str, dict[Bucket, list[Launch]]]] = field(default_factory=dict)
    chains: dict[int, dict[str, list[Launch]]] = field(default_factory=dict)
    arena_bytes: int = 0
    scratch_bytes: int = 0
    notes: tuple[str, ...] = ()

    def all(self, sm: int) -> list[Launch]:
        methods = [x for buckets in self.launches[sm].values() for found in buckets.values() for x in found]
        return methods + [x for found in self.chains[sm].values() for x in found]

    def variants(self) -> list[Variant]:
        """Every variant once, in order of first use."""
        found = (launch.variant(sm) for sm in self.launches for launch in self.all(sm))
        return list(dict.fromkeys(found))

    def weights(self) -> list[str]:
        """Stored tensors that launches read, in order of first use."""
        args = (arg for sm in self.launches for launch in self.all(sm) for arg in launch.args)
        return list(dict.fromkeys(arg.name for arg in args if isinstance(arg, Pointer) and arg.space == "weight"))


class TritonTarget(Target):
    """Machine code for named architectures, which the cuda runtime runs with nothing but the driver."""

    family = "triton"
    precisions = ("fp32", "bf16", "int8", "fp8", "int4")
    caches = ("fp32", "bf16", "int8")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        names = name.partition(":")[2].split("+")
        known = {f"sm{sm}": sm for sm in ARCHITECTURES}
        if unknown := [part for part in names if part not in known]:
            what = f"unknown architecture {unknown[0]!r}" if unknown[0] else "target triton needs an architecture"
            fix = f"Write triton:sm90, or several: triton:sm80+sm90. There are {', '.join(known)}."
            raise TargetError(what, where="--target", fix=fix)
        self.architectures = tuple(sorted({known[part] for part in names}))
        for sm in self.architectures:
            check_triton(sm, triton.__version__)
        self.tiles = table()

    def tune(self, file: Path) -> None:
        self.tiles = Tiles.read(file)

    def coverage(self, program: Program) -> list[Coverage]:
        """As of every target. With buckets, sizes count too: calls are lowered in the smallest and the largest."""
        counts: dict[tuple[str, str], int] = {}
        sources: dict[tuple[str, str], str] = {}
        for method in program.methods.values():
            for node in method.graph.nodes:
                spec = spec_of(node.target) if node.op == "call_function" else None
                if spec is not None:
                    key = method.name, spec.name
                    counts[key] = counts.get(key, 0) + 1
                    sources.setdefault(key, str(node.meta.get("source", "")))
        there = {**dict.fromkeys(VIEWS, "(view)"), **{op: op for op in supported()}}
        fix = "Use the pipeline of the target: --preset triton."
        refused = {key: EmitError(REFUSED.get(key[1], "no kernel"), fix=fix) for key in counts if key[1] not in there}
        if not refused and "buckets" in program.meta:
            refused = self._refusals(program)
        return [
            Coverage(
                *(key := (method, op)), count,
                None if key in refused else there[op], refused[key].what if key in refused else "", sources[key],
                refused[key].fix if key in refused else "",
            )
            for (method, op), count in counts.items()
        ]  # fmt: skip

    def _refusals(self, program: Program) -> dict[tuple[str, str], EmitError]:
        """Of each method and op the first call that no kernel takes."""
        found: dict[tuple[str, str], EmitError] = {}
        for lowering, buckets in self._methods(program):
            ends = min(buckets, key=_padded), max(buckets, key=_padded)
            for sm in self.architectures:
                for bucket in ends:
                    for op, error in lowering.refusals(bucket, sm, self.tiles):
                        found.setdefault((lowering.method.name, op), error)
        return found

    def _methods(self, program: Program) -> list[tuple[MethodLowering, list[Bucket]]]:
        """The methods of a program, ready to be lowered, each with its buckets."""
        states, _ = slot_layout(program)
        offsets = {state.name: state.offset for state in states}
        chosen = program.meta.get("buckets")
        if not isinstance(chosen, dict) or set(chosen) != set(program.methods):
            raise EmitError(
                "the program has no buckets", where="target triton", fix="Run memory.buckets as the last pass."
            )
        return [
            (MethodLowering(program, method, offsets), [Bucket(b, n) for b, n in chosen[method.name]])
            for method in program.methods.values()
        ]

    def lower(self, program: Program, tell: Progress = lambda stage, done, total: None) -> Lowerings:
        """All launches of a program, without compiling anything.

        Raises EmitError as `emit` does.
        """
        ready = self._methods(program)
        methods = [method for method, _ in ready]
        out = Lowerings(methods, {method.method.name: buckets for method, buckets in ready})
        total = len(self.architectures) * sum(map(len, out.buckets.values()))
        chains, lacking = chains_of(program, methods, out.buckets)
        if lacking:
            out.notes = (NO_CHAINS.format(lacking=lacking),)
        done = 0
        for sm in self.architectures:
            overlap = bool(program.meta.get("overlap")) and sm >= OVERLAP_FROM
            out.chains[sm] = {chain.key: _begun(glue(chain, sm), overlap) for chain in chains}
            for method in methods:
                name = method.method.name
                for bucket in out.buckets[name]:
                    tell("lowering to launches", done, total)
                    launches, scratch = method.launches(bucket, sm, self.tiles)
                    out.launches.setdefault(sm, {}).setdefault(name, {})[bucket] = _begun(launches, overlap)
                    out.arena_bytes = max(out.arena_bytes, method.arena_bytes(bucket))
                    out.scratch_bytes = max(out.scratch_bytes, scratch)
                    done += 1
        tell("lowering to launches", total, total)
        return out

    def emit(self, program: Program, source: TensorSource, tell: Progress) -> Emitted:
        lowered = self.lower(program, tell)
        variants = lowered.variants()
        compiled = build_variants(variants, lambda done, total: tell("compiling kernels", done, total))
        states, slot_bytes = slot_layout(program)
        stored = lowered.weights()
        numbers = {name: number for number, name in enumerate(stored)}
        methods = tuple(method.signature() for method in lowered.methods)
        plan = plan_json(
            lowered.methods,
            lowered.buckets,
            stored,
            self.architectures,
            slot_bytes,
            lowered.arena_bytes,
            lowered.scratch_bytes,
        )
        files: dict[str, Any] = {PLAN: plan}
        for sm in self.architectures:
            own = {variant: compiled[variant] for variant in variants if variant.sm == sm}
            places = {variant: number for number, variant in enumerate(own)}
            code = {
                name: {b.name: launches_json(launches, sm, places, numbers) for b, launches in buckets.items()}
                for name, buckets in lowered.launches[sm].items()
            }
            overlap = any(launch.overlap for launch in lowered.all(sm))
            driver = least_driver(sm, (figures.cubin for figures in own.values()), overlap)
            head = {"version": plan["version"], "driver": driver}
            chains = {
                key: launches_json(launches, sm, places, numbers) for key, launches in lowered.chains[sm].items()
            }
            body = {"variants": variants_json(own), "code": code} | ({"chains": chains} if chains else {})
            files[code_name(sm)] = {**head, **body}
            files.update((cubin_name(variant), figures.cubin) for variant, figures in own.items())
        weights = stored_weights(program, _program_weights(stored, program))
        caches = ["states.kv.int8"] if any(s.kind.startswith("kv_") and s.dtype == "u8" for s in states) else []
        return Emitted(
            plan=PLAN,
            layout="rows",
            files=files,
            weights=weights,
            methods=methods,
            states=states,
            slot_bytes=slot_bytes,
            arena_bytes=lowered.arena_bytes,
            scratch_bytes=lowered.scratch_bytes,
            features=(*FEATURES, *_coded(weights), *caches, *_needed(program, lowered)),
            producer={"triton": triton.__version__},
            notes=(*lowered.notes, *doubts(self.architectures, triton.__version__), *spills(compiled)),
        )


def _padded(bucket: Bucket) -> int:
    """Padded positions of a bucket."""
    return bucket.batch * bucket.n


def _needed(program: Program, lowered: Lowerings) -> list[str]:
    """What a runtime must know besides the plan."""
    chains = [CHAINS] if any(lowered.chains.values()) else []
    return chains + ([OVERLAP] if program.meta.get("overlap") else [])


def _begun(launches: list[Launch], overlap: bool) -> list[Launch]:
    return [launch.overlapping() for launch in launches] if overlap else launches


def spills(compiled: Mapping[Variant, Compiled]) -> tuple[str, ...]:
    """What to say of variants whose registers did not suffice; nothing where there are none."""
    found = sorted(
        f"{variant.kernel} on sm{variant.sm} {figures.spill_bytes} bytes a thread"
        for variant, figures in compiled.items()
        if figures.spill_bytes
    )
    if not found:
        return ()
    made = f"{len(found)} of {len(compiled)} kernel variants spill registers and are slower for it"
    return (f"{made}: {', '.join(found)}. Made by Triton {triton.__version__}; another version may do better.",)


def _coded(weights: Sequence[TritonWeight]) -> list[str]:
    """What a reader must know to use the weights: the codes among them."""
    return sorted({f"weights.rows.{SCHEMES[weight.scheme].precision}" for weight in weights if weight.scheme})


def _program_weights(stored: Sequence[str], program: Program) -> list[str]:
    """The weights whose stored tensors are named, in order."""
    names = [name if name in program.weights else re.sub(r"\.(scales|zeros)$", "", name) for name in stored]
    return list(dict.fromkeys(names))


TARGET = TritonTarget
