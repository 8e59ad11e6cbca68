"""A variant of a kernel → machine code (cubin) and what it costs; needs Triton's compiler and no GPU."""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton

from tmlc.errors import EmitError, TargetError
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.dialect import Rewrite, rewritten
from tmlc.kernels.triton.launch import Variant
from tmlc.kernels.triton.mode import FUNCTIONS, INTERPRET, PARAMETERS
from tmlc.kernels.triton.overlap import finished, overlapping
from tmlc.kernels.triton.registry import load_kernels
from tmlc.kernels.triton.swizzle import by_rows
from tmlc.kernels.triton.versions import check_triton

#: What a thread can have at most; the launches here have up to 256 threads, so the register file holds them.
MOST_REGISTERS = 255
#: What is tried when a variant with more stages spills; with one nothing would be on its way while a turn is computed.
FEWER_STAGES = (6, 4, 3, 2)
#: What to do where Triton makes nothing, or nothing that launches can use, of a kernel.
_FIX_TRITON = "Compile with a Triton that docs/triton.md, “Versions of Triton”, lists; if it is one, report the kernel."
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """One variant as machine code.

    Attributes:
        cubin: an ELF file for one architecture.
        entry: name of the kernel in it.
        num_warps: what a launch takes, 32 threads each.
        shared: bytes of dynamic shared memory that a launch asks for.
        registers: a thread uses.
        spill_bytes: of local memory a thread uses, stack included: what did not fit into registers.
        hidden_params: pointers behind the arguments that a launch must pass (zero: the kernels use no global scratch).
    """

    cubin: bytes
    entry: str
    num_warps: int
    shared: int
    registers: int
    spill_bytes: int
    hidden_params: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.cubin).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The figures, without the code."""
        names = ("entry", "num_warps", "shared", "registers", "spill_bytes", "hidden_params")
        return {name: getattr(self, name) for name in names} | {"sha256": self.digest}


def variant_key(variant: Variant) -> str:
    """A short name that is the same for equal variants: kernel, architecture, digest of the rest."""
    body = [variant.constexprs, variant.signature, variant.num_warps, variant.num_stages]
    body += [] if variant.early is None else ["overlap", variant.early]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return f"{variant.kernel}.sm{variant.sm}.{digest[:16]}"


def compile_variant(variant: Variant) -> Compiled:
    """Machine code for one variant; the same variant and tool chain give the same bytes.

    Raises:
        TargetError: this process interprets kernels, or its Triton is too old for the architecture.
        EmitError: Triton or its assembler refuses the kernel, or it does not fit into shared memory; names it.
    """
    source, target = _source(variant)
    first = MOST_REGISTERS if _waits_once(variant) else None
    best = _compiled(source, target, variant, variant.num_stages, first)
    # The assembler gives up a few registers for occupancy. These kernels wait for memory: the registers are worth more
    # (though told that it may have all, it does worse now and then). Where all do not suffice, fewer blocks on their
    # way do, or one more: a short loop with two stages is unrolled as a whole, and its turns hold registers side by
    # side. Neither changes the order of a sum.
    # What wants more shared memory than there is has fewer blocks on their way, too.
    most = ARCHITECTURES[variant.sm].shared_bytes

    def fault(one: Compiled) -> tuple[bool, int]:
        return one.shared > most, one.spill_bytes

    fewer = (n for n in FEWER_STAGES if n < variant.num_stages)
    for stages in (variant.num_stages, *fewer, variant.num_stages + 1):
        for registers in (None, MOST_REGISTERS):
            if any(fault(best)) and (stages, registers) != (variant.num_stages, first):
                best = min(best, _compiled(source, target, variant, stages, registers), key=fault)
    # Last, tiles as Triton lays them: bank conflicts, the same bits, and addresses that may need fewer registers.
    for registers in (None, MOST_REGISTERS):
        if best.spill_bytes:
            tiles = _compiled(source, target, variant, variant.num_stages, registers, staggered=False)
            best = min(best, tiles, key=fault)
    if best.shared > most:
        what = f"{variant.kernel} wants {best.shared} bytes of shared memory, a program on sm{variant.sm} has {most}"
        fix = f"compile with smaller blocks (--tuning), or report it: {variant.constexprs}"
        raise EmitError(what, where=variant_key(variant), fix=fix)
    return best


@dataclass(frozen=True)
class Assembly:
    """One variant as PTX, which the assembler makes machine code of; `num_warps` and `shared` as of `Compiled`."""

    ptx: str
    num_warps: int
    shared: int


def ptx_of(variant: Variant) -> Assembly:
    """The PTX of a variant, with the stages that it asks for. Raises as `compile_variant`."""
    from triton.backends.nvidia.compiler import CUDABackend

    source, target = _source(variant)
    with _instead(CUDABackend, "make_cubin", lambda self, *_: b""):
        kernel = _built(source, target, variant, variant.num_stages, None)
    return Assembly(kernel.asm["ptx"], kernel.metadata.num_warps, kernel.metadata.shared)


def _source(variant: Variant) -> tuple[Any, Any]:
    """What Triton compiles, and for what."""
    if INTERPRET:
        raise TargetError(
            "this process interprets kernels and cannot compile them", fix="start it without TRITON_INTERPRET=1"
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    check_triton(variant.sm, triton.__version__)
    load_kernels()
    fn, names = FUNCTIONS[variant.kernel], PARAMETERS[variant.kernel]
    constexprs = dict(variant.constexprs)
    runtime = [name for name in names if name not in constexprs]
    types = dict(zip(runtime, variant.signature, strict=True))
    signature = {name: "constexpr" if name in constexprs else types[name].partition(":")[0] for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in types and types[name].endswith(":16")
    }
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    return source, GPUTarget("cuda", variant.sm, 32)


def _waits_once(variant: Variant) -> bool:
    """Whether a program asks for one row of each operand and has nothing else to do until it is there. The assembler
    would hold it to few registers, so that more programs fit into a multiprocessor than there are, and wait for the
    loads in rounds."""
    fixed = dict(variant.constexprs)
    return variant.kernel == "router_logits_kernel" and fixed["EXPERTS"] * fixed["ROWS"] == 1


def _compiled(
    source: Any, target: Any, variant: Variant, stages: int, registers: int | None, staggered: bool = True
) -> Compiled:
    kernel = _built(source, target, variant, stages, registers, staggered)
    meta = kernel.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        what = f"{variant.kernel} asks for global scratch, which launches do not bring"
        raise EmitError(what, where=variant_key(variant), fix=_FIX_TRITON)
    cubin = kernel.asm["cubin"]
    used, stack, local = _usage(cubin, meta.name)
    hidden = 2  # the pointers to global and to profile scratch
    return Compiled(cubin, meta.name, meta.num_warps, meta.shared, used, stack + local, hidden)


def _built(
    source: Any, target: Any, variant: Variant, stages: int, registers: int | None, staggered: bool = True
) -> Any:
    """What Triton makes of a variant; `staggered`: with tiles in shared memory staggered by rows."""
    rewrites: list[Rewrite] = [by_rows] if staggered else []
    if variant.early is not None:
        rewrites.append(partial(overlapping, unwritten=variant.early))
    options = {
        "num_warps": variant.num_warps, "num_stages": stages, "enable_fp_fusion": False,
        "maxnreg": registers,
    }  # fmt: skip
    try:
        with _reproducible(), _rewriting(rewrites, finished if variant.early is not None else None):
            return triton.compile(source, target=target, options=options)
    except Exception as error:
        where = f"{variant_key(variant)} {variant.constexprs}"
        raise EmitError(f"{variant.kernel} does not compile: {error}", where=where, fix=_FIX_TRITON) from error


@contextmanager
def _reproducible() -> Iterator[None]:
    """No line information (paths of this machine), and no cache of another build."""
    knobs = triton.knobs.compilation
    before = knobs.disable_line_info, knobs.always_compile
    knobs.disable_line_info, knobs.always_compile = True, True
    try:
        yield
    finally:
        knobs.disable_line_info, knobs.always_compile = before


@contextmanager
def _rewriting(dialect: list[Rewrite], ptx: Rewrite | None) -> Iterator[None]:
    """Kernels that are compiled meanwhile are rewritten in Triton's GPU dialect, and in PTX."""
    from triton.backends.nvidia.compiler import CUDABackend

    made, written = CUDABackend.make_ttgir, CUDABackend.make_ptx
    changed = (lambda *args: ptx(written(*args))) if ptx else written
    kernels = staticmethod(lambda *args: rewritten(made(*args), *dialect))
    with _instead(CUDABackend, "make_ttgir", kernels), _instead(CUDABackend, "make_ptx", changed):
        yield


@contextmanager
def _instead(owner: Any, name: str, other: Any) -> Iterator[None]:
    """`other` in the place of an attribute, meanwhile."""
    before = vars(owner)[name]  # not what it gives: that a method is static would be lost
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _usage(cubin: bytes, entry: str) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) of a thread, as the cubin says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(out[out.index(entry) :])
    if found is None:
        raise EmitError(f"cuobjdump says nothing of {entry}", where=str(command[0]), fix=_FIX_TRITON)
    registers, stack, _, local = (int(number) for number in found.groups())
    return registers, stack, local
