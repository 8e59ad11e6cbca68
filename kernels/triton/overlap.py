"""Launches that begin before the one before them has ended (programmatic dependent launch, from sm90 on).

A kernel lets the next one begin first (`griddepcontrol.launch_dependents`), and waits for the one before it
(`griddepcontrol.wait`) before it touches anything that a kernel writes. So as many kernels as fit have their
programs in place, each with what it asks for before its wait on the way: that is what no kernel writes, weights, slots
and counts. Behind its wait a kernel sees all that ran before it: the kernel before it has ended, which had waited for
the one before that.

Kernels say nothing of it. `overlapping` puts both instructions into a kernel in Triton's GPU dialect, when Triton has
decided which loads are asynchronous copies, and moves loads and copies of what no kernel writes before the wait.
`finished` is for its PTX.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tmlc.errors import REPORT, EmitError

#: The first architecture that has it.
OVERLAP_FROM = 90
#: Spaces that no kernel writes to: the host wrote slots and counts before the first launch.
UNWRITTEN = ("weight", "slots", "counts")
_ASM = '    {name} = tt.elementwise_inline_asm "griddepcontrol.{what}; mov.u32 $0, 0;" {attrs} -> i32\n'
_ATTRIBUTES = '{constraints = "=r", packed_element = 1 : i32, pure = false}'
_FUNCTION = re.compile(r"^  tt\.func public @\w+\((?P<args>.*?)\) .*\{\n", re.MULTILINE)
_LABEL = re.compile(r"^  (\^bb\d+)")
_OP = re.compile(r'^\s*(?:(?P<results>%[^=]*?) = )?"?(?P<name>[a-z_]+\.[a-z_0-9.]+)')
_VALUE = re.compile(r"%[A-Za-z0-9_$.-]+")
_QUOTED = re.compile(r'"[^"]*"')
_PLAIN_LOAD = re.compile(r"ld\.global\.(?=v\d|[bfsu]\d)")
_COPY, _COMMIT, _ALLOC = "ttg.async_copy_global_to_local", "ttg.async_commit_group", "ttg.local_alloc"
_PART = "ttg.memdesc_index"
#: Ops that make addresses in a tensor of others in it, their first operand.
_ADDRESSES = (
    "tt.addptr", "tt.bitcast", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.splat", "tt.trans",
    "ttg.convert_layout",
)  # fmt: skip
#: Ops that give the same wherever they stand.
_PURE = (
    *_ADDRESSES, _PART, "arith.", "math.", "tt.get_num_programs", "tt.get_program_id", "tt.int_to_ptr",
    "tt.make_range", "tt.ptr_to_int",
)  # fmt: skip
_READS = ("tt.load", _COPY)


@dataclass(frozen=True)
class _Op:
    """An op of a function's body with all its regions: the values that it makes and that it names, in order."""

    text: str
    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def pure(self) -> bool:
        """An allocation in shared memory is, which nothing is put into."""
        return self.name.startswith(_PURE) or (self.name == _ALLOC and not self.operands)


def overlapping(text: str, unwritten: Collection[int]) -> str:
    """A kernel in Triton's GPU dialect that overlaps with the kernels around it. unwritten: numbers of its arguments
    that point to what no kernel writes.

    Raises:
        EmitError: the text is not of one function, as Triton prints it.
    """
    found = _FUNCTION.search(text)
    end = text.find("\n  }", found.end()) + 1 if found else 0
    if found is None or not end:
        raise EmitError("a kernel in Triton's GPU dialect is not one function", fix="use Triton 3.6 to 3.9")
    arguments = re.findall(r"(%\w+): ", found["args"])
    blocks = _blocks(text[found.end() : end])
    whole = all(number == "0" for number in re.findall(r"ttg\.async_wait .*?num = (\d+)", text))
    _wait(blocks, "", set(), {arguments[number] for number in unwritten}, whole)
    begun = _ASM.format(name="%begun", what="launch_dependents", attrs=_ATTRIBUTES)
    body = "".join(label + "".join(op.text for op in ops) for label, ops in blocks.values())
    return text[: found.end()] + begun + body + text[end:]


