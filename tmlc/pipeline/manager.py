"""The pass manager: runs a pipeline over a program and owns everything around a pass.

For each step: `requires` is checked, the pass runs on a clone, the IR is verified, `expect_matches` is compared,
outputs are compared when a checker is given, the record grows, and the text form is dumped when a folder is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tmlc.errors import PipelineError, TmlcError
from tmlc.ir.program import PassRecord, Program
from tmlc.ir.source import inherit_sources
from tmlc.ir.text import print_program
from tmlc.ir.verify import verify
from tmlc.ir.weights import TensorSource
from tmlc.pipeline.check import Checker
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step


def run_pipeline(
    program: Program,
    pipeline: Pipeline,
    *,
    checker: Checker | None = None,
    dump: str | Path | None = None,
    on_record: Callable[[PassRecord], None] | None = None,
    progress: Callable[[str], None] | None = None,
    source: TensorSource | None = None,
) -> Program:
    """Runs every step of `pipeline` and returns the rewritten program; `program` itself is left as it was.

    Args:
        checker: compares outputs after every pass (`--check`).
        dump: folder for the text form before the first and after every pass.
        on_record: called after every pass with its record, also with the record of a pass that failed.
        progress: gets a line before each pass and whatever a pass reports.
        source: the checkpoint's tensors, for passes that measure what they do to them.

    Raises:
        PipelineError: unmet `requires`, unmet `expect_matches`.
        IRError: a pass left a program that breaks the rules of the IR; the message names the pass.
        CheckError: outputs moved beyond the tolerance; the message names the pass, and the op with its source line.
    """
    tell = progress if progress is not None else lambda line: None
    folder = Path(dump) if dump is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "00_input.ir").write_text(print_program(program), "utf-8")
    current = program.clone()
    for number, step in enumerate(pipeline.steps):
        tell(f"{step.name} ({number + 1} of {len(pipeline.steps)})")
        worker = step.build(pipeline.name)
        record = PassRecord(
            name=step.name, config=worker.config.model_dump(mode="json"), ops_before=current.count_ops()
        )
        started = time.perf_counter()
        try:
            result = _run_one(worker, step, current, PassContext(number, len(pipeline.steps), tell, source))
            record.ms = (time.perf_counter() - started) * 1e3
            record.matches = result.matches
            record.near_misses = [str(miss) for miss in result.near_misses]
            record.notes = list(result.notes)
            record.ops_after = result.program.count_ops()
            if folder is not None:
                text = print_program(result.program)
                (folder / f"{number + 1:02d}_{step.name}.ir").write_text(text, "utf-8")
            step.check_matches(result)
            if checker is not None:
                record.error = checker.check(
                    step.name, result.program, lossy=worker.lossy, tolerance=worker.tolerance, before=current
                )
        except BaseException as error:
            record.notes.append(f"failed: {error}")
            if on_record is not None:
                on_record(record)
            raise
        current = result.program
        current.record.append(record)
        if on_record is not None:
            on_record(record)
    return current


def _run_one(worker: Pass, step: Step, program: Program, ctx: PassContext) -> PassResult:
    unmet = sorted(str(fact) for fact in worker.requires if fact not in program.facts)
    if unmet:
        raise PipelineError(
            f"{step.name} needs {', '.join(unmet)}, which no earlier pass provided",
            where="requires",
            fix="put the pass that provides it before this one, or do not disable it",
        )
    result = worker.run(program.clone(), ctx)
    result.program.facts |= worker.provides if result.provides is None else result.provides
    inherit_sources(result.program)
    try:
        verify(result.program)
    except TmlcError as error:
        error.where = f"after {step.name}; {error.where}" if error.where else f"after {step.name}"
        raise
    return result
