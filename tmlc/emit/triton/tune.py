"""What `tmlc tune` does: the launches of an engine → candidates of block sizes → which of them build → the fastest.

No candidate changes the order in which a sum is added up: products keep their slices of inputs and a warp for each,
attention its keys at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tmlc.emit.targets import Progress
from tmlc.emit.triton.build import build_variants, frozen
from tmlc.emit.triton.plan import PLAN
from tmlc.emit.triton.target import OVERLAP, Lowerings
from tmlc.emit.triton.tune_timer import Sample, Timer
from tmlc.errors import CapacityError, EmitError, KernelError, PackageError, TargetError
from tmlc.kernels.triton.architectures import ARCHITECTURES, compile_for, running
from tmlc.kernels.triton.launch import TRITON_NAMES, Aligned, Argument, Launch, Pointer, Variant
from tmlc.kernels.triton.layouts import FORMS
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.overlap import OVERLAP_FROM
from tmlc.kernels.triton.tuning import Blocks, Shape, Tiles, rule, turn_constants, turns_at_once
from tmlc.kernels.triton.variants import Compiled
from tmlc.package.reader import Package
from tmlc.runtimes.cuda.driver import Driver
from tmlc.runtimes.cuda.plan import BucketInfo, Plan, architectures, code_name, read_plan

#: Kernels whose blocks a table chooses, and the arguments that are the m and k of a weight there.
KERNELS = {
    "linear_kernel": ("linear", "m", "k"),
    "moe_gate_up_kernel": ("moe_gate_up", "f", "k"),
    "moe_down_kernel": ("moe_down", "d", "k"),
    "moe_down_sum_kernel": ("moe_down", "d", "k"),
    "attention_kernel": ("attention", "dv", "d"),
}
MOST_POSITIONS = 16  # of the longer call that is measured: an append of a tick
NOISE = 0.01  # a candidate must be faster by more than this part than one listed before it
_CACHES = {4: "f32", 2: "bf16", 1: "u8"}
_DTYPES = {name: dtype for dtype, name in TRITON_NAMES.items()}


@dataclass
class Candidate:
    """Block sizes, what they cost, and how long they take (relative to the first candidate: below 1 is faster).

    `refused` says why they are out: spills, too much shared memory, no machine code, a launch that failed.
    """

    blocks: Blocks
    registers: int = 0
    spill_bytes: int = 0
    shared: int = 0
    refused: str = ""
    seconds: list[float] = field(default_factory=list)
    relative: float | None = None


@dataclass
class Tuned:
    """One shape: its candidates, the present choice first, and the fastest (None: nothing was measured)."""

    shape: Shape
    samples: list[Sample]
    candidates: list[Candidate]
    chosen: Blocks | None = None

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(c.blocks), **{k: v for k, v in asdict(c).items() if k != "blocks"}} for c in self.candidates]
        chosen = None if self.chosen is None else asdict(self.chosen)
        return {"shape": asdict(self.shape), "samples": [s.name for s in self.samples], "candidates": rows,
                "chosen": chosen}  # fmt: skip


# Which launches there are.


def lowered_samples(lowered: Lowerings, sm: int) -> list[tuple[Shape, Sample]]:
    """The launches of a compilation that a table has a say in."""
    found = []
    for name, buckets in lowered.launches[sm].items():
        for bucket in _measured([(b.batch, b.n) for b in buckets]):
            launches = next(made for b, made in buckets.items() if (b.batch, b.n) == bucket)
            found += _samples(name, bucket, launches, sm)
    return _once(found)


def package_samples(package: Package, sm: int) -> list[tuple[Shape, Sample]]:
    """The same of a package, which is checked as a runtime checks it.

    Raises:
        TargetError: the package has no machine code for the architecture.
        PackageError: its launches are not of the kernels that are installed here.
    """
    if PLAN not in package.names():
        made = ", ".join(package.manifest.targets)
        what = f"the package was compiled for {made}: it has no kernels to tune"
        raise TargetError(what, where=str(package.path), fix="give a checkpoint, or a package compiled for triton")
    plan_file = package.json(PLAN)
    if sm not in (held := architectures(plan_file)):
        there = ", ".join(f"sm{other}" for other in held)
        raise TargetError(f"the package has {there}, not sm{sm}", where="--target", fix="name what it was compiled for")
    plan = read_plan(plan_file, package.json(code_name(sm)), sm, package.tensors)
    found = []
    for name, method in plan.methods.items():
        for bucket in _measured([(b.batch, b.n) for b in method.buckets]):
            info = next(b for b in method.buckets if (b.batch, b.n) == bucket)
            try:
                launches = _unbound(plan, info)
                if OVERLAP in package.manifest.required_features and sm >= OVERLAP_FROM:
                    launches = [launch.overlapping() for launch in launches]
                found += _samples(name, bucket, launches, sm)
            except (KeyError, ValueError, TypeError) as error:
                raise PackageError(
                    "the package's kernels are not those of this version of tmlc", where=f"{package.path}, {name}",
                    fix="compile the checkpoint again, or tune the checkpoint",
                ) from error  # fmt: skip
    return _once(found)


def _unbound(plan: Plan, bucket: BucketInfo) -> list[Launch]:
    """A bucket's launches as the compiler had them."""
    made = []
    for info in bucket.launches:
        variant = plan.variants[info.variant]
        args: list[Argument] = []
        for arg, kind in zip(info.args, variant.signature, strict=True):
            base = kind.removesuffix(":16")
            if isinstance(arg, float):
                args.append(arg)
            elif isinstance(arg, int):
                args.append(Aligned(arg) if kind.endswith(":16") else arg)
            else:
                args.append(Pointer(arg.space, str(arg.which), arg.offset, _DTYPES[base[1:]], arg.nbytes))
        fixed = tuple(sorted((name, frozen(value)) for name, value in variant.constexprs.items()))
        made.append(Launch(variant.kernel, fixed, variant.num_warps, variant.num_stages, info.grid, tuple(args)))
    return made


