"""What the assembler makes of the kernels of a call: `python -m tmlc.report.gpu_code small decode` compiles each
variant of the call's launches and prints a line for it, with what its machine code holds. No GPU, no weights.

Of an instruction in a loop the counts say one, and of one in a branch that is not taken too: they are of the text, not
of a run. Loads of a kernel that asks for all it reads at once stand before its first wait (`early`), with --overlap
some of them before it waits for the launch before (`ahead`). `issue` is how many turns the multiprocessor with the most
programs takes to issue all instructions once, four warps in a turn; the last line is the sum over the call's launches.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.errors import TmlcError, UsageError
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Launch, Pointer, Variant
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.report.gpu_plan import lowered_model

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", re.MULTILINE)
#: Column → instructions of it, as nvdisasm names them.
KINDS = {
    "loads": ("LDG.",),
    "copies": ("LDGSTS.",),
    "stores": ("STG.",),
    "waits": ("DEPBAR.LE",),
    "barriers": ("BAR.SYNC", "BAR.RED"),
    "dots": ("HMMA.", "IMMA.", "QMMA.", "DMMA.", "HGMMA.", "UTCHMMA"),
    "local": ("LDL", "STL"),
}
#: What a warp waits at: for its asynchronous copies, or for other warps.
WAITS = ("DEPBAR.LE", "BAR.")
_DEPENDS = "ACQBULK"  # waits for the launch before
ISSUED = 4  # warps that a multiprocessor issues an instruction of in a turn, of every architecture of the table
DISASSEMBLY_SECONDS = 60
MEMORY = 1 << 36  # bytes of a file of holes: what nobody touches takes no memory


@dataclass(frozen=True)
class Code:
    """What stands in the machine code of a variant.

    Attributes:
        registers, spill_bytes, shared: of a thread, of a thread, of a program.
        instructions: in all.
        counts: of KINDS. (An asynchronous copy is no load here.)
        early: loads and copies before the first instruction of WAITS.
        ahead: loads and copies before a wait for the launch before, at the one with the most; 0 where there is none.
    """

    registers: int
    spill_bytes: int
    shared: int
    instructions: int
    counts: dict[str, int]
    early: int
    ahead: int


def read_code(text: str) -> tuple[int, dict[str, int], int, int]:
    """(instructions, counts of KINDS, `early`, `ahead`) of a disassembly."""
    found = [f"{name}." for name in _INSTRUCTION.findall(text)]
    counts = {kind: sum(name.startswith(names) for name in found) for kind, names in KINDS.items()}
    asked = (*KINDS["loads"], *KINDS["copies"])
    first = next((at for at, name in enumerate(found) if name.startswith(WAITS)), len(found))
    early = sum(name.startswith(asked) for name in found[:first])
    ahead = since = 0  # since the end of those programs that stand before
    for name in found:
        if name.startswith(_DEPENDS):
            ahead = max(ahead, since)
        since = 0 if name.startswith((_DEPENDS, "EXIT")) else since + name.startswith(asked)
    return len(found), counts, early, ahead


def disassembled(cubin: bytes) -> str:
    """Machine code as text, by Triton's nvdisasm."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DISASSEMBLY_SECONDS)
    return done.stdout


def code_of(variant: Variant) -> Code:
    """Compiles a variant and reads its machine code. Raises EmitError as `compile_variant`."""
    from tmlc.kernels.triton.variants import compile_variant

    made = compile_variant(variant)
    return Code(made.registers, made.spill_bytes, made.shared, *read_code(disassembled(made.cubin)))


