"""Launches and variants as the JSON of a package (docs/triton.md, "The plan")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tmlc.emit.triton.lower import MethodLowering, Value
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import SPACES, Argument, Launch, Pointer, Variant
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.runtimes.cuda.plan import FOLDER

PLAN_VERSION = 1
PLAN = f"{FOLDER}/plan.json"
#: What machine code says of its assembler; those of CUDA 12 say it for Blackwell only, and Triton brings none older.
_ASSEMBLER = re.compile(rb"Cuda compilation tools, release (\d+)\.")
OVERLAP_DRIVER = 12030  # the first whose graphs keep a programmatic dependency (edge data of CUDA 12.3)


def cubin_name(variant: Variant) -> str:
    return f"{FOLDER}/sm{variant.sm}/{variant_key(variant)}.cubin"


def plan_json(
    methods: Sequence[MethodLowering],
    buckets: Mapping[str, Sequence[Bucket]],
    weights: Sequence[str],
    architectures: Sequence[int],
    slot_bytes: int,
    arena_bytes: int,
    scratch_bytes: int,
) -> dict[str, Any]:
    """What all architectures share: signatures, buckets, weights, bytes."""
    return {
        "version": PLAN_VERSION,
        "architectures": [f"sm{sm}" for sm in architectures],
        "slot_bytes": slot_bytes,
        "arena_bytes": arena_bytes,
        "scratch_bytes": scratch_bytes,
        "weights": list(weights),
        "methods": [
            {
                "name": method.method.name,
                "max_n": method.method.max_n,
                "inputs": [_argument(value) for _, value in method.inputs],
                "outputs": [_argument(value) for value in method.outputs],
                "buckets": [[bucket.batch, bucket.n] for bucket in buckets[method.method.name]],
                "positions": [{"offset": offset, "limit": limit} for offset, limit in method.positions()],
                "ids": method.id_limits(),
            }
            for method in methods
        ],
    }


def _argument(value: Value) -> dict[str, Any]:
    return {"dtype": value.dtype, "rows": list(value.rows), "cols": value.cols}


def least_driver(sm: int, cubins: Iterable[bytes], overlap: bool) -> int:
    """The oldest driver (as `cuDriverGetVersion` counts: 12080 is CUDA 12.8) that runs this machine code: one that
    knows the architecture, of the major version of the assembler, and for launches that overlap one that has them in
    graphs."""
    majors = {int(found[1]) if (found := _ASSEMBLER.search(cubin)) else 12 for cubin in cubins}
    needs = [ARCHITECTURES[sm].driver, *(1000 * major for major in majors)]
    return max([*needs, OVERLAP_DRIVER] if overlap else needs)


def variants_json(compiled: Mapping[Variant, Compiled]) -> list[dict[str, Any]]:
    """One entry a variant, with what it costs: registers, spills, shared memory."""
    return [
        {
            "name": variant_key(variant),
            "file": cubin_name(variant),
            "kernel": variant.kernel,
            "constexprs": dict(variant.constexprs),
            "signature": list(variant.signature),
            "num_stages": variant.num_stages,
            **figures.to_json(),
        }
        for variant, figures in compiled.items()
    ]


def launches_json(
    launches: Iterable[Launch], sm: int, variants: Mapping[Variant, int], weights: Mapping[str, int]
) -> list[list[Any]]:
    """`[variant, [x, y, z], arguments]` for each launch; a pointer is `[space, which, offset, bytes]`."""
    return [
        [variants[launch.variant(sm)], list(launch.grid), [_value(arg, weights) for arg in launch.args]]
        for launch in launches
    ]


def _value(arg: Argument, weights: Mapping[str, int]) -> int | float | list[int]:
    if not isinstance(arg, Pointer):
        return float(arg) if isinstance(arg, float) else int(arg)
    if arg.space == "weight":
        which = weights[arg.name]
    else:
        which = int(arg.name) if arg.space in ("input", "output") else 0
    return [SPACES.index(arg.space), which, arg.offset, arg.nbytes]
