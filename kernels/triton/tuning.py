"""Block sizes: a checked-in table by (op, dtype, shape class, architecture), and the rule for what it does not list.

`tmlc tune` measures entries and writes a table; `tmlc compile --tuning` reads another one than the checked-in. What is
chosen depends on the weight and the architecture only, never on the number of rows, for `block_k` can decide the order
of sums.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tmlc.errors import EmitError, reason
from tmlc.kernels.triton.architectures import ARCHITECTURES, TENSOR_MEMORY
from tmlc.yaml_text import YamlFault, parse_yaml

TABLE = "tuning.yaml"
OPS = ("attention", "linear", "moe_down", "moe_gate_up")
BOUNDS = ("min_m", "max_m", "min_k", "max_k")
SIZES = ("block_m", "block_k", "warps", "stages")
KEYS = {"op", "dtype", "sm", *BOUNDS, *SIZES}
FORM = "{op, dtype: [..], sm: [..], min_m, max_m, min_k, max_k, block_m, block_k, warps, stages}"
HEADER = f"""\
# Block sizes that differ from the rule of tuning.py. The first entry that fits an (op, dtype, shape, sm) is taken.
# {FORM}; what is left out fits all.
# Entries for one dtype, sm and shape were measured by `tmlc tune`; they come first, sorted.
"""


@dataclass(frozen=True, order=True)
class Blocks:
    """What a table chooses: weight rows a program computes (of attention nothing: always 16 queries), inputs of a slice
    (of attention: keys at a time), warps, stages."""

    block_m: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True, order=True)
class Shape:
    """What a table is asked for: an op with a weight [m, k] (attention: values of m and keys of k columns a head, in
    caches of `dtype`) on an architecture."""

    op: str
    dtype: str
    sm: int
    m: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} [{self.m}, {self.k}] sm{self.sm}"


class Tiles:
    """The entries of a table, checked; the first that fits is taken.

    Raises (when made):
        EmitError: an entry with unknown keys, or numbers that are none, or sizes that are no powers of two.
    """

    def __init__(self, entries: Any, where: str) -> None:
        if not isinstance(entries, list):
            fix = f"write entries `- {FORM}`, or measure them with `tmlc tune`"
            raise EmitError("a table of block sizes is a list of entries", where=where, fix=fix)
        for number, entry in enumerate(entries):
            if not _sound(entry):
                what = f"entry {number} of the block sizes is not one: {str(entry)[:300]}"
                fix = f"write `{FORM}`; op is {', '.join(OPS)}; sizes: docs/triton-kernels.md, “Block sizes”"
                raise EmitError(what, where=where, fix=fix)
        self.entries: tuple[dict[str, Any], ...] = tuple(entries)

    @staticmethod
    def read(path: Path) -> "Tiles":
        """The table of a YAML file. Raises EmitError where it is none."""
        try:
            return Tiles(parse_yaml(path.read_bytes()), str(path))
        except (OSError, YamlFault) as error:
            what = f"the table of block sizes cannot be read: {reason(error)}"
            raise EmitError(what, where=str(path), fix="write one with `tmlc tune`") from error

    def blocks(self, shape: Shape) -> Blocks:
        for entry in self.entries:
            if (
                entry["op"] == shape.op
                and shape.dtype in entry.get("dtype", [shape.dtype])
                and shape.sm in entry.get("sm", [shape.sm])
                and entry.get("min_m", 0) <= shape.m <= entry.get("max_m", shape.m)
                and entry.get("min_k", 0) <= shape.k <= entry.get("max_k", shape.k)
            ):
                return Blocks(*(entry[key] for key in SIZES))
        return rule(shape)

    def with_measured(self, found: Iterable[tuple[Shape, Blocks]]) -> "Tiles":
        """A table with these entries too: those for one shape first, sorted, then the others in their order."""
        exact, others = {}, []
        for entry in self.entries:
            if (shape := _exact(entry)) is None:
                others.append(entry)
            else:
                exact[shape] = entry
        for shape, blocks in found:
            bounds = dict(zip(BOUNDS, (shape.m, shape.m, shape.k, shape.k), strict=True))
            exact[shape] = {"op": shape.op, "dtype": [shape.dtype], "sm": [shape.sm], **bounds, **asdict(blocks)}
        return Tiles([*(exact[shape] for shape in sorted(exact)), *others], TABLE)

    def to_yaml(self) -> str:
        """The text of the table: the same entries give the same bytes."""
        rows = (yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6) for entry in self.entries)
        return HEADER + ("".join(f"- {row}" for row in rows) or "[]\n")


def _sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or {"op", *SIZES} - set(entry) or set(entry) - KEYS or entry["op"] not in OPS:
        return False
    if any(not isinstance(entry.get(key, []), list) for key in ("dtype", "sm")):
        return False
    if any(type(entry.get(key, 0)) is not int or entry.get(key, 0) < 0 for key in BOUNDS):
        return False
    if any(type(entry[key]) is not int or not 1 <= entry[key] <= 4096 for key in SIZES):
        return False
    powers = all(entry[key] & (entry[key] - 1) == 0 for key in ("block_m", "block_k", "warps"))
    return powers and min(entry["block_m"], entry["block_k"]) >= 16 and entry["warps"] <= 32 and entry["stages"] <= 16


def _exact(entry: dict[str, Any]) -> Shape | None:
    """The shape of an entry that is for one only."""
    dtypes, sms = entry.get("dtype", []), entry.get("sm", [])
    low_m, high_m, low_k, high_k = (entry.get(key, -1) for key in BOUNDS)
    if len(dtypes) == len(sms) == 1 and low_m == high_m >= 0 and low_k == high_k >= 0:
        return Shape(entry["op"], dtypes[0], sms[0], low_m, low_k)
    return None


@cache
def table() -> Tiles:
    """The checked-in table."""
    return Tiles(yaml.safe_load(resources.files(__package__).joinpath(TABLE).read_text("utf-8")), TABLE)


MOST_WARPS = 8
MOST_SLICES = 16  # a warp keeps a sum for each of its own: with four of them beside gate and up 8-bit codes spilled
MOST_PROGRAMS = 4  # of a multiprocessor that share its memory, where a program takes as much as there is
ROWS = 16  # activations that stand beside a tile of weights, as float32, where there are many
_BITS = {"bf16": 16, "f8g128": 8, "i8g32": 8, "i4g32": 4, "i4g64": 4}
_GROUPS = {"f8g128": 128, "i8g32": 32, "i4g32": 32, "i4g64": 64}


def slices(dtype: str, k: int, block_k: int, sm: int) -> int:
    """How many slices of `block_k` inputs a program reads at a time. It decides the order of a sum, so it follows from
    the weight and the architecture."""
    if dtype == "f32":
        return 1
    return max(1, min(MOST_SLICES, ARCHITECTURES[sm].reach // block_k, 1 << (-(-k // block_k) - 1).bit_length()))


def turn_constants(dtype: str, k: int, block_k: int, sm: int) -> dict[str, int | bool]:
    """What kernels know of the turns in which a program reads rows of k inputs: SLICES; MASKED_K, which is k where the
    last turn is not whole, else 0; ONCE, whether there is a single one."""
    count = slices(dtype, k, block_k, sm)
    turn = count * block_k
    known = dtype != "f32"  # whose product asks for none of it, so shapes share variants
    return {"SLICES": count, "MASKED_K": k if known and k % turn else 0, "ONCE": known and k <= turn}


def stages_that_fit(stages: int, turn: int, sm: int) -> int:
    """Stages (2 at least) of which one less turn of so many bytes fits into shared memory. No sum depends on them."""
    return max(2, min(stages, 1 + ARCHITECTURES[sm].shared_bytes // turn))


def turns_at_once(dtype: str, blocks: Blocks, count: int, turns: int, programs: int, sm: int) -> int:
    """Stages of a loop of so many turns, each of `count` slices of a tile of weights and of 8 rows of bf16 activations:
    all turns on their way, as far as they fit beside the other programs of a multiprocessor."""
    if dtype == "f32":
        return blocks.stages
    beside_codes = 4 if _BITS[dtype] == 4 else 0  # scales and zero points, and what aligns them, for each input
    turn = count * blocks.block_k * (blocks.block_m * _BITS[dtype] // 8 + 2 * 8 + beside_codes)
    beside = min(MOST_PROGRAMS, -(-programs // ARCHITECTURES[sm].processors))
    return stages_that_fit(1 + turns, turn * beside, sm)


def rule(shape: Shape) -> Blocks:
    """What a table does not list, worked out and not measured.

    A tick reads each weight once, and a product of one row is over before a pipeline has filled: so a program asks for
    all that it reads at once, a slice a warp, and tiles are as low as gives the most programs. Where a program needs
    several turns and there are too few to hide each other's waits, it has two turns on the way if they fit.
    `block_k` decides the order of sums, so it follows from the weight only.
    """
    dtype, m, k = shape.dtype, shape.m, shape.k
    if shape.op == "attention":
        keys = 16 if dtype == "f32" else 32 if dtype == "u8" or max(m, k) > 128 else 64
        # Blackwell keeps sums outside the registers and moves them: heads of over 32 columns do not fit in 4 warps.
        return Blocks(16, keys, 8 if shape.sm in TENSOR_MEMORY and max(m, k) > 32 else 4, 2)
    if dtype == "f32":
        return Blocks(16 if m <= 1024 else 32, 32 if k > 32 else 16, 4, 3)
    block_k = _GROUPS.get(dtype, 128 if k > 128 else 64 if k > 64 else 32)  # two slices where K is that long
    count = slices(dtype, k, block_k, shape.sm)
    # A call names two experts at least, and a program reads rows of their gate and of their up.
    pairs = 1 if shape.op == "linear" else 2
    enough = 2 * ARCHITECTURES[shape.sm].processors
    block_m = 32 if shape.op == "linear" and m / 32 >= enough else 16
    rows = 2 * block_m if shape.op == "moe_gate_up" else block_m
    turn = count * block_k * (rows * _BITS[dtype] // 8 + 4 * ROWS)
    several = k > count * block_k and pairs * m / block_m < enough and 2 * turn <= ARCHITECTURES[shape.sm].shared_bytes
    return Blocks(block_m, block_k, min(MOST_WARPS, count), 3 if several else 2)