def finished(ptx: str) -> str:
    """PTX of a kernel that overlaps, its loads before a wait from the L2 cache: what a multiprocessor kept of slots and
    counts may be of the call before, and nothing promises that who has not waited finds it gone. (Asynchronous copies
    before a wait are of weights.)

    Raises:
        EmitError: the next kernel could begin before each program has its tensor memory: it would take what this one
            needs, and wait for it.
    """
    if "tcgen05.alloc" in ptx.partition("griddepcontrol.launch_dependents")[2]:
        raise EmitError("a kernel lets the next one begin before it has its tensor memory", fix=REPORT)
    parts = re.split(r"^(?=\$L)", ptx, flags=re.MULTILINE)
    labels = {part.partition(":")[0]: k for k, part in enumerate(parts)}
    unwaited, todo = set(), [0]
    while todo:
        k = todo.pop()
        if k in unwaited or k == len(parts):
            continue
        unwaited.add(k)
        before, wait, behind = parts[k].partition("griddepcontrol.wait")
        todo += [labels[target] for target in re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", before)]
        if not wait:
            todo.append(k + 1)
        parts[k] = _PLAIN_LOAD.sub("ld.global.cg.", before) + wait + behind
    return "".join(parts)


def _blocks(body: str) -> dict[str, tuple[str, list[_Op]]]:
    """The blocks of a function by name (the first has none): the line with their label, and their ops."""
    name = ""
    blocks: dict[str, tuple[str, list[_Op]]] = {"": ("", [])}
    for lines in _whole(body):
        if label := _LABEL.match(lines):
            name = label[1]
            blocks[name] = (lines, [])
        else:
            blocks[name][1].append(_op(lines))
    return blocks


def _whole(body: str) -> Iterator[str]:
    """Lines, those of an op and its regions together."""
    depth, held = 0, ""
    for line in body.splitlines(keepends=True):
        plain = _QUOTED.sub("", line)
        depth += plain.count("{") - plain.count("}")
        held += line
        if depth == 0:
            yield held
            held = ""


def _op(lines: str) -> _Op:
    found = _OP.match(lines)
    if found is None:
        raise EmitError(f"not an op of Triton's GPU dialect: {lines[:80]!r}", fix="use Triton 3.6 to 3.9")
    return _Op(
        lines, found["name"], tuple(_VALUE.findall(found["results"] or "")), tuple(_VALUE.findall(lines[found.end() :]))
    )


def _wait(
    blocks: dict[str, tuple[str, list[_Op]]], name: str, late: set[str], unwritten: set[str], whole: bool
) -> None:
    """Puts a wait into a block, or where it touches nothing that a kernel writes, into each of those that follow it.

    Args:
        late: values that are known behind the wait only; those of this block are added.
        unwritten: pointers to what no kernel writes; likewise.
        whole: whether threads that wait for asynchronous copies wait for all of them.
    """
    label, ops = blocks[name]
    early = _early(ops, late, unwritten, whole)
    first = next(k for k, op in enumerate(ops) if k not in early and not op.pure)
    last = ops[-1]
    if first == len(ops) - 1 and last.name == "cf.cond_br":
        following = re.findall(r"\^bb\d+", last.text)
        ends = "".join(held[-1].text for _, held in blocks.values())
        if len(set(following)) == 2 and all(len(re.findall(rf"\{one}\b", ends)) == 1 for one in following):
            for one in following:
                _wait(blocks, one, late, unwritten, whole)
            return
    wait = _ASM.format(name=f"%waited{name.lstrip('^')}", what="wait", attrs=_ATTRIBUTES)
    moved = [op for k, op in enumerate(ops) if k > first and k in early]
    rest = [op for k, op in enumerate(ops) if k >= first and k not in early]
    blocks[name] = label, [*ops[:first], *moved, _op(wait), *rest]


def _early(ops: list[_Op], late: set[str], unwritten: set[str], whole: bool) -> set[int]:
    """Numbers of the ops that stand before the wait: loads and copies of what no kernel writes, up to the block's first
    loop or branch, and what they are made of."""
    free: dict[int, _Op] = {}
    over = False
    buffers: dict[str, str] = {}  # parts of shared memory, and what they were allocated as
    used: set[str] = set()  # of them by what stays: nothing is copied there before it
    for k, op in enumerate(ops):
        over |= op.name.startswith(("scf.", "cf.", "tt.return"))
        known, points = not over and late.isdisjoint(op.operands), op.operands[:1]
        reads = op.name in _READS and unwritten.issuperset(points)
        if op.name == _COPY:
            reads = reads and buffers.get(op.operands[1], "") not in {"", *used}
        if known and (op.pure or op.name == _COMMIT or reads):
            free[k] = op
            if op.name in _ADDRESSES and unwritten.issuperset(points):
                unwritten.update(op.results)
            if op.name in (_ALLOC, _PART):
                buffers.update({result: buffers.get(points[0], "") if points else result for result in op.results})
        else:
            late.update(op.results)
            used.update(buffers[name] for name in op.operands if name in buffers)
    stay = [op for k, op in enumerate(ops) if op.name == _COPY and k not in free]
    if stay and not whole:  # groups that are waited for by their number keep their order
        free = {k: op for k, op in free.items() if op.name not in (_COPY, _COMMIT)}
    wanted: set[str] = set()
    early: set[int] = set()
    copies = {result for op in free.values() if op.name == _COPY for result in op.results}
    for k in sorted(free, reverse=True):
        op = free[k]
        closed = op.name == _COMMIT and op.operands and copies.issuperset(op.operands)
        if op.name in _READS or closed or not wanted.isdisjoint(op.results):
            early.add(k)
            wanted.update(op.operands)
    return early
