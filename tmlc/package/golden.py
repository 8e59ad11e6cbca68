"""Golden calls: small recorded inputs and outputs that travel with a package.

`tmlc verify` replays them on the machine that will serve. The calls of one sequence run one after the other
on one fresh session, so they show states working, not only single calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tmlc.errors import PackageError
from tmlc.package import safetensors_io
from tmlc.package.fields import AGAIN, Fields, parse_json

if TYPE_CHECKING:
    from tmlc.package.reader import Package
    from tmlc.package.writer import PackageWriter

INDEX = "golden/golden.json"
DATA = "golden/golden.safetensors"


@dataclass(frozen=True)
class GoldenCall:
    """One call of a method with `n` new positions: what goes in and what must come out.

    Arrays have the method's signature (f32, i32, i64 or u8; two-dimensional).
    """

    sequence: int
    method: str
    n: int
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


def write_golden(writer: "PackageWriter", calls: list[GoldenCall]) -> None:
    """Adds the two golden files to a package that is being written."""
    tensors: dict[str, np.ndarray] = {}
    index = []
    for number, call in enumerate(calls):
        names: dict[str, list[str]] = {"in": [], "out": []}
        for kind, arrays in (("in", call.inputs), ("out", call.outputs)):
            for i, array in enumerate(arrays):
                names[kind].append(f"{number}.{kind}{i}")
                tensors[names[kind][-1]] = array
        entry = {"sequence": call.sequence, "method": call.method, "n": call.n}
        index.append({**entry, "inputs": names["in"], "outputs": names["out"]})
    writer.add_json(INDEX, {"calls": index})
    writer.add_bytes(DATA, safetensors_io.dump(tensors))


def read_golden(package: "Package") -> list[GoldenCall]:
    """The golden calls of a package, in the order in which they must be replayed; empty when it has none.

    Raises:
        PackageError: the files do not fit together.
    """
    if INDEX not in package.names():
        return []
    where = f"{package.path}: {INDEX}"
    tensors = safetensors_io.load(package.read(DATA), f"{package.path}: {DATA}")
    index = Fields(parse_json(package.read(INDEX), where), where)
    calls = index.items("calls", lambda f: _read_call(f, tensors))
    index.done()
    return list(calls)


def _read_call(f: Fields, tensors: dict[str, np.ndarray]) -> GoldenCall:
    inputs, outputs = (tuple(_arrays(f, key, tensors)) for key in ("inputs", "outputs"))
    call = GoldenCall(f.integer("sequence"), f.text("method"), f.integer("n", 1, 2**24), inputs, outputs)
    f.done()
    return call


def _arrays(f: Fields, key: str, tensors: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    for name in f.sequence(key):
        if not isinstance(name, str) or name not in tensors:
            raise PackageError(f"golden tensor {str(name)[:60]!r} is missing", where=f.where, fix=AGAIN)
        yield tensors[name]
