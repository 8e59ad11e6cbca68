"""Launches that begin before the one before them has ended (programmatic dependent launch, from sm90 on).

Each kernel waits for the one before it (`griddepcontrol.wait`) and then lets the next one begin
(`griddepcontrol.launch_dependents`). So at any time one kernel runs, and the next one has its programs in place: what a
launch costs is hidden. Behind its wait a kernel sees everything that ran before it; before its wait, what the kernel
before the last one wrote, for that one had ended when the last one let this one begin. Products and routers use the
time before their wait to bring their weights into the L2 cache.

Kernels get the wait as their first instruction, in PTX; those that call `previous` have it there.
"""

import re

import triton.language as tl

from tmlc.errors import EmitError
from tmlc.kernels.triton.mode import INTERPRET, device

#: The first architecture that has it.
OVERLAP_FROM = 90
COMPILED = tl.constexpr(not INTERPRET)
WAIT = "griddepcontrol.wait;"
DEPENDENTS = "griddepcontrol.launch_dependents;"
_ENTRY = re.compile(r"^\.visible \.entry [^{]*\{\n(?:[ \t]*\.(?:reg|local|shared)[^\n]*\n)*", re.MULTILINE)


@device
def previous():
    """Waits for the kernel before this one, and lets the next one begin."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1
        )


@device
def prefetch_rows(w, w_off, w_mask, k, FORM: tl.constexpr, LINES: tl.constexpr):
    """Asks for the first LINES·128 bytes of rows of weights; w_off: int64 [rows], in elements."""
    if COMPILED:
        if FORM == "f32":
            at = tl.arange(0, LINES)[None, :] * 32
            there = at < k
        elif FORM == "bf16":
            at = tl.arange(0, LINES)[None, :] * 64
            there = at < k
        elif FORM == "i4":
            at = tl.arange(0, LINES)[None, :] * 128
            there = at * 2 < k
        else:
            at = tl.arange(0, LINES)[None, :] * 128
            there = at < k
        address = w + tl.where(w_mask[:, None] & there, w_off[:, None] + at, 0)  # a line that is always there
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], tl.int32, False, 1
        )


def with_wait(ptx: str) -> str:
    """PTX of a kernel that waits: as it is where it says so itself, else with the wait before everything.

    Raises EmitError where the kernel's beginning is not found.
    """
    if WAIT in ptx:
        return ptx
    found = _ENTRY.search(ptx)
    if found is None:
        raise EmitError("the entry of a kernel is not where it was expected in its PTX", fix="use Triton 3.6 to 3.9")
    return f"{ptx[: found.end()]}\t{WAIT}\n\t{DEPENDENTS}\n{ptx[found.end() :]}"