def _measured(buckets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """One session with one position, and with the most positions that a tick appends."""
    alone = [n for batch, n in buckets if batch == 1 and n <= MOST_POSITIONS]
    return [(1, n) for n in sorted({min(alone), max(alone)})]


def _samples(method: str, bucket: tuple[int, int], launches: Sequence[Launch], sm: int) -> list[tuple[Shape, Sample]]:
    found: list[tuple[Shape, Sample]] = []
    sort: Launch | None = None
    for launch in launches:
        if launch.kernel == "moe_sort_kernel":
            sort = launch
        if launch.kernel in KERNELS:
            grouped = dict(launch.constexprs).get("GROUPED")
            found.append((shape_of(launch, sm), Sample(method, bucket, launch, sort if grouped else None)))
    return found


def shape_of(launch: Launch, sm: int) -> Shape:
    """What a table is asked for this launch."""
    op, m, k = KERNELS[launch.kernel]
    values, fixed = Sample("", (1, 1), launch).values(), dict(launch.constexprs)
    if op == "attention":
        dtype = _CACHES[fixed["ITEM"]]
    else:
        dtype = {(form.family, form.group): form.dtype for form in FORMS.values()}[fixed["FORM"], fixed["GROUP"]]
    return Shape(op, dtype, sm, int(values[m]), int(values[k]))  # type: ignore[arg-type]


def _once(found: Iterable[tuple[Shape, Sample]]) -> list[tuple[Shape, Sample]]:
    """One sample of each variant and grid: layers repeat."""
    seen: dict[Any, tuple[Shape, Sample]] = {}
    for shape, sample in found:
        launch = sample.launch
        seen.setdefault((shape, launch.variant(shape.sm), launch.grid), (shape, sample))
    return list(seen.values())


# Candidates.


def candidates(shape: Shape, tiles: Tiles) -> list[Blocks]:
    """Legal block sizes: what `tiles` chooses, what the rule does, and all others in ascending order."""
    usual = rule(shape)
    if shape.op == "attention":
        rows, warps, stages = [usual.block_m], [2, 4, 8], [1, 2, 3, 4]
    else:
        rows, warps, stages = [size for size in (16, 32, 64) if size <= power(shape.m, 16)], [usual.warps], [2, 3, 4]
    every = [Blocks(m, usual.block_k, w, s) for m in rows for w in warps for s in stages]
    return list(dict.fromkeys([tiles.blocks(shape), usual, *every]))


def with_blocks(launch: Launch, shape: Shape, blocks: Blocks) -> Launch:
    """The launch as it would be lowered if a table chose these blocks."""
    fixed, grid, stages = dict(launch.constexprs), launch.grid, blocks.stages
    if shape.op == "attention":
        fixed["BLOCK_J"] = blocks.block_k
    else:
        turns = turn_constants(shape.dtype, shape.k, blocks.block_k, shape.sm)
        fixed |= {"BLOCK_M": blocks.block_m, "BLOCK_K": blocks.block_k}
        fixed |= {name: value for name, value in turns.items() if name in fixed}
        more = grid[1] - -(-shape.m // dict(launch.constexprs)["BLOCK_M"])  # programs that make no tile
        grid = (grid[0], -(-shape.m // blocks.block_m) + more, grid[2])
        if launch.kernel == "moe_down_sum_kernel":
            stages = turns_at_once(shape.dtype, blocks, fixed["SLICES"], fixed["TOP_K"], grid[0] * grid[1], shape.sm)
    return replace(
        launch, constexprs=tuple(sorted(fixed.items())), grid=grid, num_warps=blocks.warps, num_stages=stages
    )


def build_candidates(
    found: Sequence[tuple[Shape, Sample]], tiles: Tiles, ops: Sequence[str], tell: Progress, jobs: int | None = None
) -> tuple[list[Tuned], dict[Variant, Compiled]]:
    """Every shape with its candidates, all compiled; those that spill, or want more shared memory than there is, are
    refused. Needs no GPU.

    Args:
        ops: of the table; () takes all.
    """
    shapes: dict[Shape, list[Sample]] = {}
    for shape, sample in found:
        if not ops or shape.op in ops:
            shapes.setdefault(shape, []).append(sample)
    tuned = [Tuned(s, made, [Candidate(b) for b in candidates(s, tiles)]) for s, made in sorted(shapes.items())]
    wanted = [variant for one in tuned for c in one.candidates for variant in _variants(one, c)]
    wanted += [s.before.variant(one.shape.sm) for one in tuned for s in one.samples if s.before is not None]
    failed: dict[Variant, EmitError] = {}
    compiled = build_variants(
        wanted, lambda done, total: tell("compiling candidates", done, total), jobs, failed=failed
    )
    for one in tuned:
        for candidate in one.candidates:
            _figures(one, candidate, compiled, failed)
    return tuned, compiled


def _variants(one: Tuned, candidate: Candidate) -> list[Variant]:
    return [with_blocks(s.launch, one.shape, candidate.blocks).variant(one.shape.sm) for s in one.samples]


def _figures(
    one: Tuned, candidate: Candidate, compiled: dict[Variant, Compiled], failed: dict[Variant, EmitError]
) -> None:
    """The worst figures of a candidate's variants, and whether it is out."""
    for variant in _variants(one, candidate):
        if variant in failed:
            candidate.refused = "does not compile"
            return
        figures = compiled[variant]
        candidate.registers = max(candidate.registers, figures.registers)
        candidate.spill_bytes = max(candidate.spill_bytes, figures.spill_bytes)
        candidate.shared = max(candidate.shared, figures.shared)
    most = ARCHITECTURES[one.shape.sm].shared_bytes
    if candidate.spill_bytes:
        candidate.refused = f"spills {candidate.spill_bytes} bytes"
    elif candidate.shared > most:
        candidate.refused = f"needs {candidate.shared} bytes of shared memory, there are {most}"


# The fastest.


def measure(tuned: Sequence[Tuned], compiled: dict[Variant, Compiled], driver: Driver, tell: Progress) -> None:
    """Times the candidates that are left, on a device, and chooses: the fastest by the geometric mean over the samples.

    Raises:
        TargetError: the device is of another architecture.
        CapacityError: it has not the memory.
    """
    here = running(driver.info.architecture)
    for one in tuned:
        if [one.shape.sm] != here[-1:]:
            what = f"{driver.info.name} is sm{driver.info.architecture}, and sm{one.shape.sm} is to be tuned"
            raise TargetError(what, where="--target", fix=compile_for(driver.info.architecture, "name"))
    timer = Timer(driver, [sample for one in tuned for sample in one.samples])
    timed: dict[tuple[int, Launch], float] = {}  # a choice of stages says nothing of some launches
    total = sum(len(one.candidates) for one in tuned)
    done = 0
    for one in tuned:
        for candidate in one.candidates:
            tell("timing candidates", done, total)
            done += 1
            if candidate.refused:
                continue
            try:
                for sample in one.samples:
                    launch = with_blocks(sample.launch, one.shape, candidate.blocks)
                    if (key := (id(sample), launch)) not in timed:
                        timed[key] = timer.seconds(sample, launch, compiled, one.shape.sm)
                    candidate.seconds.append(timed[key])
            except (KernelError, CapacityError) as error:
                candidate.refused, candidate.seconds = f"the device refuses it: {error.what}", []
        one.chosen = _fastest(one.candidates)
    tell("timing candidates", total, total)


def _fastest(held: Sequence[Candidate]) -> Blocks | None:
    left = [c for c in held if not c.refused]
    if not left:
        return None
    for candidate in left:
        ratio = 1.0
        for seconds, first in zip(candidate.seconds, left[0].seconds, strict=True):
            ratio *= seconds / first
        candidate.relative = ratio ** (1 / len(candidate.seconds))
    best = left[0]
    for candidate in left[1:]:
        assert candidate.relative is not None and best.relative is not None
        if candidate.relative < best.relative * (1 - NOISE):
            best = candidate
    return best.blocks
