"""The whole compilation on one page: checkpoint → program → passes → plan → package.

    tmlc.compile("nano/", "nano.tmlc", precision="bf16")

Weights stream through memory one tensor at a time. Whatever stops a compilation leaves nothing behind.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tmlc
from tmlc.emit.golden import record_golden, tolerances
from tmlc.emit.graph import tick_layout
from tmlc.emit.packing import check_finite
from tmlc.emit.targets import Coverage, Emitted, Progress, StoredWeight, check_choice, find_target, weight_entries
from tmlc.errors import CheckpointError, PackageError, TmlcError, UsageError
from tmlc.frontend import load_program
from tmlc.frontend.checkpoint import Checkpoint, open_checkpoint, open_unread
from tmlc.ir.program import PassRecord, Program
from tmlc.ir.text import print_program
from tmlc.package import PackageWriter, WeightItem
from tmlc.package.golden import write_golden
from tmlc.package.manifest import (
    ContextInfo,
    Manifest,
    MemoryInfo,
    ModelInfo,
    TargetInfo,
)
from tmlc.pipeline.check import Checker
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")  # that some target has, or will have
KV = {
    "fp32": "f32",
    "bf16": "bf16",
    "fp16": "f16",
    "int8": "int8",
}  # what keys and values are kept as: the setting of state.insert
QUANTISERS = {f"quantize.{kind}": kind for kind in ("int8", "int4", "fp8")}

PROGRAM = "program.ir"
TOKENIZER = "tokenizer.json"


@dataclass
class CompileReport:
    """What a compilation did.

    Attributes:
        checkpoint, out: folders and files; `out` is None when the pipeline was stopped early.
        model, kind, target, precision: what was compiled for what.
        passes: one record for each pass.
        coverage: which kernel runs which op of which method.
        notes: what the frontend says of how it read the checkpoint.
        seconds: wall time of each stage.
        package_bytes, weight_bytes, arena_bytes, scratch_bytes, session_bytes: sizes.
        digest: of the package.
        program: the program as it was emitted (not part of the JSON form).
    """

    checkpoint: Path
    out: Path | None
    model: str
    kind: str
    target: str
    precision: str
    passes: list[PassRecord] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    package_bytes: int = 0
    weight_bytes: int = 0
    arena_bytes: int = 0
    scratch_bytes: int = 0
    session_bytes: int = 0
    digest: str = ""
    program: Program | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        body = {name: value for name, value in vars(self).items() if name != "program"}
        body["checkpoint"], body["out"] = str(self.checkpoint), None if self.out is None else str(self.out)
        body["passes"] = [record.to_json() for record in self.passes]
        body["coverage"] = [asdict(row) for row in self.coverage]
        return body


def program(checkpoint: str | Path, **overrides: Any) -> Program:
    """The compiler's view of a checkpoint: the stateless program, before any pass.

    Args:
        checkpoint: a folder in the Hugging Face form.
        overrides: of the model's runtime defaults: context, policy, sinks, max_append.

    Raises:
        CheckpointError, FrontendError: the folder is no checkpoint that tmlc knows, or it is damaged.
    """
    return load_program(checkpoint, overrides)


def compile(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    target: str = "cpu",
    precision: str | None = None,
    preset: str | None = None,
    pipeline: str | Path | Pipeline | None = None,
    check: bool = False,
    *,
    folder: bool = False,
    passes: Sequence[str] | None = None,
    disable: Iterable[str] = (),
    stop_after: str | None = None,
    dump: str | Path | None = None,
    context: int | None = None,
    context_policy: str | None = None,
    sinks: int | None = None,
    max_append: int | None = None,
    kv: str | None = None,
    tuning: str | Path | None = None,
    dry_run: bool = False,
    on_progress: Progress | None = None,
    on_record: Callable[[PassRecord], None] | None = None,
) -> CompileReport:
    """Compiles a checkpoint into a package.

    Args:
        checkpoint: a folder in the Hugging Face form, or one that `open_checkpoint` opened. With `stop_after` or
            `dry_run`, and without `check`, one with config.json alone will do.
        out: the package to write; a package that is there is replaced when the new one is whole.
        target: "cpu", "onnx", or "tensorrt:" or "triton:" and an architecture (`tmlc.emit.targets`).
        precision: "fp32", "bf16" or "fp16" (linears, experts, embeddings, keys and values), "int8", "fp8" or "int4"
            (codes for linears and experts, bf16 for embeddings, keys and values), as far as the target has them.
            Default: what the pipeline says, else fp32.
        preset: name of a pipeline that comes with tmlc, or a level of the target's own: "O0" what the engine cannot do
            without, "O1", "O2" everything. Default: the target's.
        pipeline: a pipeline file instead.
        check: compare outputs on real inputs after every pass, and name the pass that breaks them.
        folder: write the package as a folder.
        passes, disable, stop_after: passes to run instead of the pipeline's, to leave out, to end after (nothing is
            written then).
        dump: folder for the text form of the program after every pass.
        context, context_policy, sinks, max_append: positions a session keeps, "ring_with_sinks" or "end", positions
            kept from the start, positions of one call. Default: the model's.
        kv: what keys and values are kept as: "fp32", "bf16", "fp16" or "int8", as far as the target has them. Default:
            as `precision` says, else the pipeline.
        tuning: a table of block sizes that `tmlc tune` wrote, for triton. Default: the one that comes with tmlc.
        dry_run: end before the target's tools run: the report's `coverage` says which ops would not lower, and why.
        on_progress: gets (stage, done, total) as work proceeds.
        on_record: gets the record of each pass when it is done.

    Raises:
        UsageError, TargetError: a target or precision that is not there.
        CheckpointError: the checkpoint is damaged or incomplete, or holds NaN or infinite weights (named).
        PipelineError, IRError, CheckError: the pipeline is wrong, or a pass broke the program (named).
        EmitError: the program cannot be lowered to the target.
        PackageError: the package cannot be written; nothing was left behind.
    """
    chosen = find_target(target)
    check_choice(chosen, precision, kv, PRECISIONS)
    if tuning is not None:
        chosen.tune(Path(tuning))
    tell: Progress = on_progress or (lambda stage, done, total: None)
    steps = _pipeline(target, preset, pipeline, passes, disable, stop_after)
    seconds: dict[str, float] = {}

    with _timed(seconds, "load"):
        tell("reading the checkpoint", 0, 1)
        unread = (stop_after is not None or dry_run) and not check
        opened = open_unread if unread else open_checkpoint
        source = checkpoint if isinstance(checkpoint, Checkpoint) else opened(checkpoint)
        if check:
            source.scan_finite()  # a NaN would look like a pass that changes outputs
        bounds = {"context": context, "policy": context_policy, "sinks": sinks, "max_append": max_append}
        traced = load_program(source, bounds)
        tell("reading the checkpoint", 1, 1)
    with _timed(seconds, "passes"):
        steps = _configured(steps, precision, bounds, kv, source.has_values)
        for step in steps.steps:  # a pipeline can choose a precision too
            check_choice(chosen, QUANTISERS.get(step.name), None, PRECISIONS)
        checker = Checker(traced, source) if check else None
        ready = _run_passes(traced, steps, source, checker, dump, tell, on_record)
    precision = _precision_of(ready)
    report = CompileReport(
        source.folder,
        None,
        str(ready.meta["name"]),
        str(ready.meta["kind"]),
        target,
        precision,
        ready.record,
    )
    report.seconds, report.program, report.coverage = seconds, ready, chosen.coverage(ready)
    report.notes = list(ready.meta.get("notes", ()))
    if not source.has_values:
        report.notes.append("config.json alone is there, and no shards: every weight counts as bfloat16")
    if stop_after is not None or dry_run:
        return report

    with _timed(seconds, "emit"):
        engine = chosen.emit(ready, source, tell)
        report.scratch_bytes = engine.scratch_bytes
        report.notes += engine.notes
    report.out = Path(out)
    with PackageWriter(out, folder) as writer:
        for name, content in engine.files.items():
            if isinstance(content, bytes):
                writer.add_bytes(name, content)
            else:
                writer.add_json(name, content)
        writer.add_bytes(PROGRAM, print_program(ready, record=False, sources=False).encode())
        tokenizer = _add_tokenizer(writer, ready, source)
        with _timed(seconds, "weights"):
            writer.add_weights(_weight_items(engine, ready, source, tell))
        with _timed(seconds, "golden"):
            methods = len(ready.methods)
            counter = iter(range(methods))
            calls = record_golden(ready, source, lambda name: tell("recording golden calls", next(counter), methods))
            write_golden(writer, calls)
            tell("recording golden calls", methods, methods)
        with _timed(seconds, "digests"):
            tell("digesting the checkpoint", 0, 1)
            digests = source.digest()
            tell("digesting the checkpoint", 1, 1)
        manifest = Manifest(
            model=ModelInfo(report.model, report.kind, digests),
            methods=engine.methods,
            states=engine.states,
            session_bytes=engine.slot_bytes,
            tick=tick_layout(ready.meta["tick"]),
            context=ContextInfo(**ready.meta["context"]),
            memory=MemoryInfo(weight_entries(engine.weights)[1], engine.arena_bytes, report.scratch_bytes),
            targets={target: TargetInfo(engine.plan, precision, engine.layout)},
            tolerances=tolerances(ready, calls, precision, _exact_caches(engine)),
            tokenizer=tokenizer,
            producer={"tmlc": tmlc.__version__, "torch": torch.__version__, **engine.producer},
            pipeline=tuple(_stable(record) for record in ready.record),
            required_features=engine.features,
        )
        manifest = writer.finish(manifest)
    report.weight_bytes, report.arena_bytes = manifest.memory.weight_bytes, engine.arena_bytes
    report.session_bytes = engine.slot_bytes
    report.package_bytes, report.digest = writer.size, writer.digest
    return report


def _pipeline(
    target: str,
    preset: str | None,
    pipeline: str | Path | Pipeline | None,
    passes: Sequence[str] | None,
    disable: Iterable[str],
    stop_after: str | None,
) -> Pipeline:
    """The steps that were asked for."""
    if sum(given is not None for given in (preset, pipeline, passes)) > 1:
        raise UsageError("give only one of preset, pipeline and passes", fix="Leave two of them out.")
    if passes is not None:
        steps = Pipeline.of(passes)
    elif isinstance(pipeline, Pipeline):
        steps = pipeline
    else:
        steps = load_pipeline(pipeline or preset or target.partition(":")[0], target)
    if names := list(disable):
        steps = steps.disable(names)
    return steps if stop_after is None else steps.stop_after(stop_after)


def _configured(
    steps: Pipeline,
    precision: str | None,
    bounds: dict[str, Any],
    kv: str | None,
    has_values: bool,
) -> Pipeline:
    """The steps with the settings that a call of `compile` may override. A quantizer that has no values to read makes
    no report of its errors."""
    kv_dtype = KV[kv] if kv is not None else {"fp32": "f32", "fp16": "f16", None: None}.get(precision, "bf16")
    coder = next((name for name, kind in QUANTISERS.items() if kind == precision), None)
    if coder is not None:
        steps = with_codes(steps, coder)
        if not has_values:
            steps = steps.configure(coder, report=False)
    steps = steps.configure("quantize.cast", precision=precision if coder is None else "bf16")
    return steps.configure("state.insert", **bounds, kv_dtype=kv_dtype)


def with_codes(steps: Pipeline, coder: str) -> Pipeline:
    """The steps with the pass that makes codes before the one that casts what is left."""
    names = [step.name for step in steps.steps]
    if coder in names:
        return steps
    if clash := [name for name in names if name in QUANTISERS]:
        what = f"precision {QUANTISERS[coder]} and a pipeline with {clash[0]}"
        raise UsageError(what, where="--precision", fix="Leave one of them out.")
    if "quantize.cast" not in names:
        what = f"precision {QUANTISERS[coder]} needs a pipeline with quantize.cast"
        raise UsageError(what, where="--precision", fix=f"Put {coder} and quantize.cast into the pipeline.")
    at = names.index("quantize.cast")
    return replace(steps, steps=(*steps.steps[:at], Step(coder), *steps.steps[at:]))


def _run_passes(
    traced: Program,
    steps: Pipeline,
    source: Checkpoint,
    checker: Checker | None,
    dump: str | Path | None,
    tell: Progress,
    on_record: Callable[[PassRecord], None] | None,
) -> Program:
    done = 0

    def count(record: PassRecord) -> None:
        nonlocal done
        done += 1
        tell("running passes", done, len(steps.steps))
        if on_record is not None:
            on_record(record)

    tell("running passes", 0, len(steps.steps))
    return run_pipeline(traced, steps, checker=checker, dump=dump, on_record=count, source=source)


def _precision_of(ready: Program) -> str:
    """What the passes that ran have made of the weights."""
    coded = [QUANTISERS[r.name] for r in ready.record if r.name in QUANTISERS]
    if coded:
        return coded[-1]
    chosen = [str(r.config.get("precision", "fp32")) for r in ready.record if r.name == "quantize.cast"]
    return chosen[-1] if chosen else "fp32"


def _exact_caches(engine: Emitted) -> bool:
    return all(s.dtype == "f32" for s in engine.states if s.kind.startswith("kv_"))


def _add_tokenizer(writer: PackageWriter, ready: Program, source: Checkpoint) -> str | None:
    """Copies the checkpoint's tokenizer into the package; its name there."""
    name = ready.meta.get("tokenizer")
    if not name:
        return None
    path = Path(source.folder) / str(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be read: {error.strerror or error}",
            where=str(path),
            fix="Export it again.",
        ) from error
    _check_tokenizer(data, path)
    writer.add_bytes(TOKENIZER, data)
    return TOKENIZER


