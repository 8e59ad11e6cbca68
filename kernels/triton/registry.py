"""Which kernels run an op: one lowering for each canonical or fused op, and what it cannot take, with the reason.

lowered = lower(Call("linear", {"x": x, "weight": w, "bias": None}, {}, (out,), Bucket(1, 4), 90))
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tmlc.errors import REPORT, EmitError
from tmlc.ir.replaced import REPLACED
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import ITEM_BYTES, Argument, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.layouts import FORMS
from tmlc.kernels.triton.mode import PARAMETERS
from tmlc.kernels.triton.tuning import Blocks, Shape, Tiles, table

#: Modules with lowerings; importing them fills LOWERINGS.
MODULES = (
    "steps", "linear", "norms", "attention", "elementwise", "lookup", "conv", "normed", "router", "moe", "moe_launches",
    "position", "random", "media", "blocks", "attention_linear",
)  # fmt: skip

#: Ops that never reach an engine, and what takes their place.
REFUSED = REPLACED

#: Other readings of the same bytes: the emitter makes no launch of them.
VIEWS = ("columns", "reshape")

#: What to do about a call that no kernel takes, where nothing nearer is known.
FIX = "Compile for --target cpu, or change the model: docs/triton-kernels.md says what each kernel takes."


@dataclass(frozen=True)
class Call:
    """One call of an op that is to be lowered.

    Attributes:
        op: name of the canonical or fused op.
        args: its tensor arguments by name; None where one is absent.
        attrs: its other arguments by name.
        outputs: where its results go, in order.
        bucket, sm: what for.
        tiles: the table of block sizes.
    """

    op: str
    args: dict[str, Operand | None]
    attrs: dict[str, Any]
    outputs: tuple[Operand, ...]
    bucket: Bucket
    sm: int
    tiles: Tiles = field(default_factory=table, compare=False)

    def fail(self, why: str, fix: str = FIX) -> EmitError:
        return EmitError(f"op {self.op}: {why}", where=f"sm{self.sm}, {self.bucket.name}", fix=fix)

    def need(self, condition: bool, why: str, fix: str = FIX) -> None:
        if not condition:
            raise self.fail(why, fix)

    def operand(self, name: str) -> Operand:
        value = self.args.get(name)
        if value is None:
            raise self.fail(f"operand {name} is missing", f"give it: {self.op} takes {', '.join(self.args)}")
        return value

    def optional(self, name: str) -> Operand | None:
        return self.args.get(name)

    def blocks(self, op: str, dtype: str, m: int, k: int) -> Blocks:
        """Block sizes of a product with a weight [m, k], or of attention (tuning.py)."""
        found, form = self.tiles.blocks(Shape(op, dtype, self.sm, m, k)), FORMS.get(dtype)
        whole = form is None or not form.group or found.block_k == form.group
        self.need(whole, f"slices of {found.block_k} inputs are no groups of {dtype}", "correct the table")
        return found

    def rows(self, operand: Operand) -> int:
        """Rows in this bucket; of a weight or a state, its own."""
        return operand.rows[1] if operand.space in ("weight", "state") else self.bucket.rows(operand.rows)

    def pointer(self, operand: Operand, dtypes: Iterable[str] = ("f32",)) -> Pointer:
        """The whole operand, of one of `dtypes`."""
        dtypes = tuple(dtypes)
        self.need(operand.dtype in dtypes, f"{operand.name or operand.space} is {operand.dtype}, not {dtypes}")
        rows = self.rows(operand)
        nbytes = ((rows - 1) * operand.stride + operand.cols) * ITEM_BYTES[operand.dtype] if rows else 0
        return operand.pointer(nbytes)

    @property
    def slots(self) -> Pointer:
        return Pointer("slots", "", 0, "i64", 8 * self.bucket.batch)

    @property
    def counts(self) -> Pointer:
        return Pointer("counts", "", 0, "i32", 4 * self.bucket.batch)


def launch(
    kernel: str,
    grid: tuple[int, ...],
    values: Mapping[str, Argument | None],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 1,
) -> Launch:
    """A launch from values by parameter name; a None is compiled in as an absent operand.

    Raises:
        EmitError: a value is missing, left over, or the grid is larger than a GPU takes.
    """
    absent = {name: None for name, value in values.items() if value is None}
    fixed = {**constexprs, **absent}
    given = set(values) | set(fixed)
    wanted = PARAMETERS[kernel]
    if given != set(wanted):
        raise EmitError(f"kernel {kernel} takes {sorted(set(wanted) ^ given)} otherwise", fix=REPORT)
    args = tuple(values[name] for name in wanted if name not in fixed)
    x, y, z = (*grid, 1, 1)[:3]
    if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16):
        raise EmitError(f"kernel {kernel} has a grid of {(x, y, z)}", fix="compile smaller buckets")
    return Launch(kernel, tuple(sorted(fixed.items())), num_warps, num_stages, (x, y, z), args)  # type: ignore[arg-type]


LOWERINGS: dict[str, Callable[[Call], Lowered]] = {}


def lowering(*ops: str) -> Callable[[Callable[[Call], Lowered]], Callable[[Call], Lowered]]:
    """Registers the decorated function as what lowers `ops`."""

    def register(fn: Callable[[Call], Lowered]) -> Callable[[Call], Lowered]:
        for op in ops:
            if op in LOWERINGS:
                raise ValueError(f"two lowerings of {op}")
            LOWERINGS[op] = fn
        return fn

    return register


def load_kernels() -> None:
    """Imports every module of kernels."""
    for name in MODULES:
        importlib.import_module(f"tmlc.kernels.triton.{name}")


def supported() -> tuple[str, ...]:
    """The ops that have kernels."""
    load_kernels()
    return tuple(sorted(LOWERINGS))


def lower(call: Call) -> Lowered:
    """The launches that run one call.

    Raises:
        EmitError: there is no kernel for the op, or it does not take these operands; says why.
    """
    load_kernels()
    if call.sm not in ARCHITECTURES:
        known = ", ".join(f"sm{sm}" for sm in ARCHITECTURES)
        raise call.fail("kernels are not compiled for this architecture", f"use one of {known}")
    if call.op not in LOWERINGS:
        why = REFUSED.get(call.op, "there is no Triton kernel for it")
        raise call.fail(why, "Use the pipeline of the target: --preset triton.")
    return LOWERINGS[call.op](call)
