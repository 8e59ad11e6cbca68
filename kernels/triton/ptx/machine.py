"""Runs the programs of a launch, all their threads side by side on NumPy arrays.

Threads that are at the same instruction do it together; where they part, those that are furthest behind go on until
they meet the others again. A barrier holds a program's threads until all that have not ended are there. Who waits for a
product (mbarrier.try_wait) is set aside until everybody else has gone as far as they can.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.errors import EmitError
from tmlc.kernels.triton.ptx.arithmetic import KINDS
from tmlc.kernels.triton.ptx.conflicts import Conflicts
from tmlc.kernels.triton.ptx.instructions import BARRIERS, Step, step_of
from tmlc.kernels.triton.ptx.memory import Fault, Global
from tmlc.kernels.triton.ptx.text import Program, Special, unknown
from tmlc.kernels.triton.ptx.threads import Threads

Array = npt.NDArray[Any]
#: Threads that run side by side, and bytes of shared memory that they have in all.
LANES, SHARED_BYTES = 1 << 14, 1 << 23


class Kernel:
    """A program with each of its instructions looked up, which its launches share.

    Attributes:
        grain: bytes of shared memory that are watched together.

    Raises (when made):
        EmitError: the kernel has an instruction that is not known here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step | None] = []
        for at, instruction in enumerate(program.code):
            try:
                self.steps.append(step_of(instruction))
            except EmitError as error:
                error.where = _place(program, at)
                raise
        small = any(
            i.op[0] in ("ld", "st") and i.op[1].startswith("shared") and np.dtype(KINDS[i.op[-1]]).itemsize < 4
            for i in program.code
        )
        self.grain = 1 if small else 4


def run_kernel(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    args: Sequence[int | float],
    memory: Global,
    shared_bytes: int,
    overlap: bool = False,
    conflicts: Conflicts | None = None,
) -> None:
    """Runs every program of a launch.

    Args:
        threads: of a program.
        args: the parameters' values, in order; hidden ones behind them are null pointers.
        shared_bytes: dynamic shared memory of a program.
        overlap: whether the launch may have begun before the one before it had ended.
        conflicts: counts the turns of shared memory.

    Raises:
        Fault: a hazard, or an access that a GPU would refuse; says where.
        EmitError: the kernel has an operand that is not known here.
    """
    declared = kernel.program.params
    values = [*args, *[0] * (len(declared) - len(args))]
    params = {name: value for (name, _), value in zip(declared, values, strict=True)}
    x, y, z = grid
    places = np.stack(np.meshgrid(np.arange(x), np.arange(y), np.arange(z), indexing="ij"), -1).reshape(-1, 3)
    together = max(1, min(LANES // threads, SHARED_BYTES // max(1, shared_bytes)))
    for begin in range(0, len(places), together):
        part = Threads(
            kernel.program, places[begin : begin + together], grid, threads, params, memory, shared_bytes, kernel.grain,
            overlap, conflicts,
        )  # fmt: skip
        _run(kernel, part)
        part.tensor.end()


def _run(kernel: Kernel, threads: Threads) -> None:
    program, steps = kernel.program, kernel.steps
    stops = {*program.labels.values(), len(program.code)}
    running: dict[int, Array] = {0: threads.all}  # by the instruction that comes next
    held: dict[int, Array] = {}
    aside: dict[int, Array] = {}
    moved = True  # whether anybody went on since those aside were last asked
    ended = np.zeros(threads.lanes, bool)

    def meet(at: int, lanes: Array, where: dict[int, Array] = running) -> None:
        where[at] = np.sort(np.concatenate([where[at], lanes])) if at in where else lanes

    while running or held or aside:
        if not running and aside:
            if not moved:
                at = min(aside)
                what = "waits for the end of a product that nobody has begun"
                raise Fault(f"{what} (instruction {at}: {program.code[at].line})")
            running.update(aside)
            aside.clear()
            moved = False
        elif not running:
            _release(threads, held, ended)
            running.update(held)
            held.clear()
        at = min(running)
        lanes = running.pop(at)
        whole = None if len(lanes) == threads.lanes else lanes
        while True:
            instruction = program.code[at]
            if instruction.guard is not None:
                mask = threads.full(threads.read(instruction.guard, "pred", whole), whole) ^ instruction.unless
                some = lanes[mask]
            else:
                mask, some = None, lanes
            if instruction.op[0] == "bra":
                (target,) = instruction.args
                assert isinstance(target, Special)
                if len(some):
                    meet(program.labels[target.name], some)
                lanes = lanes[~mask] if mask is not None else lanes[:0]
                if len(lanes):
                    meet(at + 1, lanes)
                break
            if instruction.op[0] in ("ret", "exit"):
                if not threads.waited[some].all():  # who waits for this launch relies on what is before it
                    raise Fault("a program ends, and has not waited for the launch before")
                ended[some] = True
                if mask is not None and not mask.all():
                    meet(at + 1, lanes[~mask])
                break
            if instruction.op[:2] in BARRIERS:
                if mask is not None:
                    raise unknown("barrier for some threads", instruction.line, _place(program, at))
                meet(at + 1, lanes, held)
                break
            step = steps[at]
            if len(some) and step is not None:
                try:
                    stay = step(threads, whole if len(some) == len(lanes) else some)
                except Fault as fault:
                    raise Fault(f"{fault} (instruction {at}: {instruction.line})") from None
                except EmitError as error:
                    error.where = _place(program, at)
                    raise
                if stay is not None and len(stay):
                    meet(at, stay, aside)
                    lanes = whole = np.setdiff1d(lanes, stay, assume_unique=True)
                    if not len(lanes):
                        break
            moved = True
            at += 1
            if at in stops:
                meet(at, lanes)
                break


def _place(program: Program, at: int) -> str:
    return f"{program.name}, instruction {at}: {program.code[at].line}"


def _release(threads: Threads, held: dict[int, Array], ended: Array) -> None:
    """Every thread that has not ended is at a barrier; those of a program must be at the same one."""
    where = np.full(threads.lanes, -1)
    for at, lanes in held.items():
        where[lanes] = at
    waiting = ~ended
    owners = threads.owner[waiting]
    first = np.full(int(np.max(owners)) + 1, -1)
    first[owners] = where[waiting]
    if (first[owners] != where[waiting]).any():
        raise Fault("threads of one program wait at different barriers")
    threads.shared.barrier(np.unique(owners))