def _check_tokenizer(data: bytes, path: Path) -> None:
    """CheckpointError for what no engine would load. Where the library that it needs is not installed, nobody knows."""
    from tmlc.runtimes.core.text import MissingLibraryError, load_tokenizer

    try:
        load_tokenizer(data)
    except MissingLibraryError:
        return
    except PackageError as error:
        raise CheckpointError(
            error.what.replace("the package's tokenizer", "the tokenizer"), where=str(path), fix="export it again"
        ) from None


def _weight_items(engine: Emitted, ready: Program, source: Checkpoint, tell: Progress) -> list[WeightItem]:
    """The tensors of the package, each made (evaluated, checked, packed) only when it is written."""
    count = len(engine.weights)

    def produce(number: int, packed: StoredWeight) -> Iterator[Any]:
        tell("packing weights", number, count)
        entry = ready.weights[packed.weight]
        floats = entry.srcs[0] if packed.scheme else packed.weight  # what codes are made of
        tensor = ready.weights.evaluate(floats, source)
        try:
            check_finite(tensor, packed.weight)
        except CheckpointError as error:
            raise _culprit(ready, source, packed.weight) or error from None
        yield from packed.pieces(tensor)
        del tensor
        source.release()
        tell("packing weights", number + 1, count)

    return [
        WeightItem(w.name, w.dtype, (w.rows, w.cols), partial(produce, number, w))
        for number, w in enumerate(engine.weights)
    ]


def _culprit(ready: Program, source: Checkpoint, weight: str) -> TmlcError | None:
    """The error that names the checkpoint's own tensor, where a weight made of several is not finite."""
    for name in ready.weights.tensors([weight]):
        try:
            check_finite(source.get(name), name)
        except CheckpointError as error:
            return error
    return None


def _stable(record: PassRecord) -> dict[str, Any]:
    """A pass record without times: the same input must give the same package, byte by byte."""
    return {name: value for name, value in record.to_json().items() if name not in ("ms", "error")}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
