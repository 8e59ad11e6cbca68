"""Kernels and plan of a model that no machine here could hold: `python -m tmlc.report.gpu_plan tml-small-276b` prints
one JSON line with the seconds of each stage and the peaks of memory (of this process, and of the largest child that
compiled kernels). In place of a preset's name a checkpoint's folder will do, of which config.json alone is read.

Everything is what `tmlc compile` does up to the weights, which are never read: tracing, passes, lowering to launches,
compiling every kernel, and the JSON of the plan. Nothing is written, and the module run by itself does not use the
compile cache. `--launches` stops before kernels are compiled and prints how many launches a call of each method makes
in its smallest bucket, and each graph of a tick for one session; `--disable` leaves out passes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import TmlcError, UsageError
from tmlc.pipeline.pipeline import Pipeline, load_pipeline
from tmlc.report.startup import peak_rss_bytes

if TYPE_CHECKING:
    from tmlc.emit.triton.target import Lowerings, TritonTarget
    from tmlc.frontend.checkpoint import Checkpoint
    from tmlc.ir.program import Program

def triton_target(name: str) -> TritonTarget:
    """The Triton target of that name. Raises UsageError for another one."""
    from tmlc.emit.targets import find_target
    from tmlc.emit.triton.target import TritonTarget

    found = find_target(name)
    if not isinstance(found, TritonTarget):
        raise UsageError(f"target {name} has no kernels for GPUs", where="--target", fix="name triton:sm90")
    return found


def unread_source(model: str) -> Checkpoint:
    """The model that a plan is made of, to be compiled without reading a weight: a checkpoint's folder, of which
    config.json alone will do, or a preset of the zoo. What has the name of a preset and is no checkpoint (an empty
    folder `small`) is the preset.

    Raises:
        UsageError: it is neither.
        CheckpointError: the folder is a damaged checkpoint.
    """
    from tmlc.frontend.checkpoint import ConfigOnly, open_unread
    from tmlc.model_zoo.interaction.config import PRESETS, InteractionConfig

    path = Path(model)
    if path.is_dir() and (model not in PRESETS or (path / "config.json").is_file()):
        return open_unread(path)
    if model in PRESETS:
        return ConfigOnly(path, InteractionConfig.from_preset(model).to_dict())
    raise UsageError(f"{model!r} is neither a preset nor a checkpoint", fix=f"presets: {', '.join(PRESETS)}")


def unreading(steps: Pipeline, precision: str) -> Pipeline:
    """The pipeline for that precision, without what would read every weight: the report of a quantizer."""
    from tmlc.compiler import QUANTISERS, with_codes

    coder = next((name for name, kind in QUANTISERS.items() if kind == precision), None)
    return steps if coder is None else with_codes(steps, coder).configure(coder, report=False)


def program_of(
    source: Checkpoint, target: str, precision: str, pipeline: Pipeline, context: int | None = None
) -> Program:
    """What is lowered to launches, after the passes, with room for `context` positions (None: the model's own). No
    weight is read.

    Raises:
        UsageError: no such target or precision.
    """
    from tmlc.compiler import compile

    steps = unreading(pipeline, precision)
    report = compile(
        source, "", target=target, precision=precision, pipeline=steps, stop_after="memory.buckets", context=context
    )
    assert report.program is not None
    return report.program


def plan_on_meta(
    model: str, target: str, precision: str, jobs: int | None = None, pipeline: Pipeline | None = None
) -> dict[str, Any]:
    """Everything of a compilation but the weights, with its figures. `pipeline`: default is the target's own.

    Raises:
        UsageError, CheckpointError: no such model, target or precision.
        EmitError: an op has no kernel, or a kernel does not compile.
    """
    from tmlc.emit.triton.build import build_variants, default_jobs
    from tmlc.emit.triton.plan import launches_json, variants_json
    from tmlc.frontend.checkpoint import DTYPES

    chosen = triton_target(target)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage], started = round(now - started, 2), now
        print(f"{stage}: {seconds[stage]} s", file=sys.stderr)

    source = unread_source(model)
    program = program_of(source, target, precision, pipeline or load_pipeline("triton"))
    lap("trace and passes")
    lowered = chosen.lower(program)
    lap("lower to launches")
    variants = lowered.variants()
    compiled = build_variants(variants, jobs=jobs)
    lap("compile kernels")
    weights = {name: number for number, name in enumerate(lowered.weights())}
    size = 0
    for sm in chosen.architectures:
        own = {variant: figures for variant, figures in compiled.items() if variant.sm == sm}
        places = {variant: number for number, variant in enumerate(own)}
        launches = launches_json(lowered.all(sm), sm, places, weights)
        size += len(json.dumps([variants_json(own), launches], separators=(",", ":")))
    lap("plan")
    spilled = {f"{v.kernel} {dict(v.constexprs)}": f.spill_bytes for v, f in compiled.items() if f.spill_bytes}
    count, child = jobs or default_jobs(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "model": model, "target": target, "precision": precision, "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 2), "jobs": count, "peak_bytes": peak_rss_bytes(),
        "peak_bytes_of_a_child": child, "peak_bytes_of_all": peak_rss_bytes() + count * child,
        "checkpoint_bytes": sum(math.prod(t.shape) * DTYPES[t.dtype][1] for t in source.tensors.values()),
        "launches": sum(len(lowered.all(sm)) for sm in chosen.architectures),
        "chains": sum(map(len, lowered.chains.values())), "variants": len(variants),
        "kernels": dict(Counter(v.kernel for v in variants)), "plan_bytes": size,
        "cubin_bytes": sum(len(f.cubin) for f in compiled.values()), "arena_bytes": lowered.arena_bytes,
        "scratch_bytes": lowered.scratch_bytes, "most_registers": max(f.registers for f in compiled.values()),
        "spills": spilled,
    }  # fmt: skip


def lowered_model(model: str, target: str, precision: str, pipeline: Pipeline) -> tuple[Program, Lowerings, int]:
    """The program of a model, its launches, and the first architecture of the target. No kernel is compiled and no
    weight read.

    Raises:
        UsageError, CheckpointError: no such model, target or precision.
        EmitError: an op has no kernel.
    """
    chosen = triton_target(target)
    program = program_of(unread_source(model), target, precision, pipeline)
    return program, chosen.lower(program), chosen.architectures[0]


def launches_of_calls(model: str, target: str, precision: str, pipeline: Pipeline) -> dict[str, dict[str, int]]:
    """Kernel → launches: of a call of each method in its smallest bucket (`decode`), and of the graphs of a tick for
    one session (`listen.b1`)."""
    from tmlc.emit.triton.chains import chains_of
    from tmlc.kernels.triton.bucket import Bucket
    from tmlc.runtimes.cuda.chains import Link

    program, lowered, sm = lowered_model(model, target, precision, pipeline)
    methods = lowered.launches[sm]
    found = {name: buckets[min(buckets, key=lambda b: (b.batch, b.n))] for name, buckets in methods.items()}
    for chain in chains_of(program, lowered.methods, lowered.buckets)[0]:
        if chain.batch == 1:
            calls = [methods[link.method][Bucket(1, link.n)] for link in chain.links if isinstance(link, Link)]
            found[chain.key] = [launch for part in (*calls, lowered.chains[sm][chain.key]) for launch in part]
    return {name: dict(Counter(launch.kernel for launch in launches)) for name, launches in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmlc.report.gpu_plan")
    parser.add_argument("model", help="a preset of the zoo, e.g. tml-small-276b, or a folder with a config.json")
    parser.add_argument("--target", default="triton:sm90")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--overlap", action="store_true", help="with the pass memory.overlap")
    jobs = parser.add_argument("--jobs", type=int, choices=range(1, 257), metavar="N")
    jobs.help = "processes that compile kernels, 1 to 256; default: a core each"
    parser.add_argument("--launches", action="store_true", help="launches of calls and of a tick's graphs; no kernels")
    parser.add_argument("--disable", default="", help="passes to leave out, with commas between")
    chosen = parser.parse_args()
    os.environ["TMLC_CACHE"] = "off"
    try:
        _print(chosen)
    except TmlcError as error:
        parser.error(str(error))


def _print(chosen: argparse.Namespace) -> None:
    steps = load_pipeline("triton").disable(name for name in chosen.disable.split(",") if name)
    if chosen.overlap:
        steps = steps.before("memory.buckets", "memory.overlap")
    if chosen.launches:
        found = launches_of_calls(chosen.model, chosen.target, chosen.precision, steps)
        for method, kernels in found.items():
            print(f"{method:13}{sum(kernels.values()):5}  {', '.join(f'{k} {n}' for k, n in kernels.items())}")
        return
    print(json.dumps(plan_on_meta(chosen.model, chosen.target, chosen.precision, chosen.jobs, steps)))


if __name__ == "__main__":
    main()
