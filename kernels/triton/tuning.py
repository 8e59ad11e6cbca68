"""Block sizes: a checked-in table by (op, dtype, shape class, architecture), and the rule for what it does not list.

What is chosen here changes the order of sums, so it depends on the weight and the architecture only, never on the
number of rows.
"""

from functools import cache
from importlib import resources
from typing import Any

import yaml

from tmlc.errors import EmitError

TABLE = "tuning.yaml"
KEYS = {"op", "dtype", "sm", "min_m", "max_m", "min_k", "max_k", "block_m", "block_k", "warps", "stages"}


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The entries of the table, checked; the first that fits is taken.

    Raises:
        EmitError: an entry with unknown keys or sizes that are no powers of two.
    """
    entries = yaml.safe_load(resources.files(__package__).joinpath(TABLE).read_text("utf-8"))
    for number, entry in enumerate(entries):
        missing = {"op", "block_m", "block_k", "warps", "stages"} - set(entry)
        sizes = [entry.get(key, 1) for key in ("block_m", "block_k", "warps")]
        if missing or set(entry) - KEYS or any(size & (size - 1) or size < 1 for size in sizes):
            raise EmitError(f"entry {number} of the block sizes is not one: {entry}", where=TABLE)
    return tuple(entries)


def tile(op: str, dtype: str, m: int, k: int, sm: int) -> tuple[int, int, int, int]:
    """(weight rows a program computes, inputs it reads at a time, warps, stages) for a weight [m, k]."""
    for entry in table():
        if (
            entry["op"] == op
            and dtype in entry.get("dtype", [dtype])
            and sm in entry.get("sm", [sm])
            and entry.get("min_m", 0) <= m <= entry.get("max_m", m)
            and entry.get("min_k", 0) <= k <= entry.get("max_k", k)
        ):
            return entry["block_m"], entry["block_k"], entry["warps"], entry["stages"]
    return rule(dtype, m, k)


def rule(dtype: str, m: int, k: int) -> tuple[int, int, int, int]:
    """What the table does not list: narrow tiles, so that a tick has programs for every multiprocessor, and reads of
    at least 128 bytes a row."""
    block_m = 16 if m <= 1024 else 32 if m <= 8192 else 64
    if dtype == "f32":
        return min(block_m, 32), 32 if k > 32 else 16, 4, 3
    if dtype == "bf16":
        return block_m, 128 if k > 64 else 64 if k > 32 else 32, 4, 4
    if dtype == "f8g128":
        return block_m, 128, 4, 3
    return block_m, 64 if dtype == "i4g64" else 128, 4, 3
