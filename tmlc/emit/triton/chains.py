"""The launches between the methods of a tick's chains: which chains there are says `runtimes/cuda/chains.py`, which the
runtime composes again when it loads the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tmlc.emit.graph import tick_layout
from tmlc.emit.triton.lower import MethodLowering
from tmlc.ir.program import Program
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Launch, Operand
from tmlc.kernels.triton.registry import Call, lower
from tmlc.runtimes.core.backend import MethodSpec, TensorSpec
from tmlc.runtimes.cuda.chains import Chain, Clamp, Place, Take, compose, lacking

ROWS = Bucket(1, 1)  # of launches whose rows are counted already


def chains_of(
    program: Program, methods: Sequence[MethodLowering], buckets: Mapping[str, Sequence[Bucket]]
) -> tuple[list[Chain], str]:
    """The chains of a program: none unless it is a model that speaks, with buckets for all of them. For a model that
    speaks and has none also which bucket there is not."""
    layout = tick_layout(program.meta["tick"])
    if program.meta["kind"] != "interaction" or not layout.audio_out:
        return [], ""
    specs = {}
    for method in methods:
        info = method.signature()
        inputs, outputs = (
            tuple(TensorSpec(one.dtype, *one.rows, one.cols) for one in side) for side in (info.inputs, info.outputs)
        )
        specs[info.name] = MethodSpec(info.name, info.max_n, inputs, outputs)
    pairs = {name: [(b.batch, b.n) for b in found] for name, found in buckets.items()}
    return compose(specs, pairs, layout), lacking(specs, pairs, layout)


def glue(chain: Chain, sm: int) -> list[Launch]:
    """What a chain runs between its methods: a launch for each `Take` and `Clamp`."""
    made = []
    for link in chain.glue:
        (launch,) = lower(_call(link, sm)).launches
        made.append(launch)
    return made


def _call(link: Take | Clamp, sm: int) -> Call:
    out = _rows(link.out, link.rows, link.cols)
    if isinstance(link, Clamp):
        source = _rows(link.source, link.rows, link.cols)
        return Call("clamp", {"x": source}, {"lo": -1.0, "hi": 1.0}, (out,), ROWS, sm)
    index = Operand("input", "i32", (link.rows, 0), 1, 1, link.index, "0")
    source = _rows(link.source, link.entries, link.cols)
    return Call("take_rows", {"source": source, "index": index}, {}, (out,), ROWS, sm)


def _rows(place: Place, rows: int, cols: int) -> Operand:
    return Operand(place[0], "f32", (rows, 0), cols, cols, place[1], "" if place[0] == "between" else "0")
