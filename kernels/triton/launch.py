"""What a lowering gives: launches in which every number is known, and the variants of kernels that they need."""

from dataclasses import dataclass, replace
from typing import Any

from tmlc.errors import REPORT, EmitError
from tmlc.kernels.triton.overlap import UNWRITTEN

ITEM_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "u8": 1}
TRITON_NAMES = {
    "f64": "fp64", "i64": "i64", "f32": "fp32", "i32": "i32", "bf16": "bf16", "f16": "fp16", "u8": "u8",
}  # fmt: skip

#: Where a pointer points. `slots` and `counts` are the bucket's two arrays (bucket.py); `state` is the pool of slots,
#: and offsets there are those of one slot, to which a kernel adds the session's own. `between` is what passes from one
#: method of a chain to the next.
SPACES = ("weight", "arena", "state", "input", "output", "scratch", "slots", "counts", "between")
ALIGNMENT = 16
#: Pieces of scratch begin at multiples of so many bytes.
PIECE = 256


@dataclass(frozen=True)
class Operand:
    """A tensor of a method as a kernel meets it.

    Attributes:
        space: one of SPACES.
        dtype: f32 bf16 i32 i64 u8, or for weights a form of layouts.py (f8g128 i8g32 i4g32 i4g64).
        rows: (a, b), a·n + b rows for each session; (0, b) for weights and states.
        cols, stride: elements of a row, and from one row to the next.
        offset: bytes, inside the space or, for weights, inputs and outputs, inside the tensor.
        name: of the weight; the number of the argument for inputs and outputs.
        shape: of a weight as the program has it (stacked experts are three-dimensional).
    """

    space: str
    dtype: str
    rows: tuple[int, int]
    cols: int
    stride: int
    offset: int = 0
    name: str = ""
    shape: tuple[int, ...] = ()

    def pointer(self, nbytes: int) -> "Pointer":
        return Pointer(self.space, self.name, self.offset, self.dtype, nbytes)


@dataclass(frozen=True)
class Pointer:
    """A pointer argument: `offset` bytes from the start of a space (of the tensor `name` where the space has several),
    behind which the launch touches at most `nbytes` bytes (in a state: of each session's slot)."""

    space: str
    name: str
    offset: int
    dtype: str
    nbytes: int

    def __post_init__(self) -> None:
        if self.space not in SPACES or self.dtype not in ITEM_BYTES or self.offset < 0:
            what = f"a pointer to {self.space} {self.name!r} at {self.offset} of {self.dtype}"
            raise EmitError(what, fix=REPORT)

    @property
    def aligned(self) -> bool:
        """Whether it may be assumed to lie at a multiple of 16 bytes: spaces and tensors begin at such."""
        return self.offset % ALIGNMENT == 0


Argument = Pointer | int | float


@dataclass(frozen=True)
class Launch:
    """One kernel call: everything is a number, but where the spaces lie.

    Attributes:
        kernel: name of a device function (mode.py).
        constexprs: values compiled into the kernel, by parameter name, sorted; None: the operand is absent.
        num_warps, num_stages: of the compiled kernel.
        grid: programs along x, y, z.
        args: the other parameters of the function, in its order.
        overlap: whether it may begin before the launch before it has ended (overlap.py).
    """

    kernel: str
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    args: tuple[Argument, ...]
    overlap: bool = False

    def signature(self) -> tuple[str, ...]:
        """The type of each argument: `*fp32:16` (16: a multiple of 16), `i32`, `i64`, `fp32`."""
        return tuple(_type(arg) for arg in self.args)

    def variant(self, sm: int) -> "Variant":
        early = None
        if self.overlap:
            pointers = ((k, arg) for k, arg in enumerate(self.args) if isinstance(arg, Pointer))
            early = tuple(k for k, arg in pointers if arg.space in UNWRITTEN)
        return Variant(self.kernel, self.constexprs, self.signature(), self.num_warps, self.num_stages, sm, early)

    def overlapping(self) -> "Launch":
        """The same launch, begun before the one before it has ended."""
        return replace(self, overlap=True)


@dataclass(frozen=True)
class Variant:
    """What one compilation makes machine code for; equal variants share it.

    Attributes:
        early: where launches overlap, the numbers of the arguments that no kernel writes to (overlap.py).
    """

    kernel: str
    constexprs: tuple[tuple[str, Any], ...]
    signature: tuple[str, ...]
    num_warps: int
    num_stages: int
    sm: int
    early: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Lowered:
    """The launches of one call, in order, and the scratch bytes that they share (offsets from 0)."""

    launches: tuple[Launch, ...]
    scratch_bytes: int = 0


class Scratch:
    """What the launches of one call hand to each other, piece behind piece."""

    def __init__(self) -> None:
        self.used = 0

    def piece(self, dtype: str, count: int) -> Pointer:
        pointer = Pointer("scratch", "", self.used, dtype, ITEM_BYTES[dtype] * count)
        self.used += -(-pointer.nbytes // PIECE) * PIECE
        return pointer

    def operand(self, dtype: str, rows: tuple[int, int], cols: int, count: int) -> Operand:
        """Dense rows, `count` in all sessions."""
        return Operand("scratch", dtype, rows, cols, cols, self.piece(dtype, count * cols).offset)

    def lowered(self, *launches: Launch) -> Lowered:
        return Lowered(launches, self.used)


class Aligned(int):
    """An integer argument that may be compiled in as a multiple of 16, where it is one (sizes and strides of weights,
    which are the same in every bucket)."""


def _type(arg: Argument) -> str:
    if isinstance(arg, Pointer):
        return f"*{TRITON_NAMES[arg.dtype]}" + (":16" if arg.aligned else "")
    if isinstance(arg, float):
        return "fp32"
    wide = not -(2**31) <= arg < 2**31
    hint = ":16" if isinstance(arg, Aligned) and arg % ALIGNMENT == 0 else ""
    return ("i64" if wide else "i32") + hint
