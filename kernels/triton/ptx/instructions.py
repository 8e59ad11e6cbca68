"""What each instruction does to the threads that come to it, but for branches, ends and barriers (machine.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.kernels.triton.ptx import tensor
from tmlc.kernels.triton.ptx.arithmetic import KINDS, rule
from tmlc.kernels.triton.ptx.memory import Fault
from tmlc.kernels.triton.ptx.text import Address, Group, Instruction, Number, Operand, Special, unknown
from tmlc.kernels.triton.ptx.threads import Threads

Array = npt.NDArray[Any]
#: Of the threads whose numbers these are; None: of all. Gives those that have to do it again, if any.
Step = Callable[[Threads, Array | None], Array | None]
#: Barriers of all threads of a program.
BARRIERS = {("bar", "sync"), ("barrier", "sync")}
#: What orders or announces accesses that are in order here anyhow.
_NOTHING = {"fence", "membar", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "bar.warp"}


def step_of(instruction: Instruction) -> Step | None:
    """What runs an instruction that is no branch, end or barrier."""
    op, args = instruction.op, instruction.args
    name = op[0]
    if name in ("bra", "ret", "exit") or op[:2] in BARRIERS:
        return None
    maker = _MAKERS.get(".".join(op[:2])) or _MAKERS.get(name)
    if maker is not None:
        return maker(op, args)
    if name in _NOTHING or ".".join(op[:2]) in _NOTHING:
        return lambda threads, at: None
    found = rule(op, len(args) - 1)
    if found is None:
        raise unknown("instruction", ".".join(op))
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
            lanes, place = threads.those(at), threads.address(source, at)
            threads.shared.turns(lanes, place, size * count)
            found = threads.shared.load(lanes, place, size, count)
            for target, value in zip(targets, found, strict=True):
                threads.write(target, value.view(KINDS[kind]), kind, at)

        return load
    if op[1] != "global":
        raise unknown("load", ".".join(op))

    def fetch(threads: Threads, at: Array | None) -> None:
        early = not threads.waited[threads.those(at)].all()
        if early and "cg" not in op:
            raise Fault("reads what its multiprocessor may have kept, and has not waited for the launch before")
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
            place = threads.address(target, at)
            threads.shared.turns(lanes, place, size * len(values))
            threads.shared.store(lanes, place, values, size)
        elif op[1] == "global":
            threads.memory.store(threads.address(target, at), values, size, not threads.waited[lanes].all())
        else:
            raise unknown("store", ".".join(op))

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
        raise unknown("product", ".".join(op))
    d, a, b, c = (_items(arg) for arg in args)

    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        given = [[threads.full(threads.read(one, "b32", at), at) for one in part] for part in (a, b, c)]
        for register, value in zip(d, tensor.multiply(*given), strict=True):
            threads.write(register, value, "b32", at)

    return step


def _multiply_group(op: tuple[str, ...], args: Args) -> Step:
    if op[-3:] != ("f32", "bf16", "bf16"):
        raise unknown("product", ".".join(op))
    d, a, (b, adds, *flags) = _items(args[0]), _items(args[1]), args[2:]
    signs, turned = flags[:2], flags[2:]  # A from registers has no flag of its own for being transposed
    transposed = [isinstance(flag, Number) and flag.value != 0 for flag in turned]
    if any(not isinstance(sign, Number) or sign.value != 1 for sign in signs):
        raise unknown("product", ".".join(op))

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
        raise unknown("exchange", ".".join(op))
    target, source, other, clamp = args[0], args[1], args[2], args[3].value

    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        values = threads.full(threads.read(source, "b32", at), at)
        threads.write(target, tensor.shuffle(op[2], values, threads.read(other, "u32", at), clamp & 31), "b32", at)

    return step


def _reduce(op: tuple[str, ...], args: Args) -> Step:
    how, kind, extra = op[2], op[-1], set(op[3:-1])
    if op[1] != "sync" or extra - {"abs", "NaN"} or how not in tensor.REDUCED:
        raise unknown("exchange", ".".join(op))

    def step(threads: Threads, at: Array | None) -> None:
        _warps(threads, at)
        values = threads.full(threads.read(args[1], kind, at), at)
        values = np.abs(values) if "abs" in extra else values
        threads.write(args[0], tensor.reduce_warp(how, values, "NaN" in extra), kind, at)

    return step


def _dependence(op: tuple[str, ...], args: Args) -> Step:
    """That the next launch may begin changes nothing here: it waits by itself before it touches what is written."""

    def step(threads: Threads, at: Array | None) -> None:
        if op[1] == "wait":
            threads.waited[threads.those(at)] = True

    return step


def _fence(op: tuple[str, ...], args: Args) -> Step:
    if op[2] != "async" or op[3:] not in ((), ("shared::cta",)):
        raise unknown("instruction", ".".join(op))
    return lambda threads, at: threads.shared.fence(threads.those(at))


def _elect(op: tuple[str, ...], args: Args) -> Step:
    """The first thread of each warp."""

    def step(threads: Threads, at: Array | None) -> None:
        lanes = _warps(threads, at)
        threads.write(args[0], np.zeros(len(lanes), np.uint32), "u32", at)
        threads.write(args[1], lanes % 32 == 0, "pred", at)

    return step


def _number(operand: Operand) -> int:
    if not isinstance(operand, Number):
        raise unknown("operand", operand)
    return operand.value


def _tensor_memory(op: tuple[str, ...], args: Args) -> Step:
    """tcgen05.alloc, dealloc, relinquish_alloc_permit, of one program by itself."""
    if op[2] != "cta_group::1":
        raise unknown("instruction", ".".join(op))

    def step(threads: Threads, at: Array | None) -> None:
        lanes = _warps(threads, at)
        if op[1] == "alloc":
            found = threads.tensor.allocate(lanes, _number(args[1]))
            first = lanes % 32 == 0
            threads.shared.store(lanes[first], threads.address(args[0], at)[first], [found[first]], 4)
        elif op[1] == "dealloc":
            threads.tensor.free(lanes, threads.full(threads.read(args[0], "u32", at), at), _number(args[1]))
        else:
            threads.tensor.close(lanes)

    return step


def _tensor_move(op: tuple[str, ...], args: Args) -> Step:
    """tcgen05.ld and st; the operand between says how far the halves of a warp lie apart."""
    loads, shape, plain = op[1] == "ld", op[4], op[-1] == "b32" and op[5][0] == "x" and len(op) == 7
    group, address = (args[0], args[1]) if loads else (args[-1], args[0])
    between = args[2:] if loads else args[1:-1]
    if not plain or len(between) != (shape == "16x32bx2"):
        raise unknown("instruction", ".".join(op))
    split = _number(between[0]) if between else 0
    registers = _items(group)

    def step(threads: Threads, at: Array | None) -> None:
        lanes, where = _warps(threads, at), threads.address(address, at)
        if loads:
            found = threads.tensor.load(lanes, where, len(registers), shape, split)
            for register, value in zip(registers, found, strict=True):
                threads.write(register, value, "b32", at)
        else:
            values = [threads.full(threads.read(register, "b32", at), at) for register in registers]
            threads.tensor.store(lanes, where, values, shape, split)

    return step


def _tensor_wait(op: tuple[str, ...], args: Args) -> Step:
    return lambda threads, at: threads.tensor.wait(_warps(threads, at), op[1] == "wait::ld")


def _tensor_multiply(op: tuple[str, ...], args: Args) -> Step:
    if op[2:] != ("cta_group::1", "kind::f16") or len(args) != 5:
        raise unknown("product", ".".join(op))
    inside = isinstance(args[1], Address)

    def step(threads: Threads, at: Array | None) -> None:
        left = threads.address(args[1], at) if inside else threads.full(threads.read(args[1], "u64", at), at)
        right = threads.full(threads.read(args[2], "u64", at), at)
        sizes = threads.full(threads.read(args[3], "u32", at), at)
        adding = threads.full(threads.read(args[4], "pred", at), at)
        threads.tensor.multiply(threads.those(at), threads.address(args[0], at), left, right, sizes, adding, inside)

    return step


def _tensor_commit(op: tuple[str, ...], args: Args) -> Step:
    if op[2:4] != ("cta_group::1", "mbarrier::arrive::one") or "multicast::cluster" in op:
        raise unknown("instruction", ".".join(op))
    return lambda threads, at: threads.tensor.commit(threads.those(at), threads.address(args[0], at))


def _arrivals(op: tuple[str, ...], args: Args) -> Step:
    """mbarrier.init, inval, try_wait.parity"""
    if op[1] == "init":
        return lambda threads, at: threads.tensor.begin(
            threads.those(at), threads.address(args[0], at), _number(args[1])
        )
    if op[1] == "inval":
        return lambda threads, at: threads.tensor.destroy(threads.those(at), threads.address(args[0], at))
    if op[1:3] != ("try_wait", "parity"):
        raise unknown("instruction", ".".join(op))

    def step(threads: Threads, at: Array | None) -> Array:
        lanes, parity = threads.those(at), threads.full(threads.read(args[2], "u32", at), at)
        passed = threads.tensor.passed(lanes, threads.address(args[1], at), parity)
        threads.write(args[0], passed, "pred", at)
        return lanes[~passed]

    return step


_MAKERS: dict[str, Callable[[tuple[str, ...], Args], Step]] = {
    "mov": _move, "ld": _load, "st": _store, "cp.async": _copy, "ldmatrix": _matrices, "stmatrix": _matrices,
    "mma": _multiply, "wgmma.mma_async": _multiply_group, "shfl": _shuffle, "redux": _reduce,
    "griddepcontrol": _dependence, "elect": _elect, "mbarrier": _arrivals,
    "fence.proxy": _fence,
    "tcgen05.alloc": _tensor_memory, "tcgen05.dealloc": _tensor_memory,
    "tcgen05.relinquish_alloc_permit": _tensor_memory, "tcgen05.ld": _tensor_move, "tcgen05.st": _tensor_move,
    "tcgen05.wait::ld": _tensor_wait, "tcgen05.wait::st": _tensor_wait, "tcgen05.mma": _tensor_multiply,
    "tcgen05.commit": _tensor_commit,
}  # fmt: skip