def issue_of(programs: int, warps: int, instructions: int, processors: int) -> int:
    """Turns in which the multiprocessor with the most of a launch's programs issues each instruction of them once:
    each of its four parts issues one of a warp's in a turn, and has the warps of a program in equal numbers, one at
    least where there are fewer."""
    most = -(-programs // processors)
    return -(-most * warps // ISSUED) * instructions


def turns_of(launch: Launch, sm: int) -> tuple[int, int]:
    """Turns that shared memory takes for a program of a launch, and how many at the least (`Conflicts`): the second
    one, where columns have several, for the first may have something else to do beside. It runs by its PTX over zeros,
    one position of each session; (0, 0) where that gives it nothing to do."""
    from tmlc.kernels.triton.ptx.conflicts import Conflicts
    from tmlc.kernels.triton.ptx.host import PtxMachine

    found = []
    with PtxMachine(sm, MEMORY) as machine:
        sizes: dict[tuple[str, str], int] = {}
        for arg in launch.args:
            if isinstance(arg, Pointer):
                key = arg.space, arg.name
                sizes[key] = max(sizes.get(key, 8), arg.offset + arg.nbytes)
        held: dict[tuple[str, str], Any] = {key: machine.bytes(size) for key, size in sizes.items()}
        for key in held:
            if key[0] == "counts":
                held[key].view(np.int32)[:] = 1
        for programs in (1, min(2, launch.grid[1])):
            machine.conflicts = Conflicts()
            machine.run([replace(launch, grid=(1, programs, 1))], held)
            found.append(machine.conflicts)
    first, both = found
    if launch.grid[1] == 1:
        return first.turns, first.least
    return both.turns - first.turns, both.least - first.least


def launches_of(
    methods: Mapping[str, Mapping[Bucket, list[Launch]]], method: str, bucket: Bucket
) -> list[Launch]:
    """The launches of a call of `method` in a bucket.

    Raises:
        UsageError: there is no such method, or it has no such bucket.
    """
    if method not in methods:
        raise UsageError(f"there is no method {method}", fix=f"use one of {', '.join(methods)}")
    if bucket not in methods[method]:
        known = ", ".join(one.name for one in methods[method])
        raise UsageError(f"{method} has no bucket {bucket.name}", fix=f"use one of {known}")
    return methods[method][bucket]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmlc.report.gpu_code")
    parser.add_argument("model", help="a preset of the zoo, e.g. small, or a folder with a config.json")
    parser.add_argument("method", help="e.g. decode")
    parser.add_argument("--sessions", type=int, default=1, help="of the bucket")
    parser.add_argument("--positions", type=int, default=1, help="of the bucket")
    parser.add_argument("--target", default="triton:sm90")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--kernel", help="only variants of this one")
    parser.add_argument("--overlap", action="store_true", help="with the pass memory.overlap")
    parser.add_argument("--turns", action="store_true", help="run a program of each by its PTX; count bank conflicts")
    chosen = parser.parse_args()
    os.environ["TMLC_CACHE"] = "off"
    steps = load_pipeline("triton")
    if chosen.overlap:
        steps = steps.before("memory.buckets", "memory.overlap")
    try:
        _, lowered, sm = lowered_model(chosen.model, chosen.target, chosen.precision, steps)
        launches = launches_of(lowered.launches[sm], chosen.method, Bucket(chosen.sessions, chosen.positions))
        known = list(dict.fromkeys(launch.kernel for launch in launches))
        if chosen.kernel not in (None, *known):
            what = f"the call has no launch of {chosen.kernel}"
            raise UsageError(what, where="--kernel", fix=f"use one of {', '.join(known)}")
    except TmlcError as error:
        parser.error(str(error))
    times: dict[tuple[Variant, tuple[int, ...]], list[Launch]] = {}
    for launch in launches:
        times.setdefault((launch.variant(sm), launch.grid), []).append(launch)
    more = ("turns", "least") if chosen.turns else ()
    heads = (*(["ahead"] if chosen.overlap else []), "early", *KINDS, "instructions", "issue", *more)
    print(f"{'kernel':25} times  programs warps registers spilled shared", *(f"{head:>5}" for head in heads))
    total = 0
    for (variant, grid), same in times.items():
        if chosen.kernel in (None, variant.kernel):
            code, count = code_of(variant), len(same)
            ahead = [code.ahead] if chosen.overlap else []
            sizes = (variant.num_warps, code.registers, code.spill_bytes, code.shared, *ahead, code.early)
            programs = grid[0] * grid[1] * grid[2]
            issue = issue_of(programs, variant.num_warps, code.instructions, ARCHITECTURES[sm].processors)
            total += count * issue
            turns = turns_of(same[0], sm) if more else ()
            numbers = (*sizes, *code.counts.values(), code.instructions, issue, *turns)
            widths = (5, 9, 7, 6, *(max(5, len(head)) for head in heads))
            row = " ".join(f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
            print(f"{variant.kernel:25} {count:5} {programs:9} {row}")
    print(f"{total} turns to issue the instructions of all of them once")


if __name__ == "__main__":
    main()
