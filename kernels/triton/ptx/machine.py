"""Runs the programs of a launch, all their threads side by side on NumPy arrays.

Threads that are at the same instruction do it together; where they part, those that are furthest behind go on until
they meet the others again. A barrier holds a program's threads until all that have not ended are there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.errors import EmitError
from tmlc.kernels.triton.ptx import tensor
from tmlc.kernels.triton.ptx.arithmetic import KINDS, rule
from tmlc.kernels.triton.ptx.memory import Fault, Global, Shared
from tmlc.kernels.triton.ptx.text import (
    Address,
    Group,
    Instruction,
    Number,
    Operand,
    Program,
    Register,
    Special,
    float_of,
)

Array = npt.NDArray[Any]
_BANKS: dict[int, npt.DTypeLike] = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Threads that run side by side, and bytes of shared memory that they have in all.
LANES, SHARED_BYTES = 1 << 14, 1 << 23
#: What orders or announces accesses that are in order here anyhow.
_NOTHING = {"fence", "membar", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "bar.warp"}


class Threads:
    """The threads of some programs of a launch: registers, memory, and where each program is in the grid.

    Args:
        kernel: what they run.
        places: [programs, 3] in the grid.
        grid: its size.
        threads: of a program.
        params: values of the parameters.
        memory: global memory.
        shared_bytes: of a program.
        overlap: whether the launch before may still run until a program waits for it.
    """

    def __init__(
        self,
        kernel: "Kernel",
        places: Array,
        grid: tuple[int, int, int],
        threads: int,
        params: dict[str, Any],
        memory: Global,
        shared_bytes: int,
        overlap: bool,
    ) -> None:
        count = len(places)
        self.lanes = count * threads
        self.all = np.arange(self.lanes)
        self.owner = self.all // threads
        tid = self.all % threads
        banks = kernel.program.banks
        self.banks = {name: np.zeros((number, self.lanes), _BANKS[width]) for name, (width, number) in banks.items()}
        self.specials: dict[str, Any] = {"global_smem": 0, "%tid.x": tid, "%ntid.x": threads, "%laneid": tid % 32}
        for axis, letter in enumerate("xyz"):
            self.specials[f"%ctaid.{letter}"] = places[self.owner, axis]
            self.specials[f"%nctaid.{letter}"] = grid[axis]
        self.params, self.memory = params, memory
        self.shared = Shared(count, shared_bytes, self.owner, tid // 32, kernel.grain)
        self.waited = np.full(self.lanes, not overlap)  # for the launch before

    def read(self, operand: Operand | None, kind: str, at: Array | None) -> Array:
        """The operand of the threads `at` (None: all), as numbers of a PTX type."""
        dtype = np.dtype(KINDS[kind])
        if isinstance(operand, Register):
            row = self.banks[operand.bank][operand.index]
            row = row if at is None else row[at]
            if row.itemsize != dtype.itemsize:
                row = row.astype(f"u{dtype.itemsize}")
            return row.view(dtype)
        if isinstance(operand, Number):
            if dtype.kind == "f":
                return np.array(float_of(operand) if operand.bits else operand.value, dtype)
            if dtype.kind == "b":
                return np.array(operand.value != 0)
            return np.array(operand.value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Special) and operand.name in self.specials:
            value = np.asarray(self.specials[operand.name])
            return (value if at is None or not value.ndim else value[at]).astype(dtype)
        raise EmitError(f"PTX operand that is not read here: {operand}")

    def write(self, operand: Operand | None, value: Array, kind: str, at: Array | None) -> None:
        if operand is None:
            return
        if not isinstance(operand, Register):
            raise EmitError(f"PTX result that is not written here: {operand}")
        bank = self.banks[operand.bank]
        row, value = bank[operand.index], np.asarray(value, KINDS[kind])
        if row.itemsize != value.itemsize:  # extended as its type says
            value = value.astype(f"i{row.itemsize}" if value.dtype.kind == "i" else f"u{row.itemsize}")
        if at is None:
            row.view(value.dtype)[...] = value
        else:
            row.view(value.dtype)[at] = value

    def those(self, at: Array | None) -> Array:
        """The numbers of the threads `at`."""
        return self.all if at is None else at

    def full(self, value: Array, at: Array | None) -> Array:
        """One number for each thread."""
        return np.broadcast_to(value, (self.lanes if at is None else len(at),))

    def address(self, operand: Operand, at: Array | None) -> Array:
        assert isinstance(operand, Address)
        if isinstance(operand.base, Special):
            return self.full(np.array(self.specials[operand.base.name] + operand.offset, np.int64), at)
        wide = "u64" if self.banks[operand.base.bank].itemsize == 8 else "u32"
        return self.read(operand.base, wide, at).astype(np.int64) + operand.offset


Step = Callable[[Threads, Array | None], None]


class Kernel:
    """A program with each of its instructions looked up, which its launches share.

    Attributes:
        grain: bytes of shared memory that are watched together.

    Raises (when made):
        EmitError: the kernel has an instruction that is not known here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = [_step(instruction, program) for instruction in program.code]
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
) -> None:
    """Runs every program of a launch.

    Args:
        threads: of a program.
        args: the parameters' values, in order; hidden ones behind them are null pointers.
        shared_bytes: dynamic shared memory of a program.
        overlap: whether the launch may have begun before the one before it had ended.

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
        part = Threads(kernel, places[begin : begin + together], grid, threads, params, memory, shared_bytes, overlap)
        _run(kernel, part)


def _run(kernel: Kernel, threads: Threads) -> None:
    program, steps = kernel.program, kernel.steps
    stops = {*program.labels.values(), len(program.code)}
    running: dict[int, Array] = {0: threads.all}  # by the instruction that comes next
    held: dict[int, Array] = {}
    ended = np.zeros(threads.lanes, bool)

    def meet(at: int, lanes: Array, where: dict[int, Array] = running) -> None:
        where[at] = np.sort(np.concatenate([where[at], lanes])) if at in where else lanes

    while running or held:
        if not running:
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
                if not threads.waited[some].all():  # the next launch may begin then, and relies on what is before this
                    raise Fault("a program ends, and has not waited for the launch before")
                ended[some] = True
                if mask is not None and not mask.all():
                    meet(at + 1, lanes[~mask])
                break
            if instruction.op[:2] == ("bar", "sync"):
                if mask is not None:
                    raise EmitError(f"a barrier for some threads: {instruction.line}")
                meet(at + 1, lanes, held)
                break
            step = steps[at]
            if len(some) and step is not None:
                try:
                    step(threads, whole if len(some) == len(lanes) else some)
                except Fault as fault:
                    raise Fault(f"{fault} (instruction {at}: {instruction.line})") from None
            at += 1
            if at in stops:
                meet(at, lanes)
                break


def _release(threads: Threads, held: dict[int, Array], ended: Array) -> None:
    """Every thread that has not ended is at a barrier; those of a program must be at the same one."""
    where = np.full(threads.lanes, -1)
    for at, lanes in held.items():
        where[lanes] = at
    waiting = ~ended
    owners = threads.owner[waiting]
    first = np.full(owners.max() + 1, -1)
    first[owners] = where[waiting]
    if (first[owners] != where[waiting]).any():
        raise Fault("threads of one program wait at different barriers")
    threads.shared.barrier(np.unique(owners))


def _step(instruction: Instruction, program: Program) -> Step | None:
    """What runs an instruction that is no branch, end or barrier."""
    op, args = instruction.op, instruction.args
    name = op[0]
    if name in ("bra", "ret", "exit") or op[:2] == ("bar", "sync"):
        return None
    if name in _NOTHING or ".".join(op[:2]) in _NOTHING:
        return lambda threads, at: None
    maker = _MAKERS.get(".".join(op[:2])) or _MAKERS.get(name)
    if maker is not None:
        return maker(op, args)
    found = rule(op)
    if found is None:
        raise EmitError(f"PTX instruction that is not run here: {instruction.line}", where=program.name)
    kinds, result, compute = found

    def step(threads: Threads, at: Array | None) -> None:
        operands = [threads.read(arg, kind, at) for arg, kind in zip(args[1:], kinds, strict=True)]
        threads.write(args[0], compute(*operands), result, at)

    return step


Args = tuple[Operand, ...]


def _move(op: tuple[str, ...], args: Args) -> Step:
    target, source = args
    kind = op[-1]
    if isinstance(target, Group):
        parts = target.items
        whole_kind = f"u{8 * np.dtype(KINDS[kind]).itemsize}"
        size = np.dtype(KINDS[kind]).itemsize // len(parts)

        def unpack(threads: Threads, at: Array | None) -> None:
            whole = np.ascontiguousarray(threads.full(threads.read(source, whole_kind, at), at))
            for part, value in zip(parts, whole.view(f"u{size}").reshape(-1, len(parts)).T, strict=True):
                threads.write(part, value, f"u{8 * size}", at)

        return unpack
    if isinstance(source, Group):
        items = source.items
        narrow = f"u{8 * np.dtype(KINDS[kind]).itemsize // len(items)}"

        def pack(threads: Threads, at: Array | None) -> None:
            values = [threads.full(threads.read(item, narrow, at), at) for item in items]
            whole = np.ascontiguousarray(np.stack(values, -1)).view(f"u{np.dtype(KINDS[kind]).itemsize}")
            threads.write(target, whole[:, 0], f"u{8 * whole.itemsize}", at)

        return pack
    return lambda threads, at: threads.write(target, threads.read(source, kind, at), kind, at)


def _vector(op: tuple[str, ...]) -> tuple[int, int, str]:
    """(how many numbers, bytes of each, type) of a load or store."""
    count = next((int(part[1:]) for part in op if part in ("v2", "v4", "v8")), 1)
    return count, np.dtype(KINDS[op[-1]]).itemsize, op[-1]


def _items(operand: Operand) -> tuple[Operand | None, ...]:
    return operand.items if isinstance(operand, Group) else (operand,)


def _load(op: tuple[str, ...], args: Args) -> Step:
    count, size, kind = _vector(op)
    targets, source = _items(args[0]), args[1]
    if op[1] == "param":
        assert isinstance(source, Address) and isinstance(source.base, Special) and not source.offset
        name = source.base.name

        def param(threads: Threads, at: Array | None) -> None:
            value = threads.params[name]
            bits = np.array(value, np.float32).view(np.uint32) if isinstance(value, float) else np.array(
                value & (1 << 64) - 1, np.uint64
            )  # fmt: skip
            threads.write(targets[0], bits.astype(f"u{size}").view(KINDS[kind]), kind, at)

        return param
    if op[1].startswith("shared"):

        def load(threads: Threads, at: Array | None) -> None:
            found = threads.shared.load(threads.those(at), threads.address(source, at), size, count)
            for target, value in zip(targets, found, strict=True):
                threads.write(target, value.view(KINDS[kind]), kind, at)

        return load
    if op[1] != "global":
        raise EmitError(f"PTX load that is not run here: {'.'.join(op)}")

    def fetch(threads: Threads, at: Array | None) -> None:
        early = not threads.waited[threads.those(at)].all()
        found = threads.memory.load(threads.address(source, at), size, count, early)
        for target, value in zip(targets, found, strict=True):
            threads.write(target, value.view(KINDS[kind]), kind, at)

    return fetch


def _store(op: tuple[str, ...], args: Args) -> Step:
    size = _vector(op)[1]
    target, sources = args[0], _items(args[1])

    def store(threads: Threads, at: Array | None) -> None:
        lanes = threads.those(at)
        values = [threads.full(threads.read(source, f"u{8 * size}", at), at) for source in sources]
        if op[1].startswith("shared"):
            threads.shared.store(lanes, threads.address(target, at), values, size)
        elif op[1] == "global":
            threads.memory.store(threads.address(target, at), values, size, not threads.waited[lanes].all())
        else:
            raise EmitError(f"PTX store that is not run here: {'.'.join(op)}")

    return store


def _copy(op: tuple[str, ...], args: Args) -> Step:
    """cp.async of 4, 8 or 16 bytes, of which a last operand says how many are read; the others become zero."""
    if op[2] == "commit_group":
        return lambda threads, at: threads.shared.commit(threads.those(at))
    if op[2] == "wait_group":
        (left,) = args
        assert isinstance(left, Number)
        return lambda threads, at: threads.shared.wait(threads.those(at), left.value)
    assert isinstance(args[2], Number)
    nbytes = args[2].value

    def copy(threads: Threads, at: Array | None) -> None:
        lanes = threads.those(at)
        source = threads.address(args[1], at)
        read = threads.full(threads.read(args[3], "u32", at) if len(args) > 3 else np.array(nbytes), at)
        if ((read != nbytes) & (read != 0)).any():
            raise Fault("an asynchronous copy of a part of its bytes")
        data = np.zeros((len(lanes), nbytes // 4), np.uint32)
        some = read > 0
        if some.any():
            early = not threads.waited[lanes].all()
            data[some] = np.stack(threads.memory.load(source[some], 4, nbytes // 4, early), -1)
        threads.shared.copy(lanes, threads.address(args[0], at), data.view(np.uint8))

    return copy


def _warps(threads: Threads, at: Array | None) -> Array:
    """The threads of an instruction that warps do together."""
    lanes = threads.those(at)
    if len(lanes) % 32 or (lanes % 32 != np.tile(np.arange(32), len(lanes) // 32)).any():
        raise Fault("not all threads of a warp are there")
    return lanes


def _matrices(op: tuple[str, ...], args: Args) -> Step:
    loads = op[0] == "ldmatrix"
    group, address = (args[0], args[1]) if loads else (args[1], args[0])
    registers = _items(group)

    def step(threads: Threads, at: Array | None) -> None:
        lanes, where = _warps(threads, at), threads.address(address, at)
        if loads:
            found = tensor.load_matrices(threads.shared, lanes, where, len(registers), "trans" in op)
            for register, value in zip(registers, found, strict=True):
                threads.write(register, value, "b32", at)
        else:
            values = [threads.read(register, "b32", at) for register in registers]
            tensor.store_matrices(threads.shared, lanes, where, values, "trans" in op)

    return step


def _multiply(op: tuple[str, ...], args: Args) -> Step:
    if op[3] != "m16n8k16" or op[-2:] != ("bf16", "f32"):
        raise EmitError(f"PTX product that is not run here: {'.'.join(op)}")
    d, a, b, c = (_items(arg) for arg in args)

    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        given = [[threads.full(threads.read(one, "b32", at), at) for one in part] for part in (a, b, c)]
        for register, value in zip(d, tensor.multiply(*given), strict=True):
            threads.write(register, value, "b32", at)

    return step


def _multiply_group(op: tuple[str, ...], args: Args) -> Step:
    if op[-3:] != ("f32", "bf16", "bf16"):
        raise EmitError(f"PTX product that is not run here: {'.'.join(op)}")
    d, a, (b, adds, *flags) = _items(args[0]), _items(args[1]), args[2:]
    signs, turned = flags[:2], flags[2:]  # A from registers has no flag of its own for being transposed
    transposed = [isinstance(flag, Number) and flag.value != 0 for flag in turned]
    if any(not isinstance(sign, Number) or sign.value != 1 for sign in signs):
        raise EmitError(f"PTX product that is not run here: {'.'.join(op)}")

    def step(threads: Threads, at: Array | None) -> None:
        lanes = _warps(threads, at)
        if len(lanes) % 128 or (lanes[::128] % 128).any():
            raise Fault("not all warps of a group are there")
        adding = threads.full(threads.read(adds, "pred", at), at)
        c = [np.where(adding, threads.read(one, "b32", at), np.uint32(0)) for one in d]
        left = [threads.full(threads.read(one, "u64" if len(a) == 1 else "b32", at), at) for one in a]
        right = threads.full(threads.read(b, "u64", at), at)
        ways = (transposed[0], transposed[-1]) if len(a) == 1 else (False, transposed[-1])
        for register, value in zip(d, tensor.multiply_group(threads.shared, lanes, left, right, c, ways), strict=True):
            threads.write(register, value, "b32", at)

    return step


def _shuffle(op: tuple[str, ...], args: Args) -> Step:
    if len(args) != 5 or not isinstance(args[3], Number):
        raise EmitError(f"PTX exchange that is not run here: {'.'.join(op)}")
    target, source, other, clamp = args[0], args[1], args[2], args[3].value

    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        values = threads.full(threads.read(source, "b32", at), at)
        threads.write(target, tensor.shuffle(op[2], values, threads.read(other, "u32", at), clamp & 31), "b32", at)

    return step


def _reduce(op: tuple[str, ...], args: Args) -> Step:
    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        values = threads.full(threads.read(args[1], op[-1], at), at)
        threads.write(args[0], tensor.reduce_warp(op[2], values), op[-1], at)

    return step


def _dependence(op: tuple[str, ...], args: Args) -> Step:
    def step(threads: Threads, at: Array | None) -> None:
        lanes = threads.those(at)
        if op[1] == "wait":
            threads.waited[lanes] = True
        elif not threads.waited[lanes].all():
            raise Fault("lets the next launch begin, and has not waited for the one before")

    return step


def _prefetch(op: tuple[str, ...], args: Args) -> Step:
    return lambda threads, at: threads.memory.touch(threads.address(args[0], at))


_MAKERS: dict[str, Callable[[tuple[str, ...], Args], Step]] = {
    "mov": _move, "ld": _load, "st": _store, "cp.async": _copy, "ldmatrix": _matrices, "stmatrix": _matrices,
    "mma": _multiply, "wgmma.mma_async": _multiply_group, "shfl": _shuffle, "redux": _reduce,
    "griddepcontrol": _dependence, "prefetch": _prefetch,
}  # fmt: skip
