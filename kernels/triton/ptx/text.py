"""PTX as the compiler writes it → instructions with their operands, ready to be run."""

import re
import struct
from dataclasses import dataclass

from tmlc.errors import EmitError

#: Bytes of a register, by the type it is declared with.
_WIDTHS = {"pred": 1, "b16": 2, "b32": 4, "b64": 8, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "f64": 8}
_PARAM = re.compile(r"\.param \.(\w+)[^,)\n]*?(\w+_param_(\d+))")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;")
#: A block: braces around instructions, some of which may have braces around operands.
_BLOCK = re.compile(r"\{([^{}]*;(?:[^{}]|\{[^{};]*\})*)\}")
_DECLARED = re.compile(r"\.reg \.(\w+) (\w[\w, ]*);")
#: The bank of a register that a block declares for itself, by its bytes.
_OWN = {1: "p", 2: "rs", 4: "r", 8: "rd"}
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def unknown(kind: str, text: object, where: str = "") -> EmitError:
    """The error of PTX that this machine was not taught yet: an instruction, an operand, or a modifier."""
    fix = "teach it in kernels/triton/ptx/, and hold it to PTX's manual in tests/kernels_triton/test_ptx.py"
    return EmitError(f"PTX {kind} that is not run here: {text}", where=where, fix=fix)


@dataclass(frozen=True)
class Register:
    """One register of each thread: its bank (what it is declared as) and its number there."""

    bank: str
    index: int


@dataclass(frozen=True)
class Number:
    """An immediate: its bits as an unsigned number, or a value that is read as the instruction's type says."""

    value: int
    bits: int = 0  # of a float written as bits; 0: an integer


@dataclass(frozen=True)
class Special:
    """%tid.x, %ctaid.y, …; a parameter's or a symbol's name."""

    name: str


@dataclass(frozen=True)
class Group:
    """{a, b, …}: None stands for `_`."""

    items: "tuple[Operand | None, ...]"


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: "Register | Special"
    offset: int


Operand = Register | Number | Special | Group | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: its parts between the dots.
        args: operands, results first.
        guard: the predicate it is under, None without one; `unless`: whether it runs where that is false.
        line: what it was in the text, for messages.
    """

    op: tuple[str, ...]
    args: tuple[Operand, ...]
    guard: Register | None
    unless: bool
    line: str


@dataclass(frozen=True)
class Program:
    """A kernel: instructions, the place of each label, how many registers each bank has and of how many bytes, the
    type of each parameter in order."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    banks: dict[str, tuple[int, int]]
    params: tuple[tuple[str, str], ...]


def parse(text: str) -> Program:
    """Reads the one kernel of a PTX module.

    Raises:
        EmitError: the text has something that is not read here; quotes it.
    """
    entry = re.search(r"\.visible \.entry (\w+)\(", text)
    if entry is None:
        raise EmitError("PTX without a kernel", fix="give the PTX of one kernel, as `variants.ptx_of` makes it")
    head, _, body = text[entry.end() :].partition("{")
    params = tuple((name, kind) for kind, name, _ in _PARAM.findall(head))
    body = re.sub(r"//[^\n]*", "", body[: body.rindex("}")])
    banks = {name: (_WIDTHS[kind], int(count)) for kind, name, count in _REGISTERS.findall(body)}
    body = _REGISTERS.sub("", body)
    body = _BLOCK.sub(lambda found: _outside(found, banks), body)
    body = re.sub(r"\.pragma [^;]*;", "", body)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for piece in body.split(";"):
        statement = piece.strip()
        while found := re.match(r"(\$\w+):\s*", statement):
            labels[found[1]] = len(code)
            statement = statement[found.end() :]
        if statement:
            code.append(_instruction(statement, banks))
    return Program(entry[1], tuple(code), labels, banks, params)


def _outside(block: re.Match[str], banks: dict[str, tuple[int, int]]) -> str:
    """The instructions of a block, its own registers and labels under names that nothing else has."""
    inside, number = _DECLARED.sub("", block[1]), block.start()
    for kind, names in _DECLARED.findall(block[1]):
        width = _WIDTHS[kind]
        bank = _OWN[width]
        for name in names.replace(" ", "").split(","):
            held = banks.get(bank, (width, 0))[1]
            banks[bank] = width, held + 1
            inside = re.sub(rf"(?<![%$.\w]){name}\b", f"%{bank}{held}", inside)
    for label in re.findall(r"(?m)^\s*(\w+):(?!:)", inside):
        inside = re.sub(rf"\b{label}\b", f"$own_{number}_{label}", inside)
    return inside


def _instruction(statement: str, banks: dict[str, tuple[int, int]]) -> Instruction:
    found = _INSTRUCTION.fullmatch(statement)
    if found is None:
        raise unknown("statement", repr(statement))
    unless, guard, op, rest = found.groups()
    args = tuple(_operand(part, banks) for part in _parts(rest.replace("|", ",")))
    held = _operand(guard, banks) if guard else None
    assert held is None or isinstance(held, Register)
    return Instruction(tuple(op.split(".")), args, held, bool(unless), " ".join(statement.split()))


def _parts(text: str) -> list[str]:
    """Operands, with commas between; those inside braces stay together."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    last = text[begin:].strip()
    return [part.strip() for part in parts] + ([last] if last else [])


def _operand(text: str, banks: dict[str, tuple[int, int]]) -> Operand:
    if text.startswith("{"):
        inside = _parts(text[1:-1])
        return Group(tuple(None if part == "_" else _operand(part, banks) for part in inside))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        at = _operand(base, banks)
        if not isinstance(at, Register | Special):
            raise unknown("address", repr(text))
        return Address(at, int(offset or "0", 0))
    if (register := re.fullmatch(r"%([a-z]+)(\d+)", text)) and register[1] in banks:
        return Register(register[1], int(register[2]))
    if real := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return Number(int(real[1], 16), 4 * len(real[1]))
    if whole := re.fullmatch(r"(-?(?:0x[0-9A-Fa-f]+|\d+))U?", text):
        return Number(int(whole[1], 0))
    if re.fullmatch(r"[%$]?[\w.]+", text):
        return Special(text)
    raise unknown("operand", repr(text))


def float_of(number: Number) -> float:
    """The value of a float that is written as its bits."""
    if number.bits == 32:
        return float(struct.unpack("<f", struct.pack("<I", number.value))[0])
    return float(struct.unpack("<d", struct.pack("<Q", number.value))[0])
