"""The Program of a preset, a checkpoint or a package, and the engine that would run it, as far as a plan needs them: no
weight is read."""

from __future__ import annotations

from pathlib import Path

from tmlc.emit.targets import find_target
from tmlc.errors import EmitError, IRError, PackageError, TargetError, UsageError
from tmlc.ir.program import Program
from tmlc.report.gpu_plan import program_of, triton_target, unread_source
from tmlc.report.plan.engine import Engine, KernelsEngine, OpsEngine
from tmlc.report.plan.hardware import Hardware
from tmlc.report.plan.work import method_work

COMPILE_AS = {"fp32": "fp32"}  # every other precision changes the bytes of a weight, and nothing else that is counted


def load_planned(source: str, precision: str | None, context: int | None, target: str = "cpu") -> tuple[Program, str]:
    """The program after the passes of a target (a package's: of its own), and its precision.

    Args:
        source: the name of a preset, a checkpoint's folder (config.json alone will do), or a package.
        precision: of the plan; None takes the package's own, else bf16.
        context: positions that a session keeps; None takes the model's.
        target: `cpu`, or one of Triton's, for which a model is compiled in that very precision.

    Raises:
        UsageError: nothing is there, or a package with options that only a checkpoint can follow.
        CheckpointError, PackageError: it is damaged.
    """
    from tmlc.compiler import compile
    from tmlc.pipeline.pipeline import load_pipeline

    path = Path(source)
    if path.is_file() or (path / "manifest.json").is_file():
        return _packaged(path, precision, context)
    chosen, model = precision or "bf16", unread_source(source)
    if target != "cpu":
        return program_of(model, target, chosen, load_pipeline("triton"), context), chosen
    own = COMPILE_AS.get(chosen, "bf16")
    report = compile(model, "", target=target, precision=own, stop_after="memory.plan", context=context)
    assert report.program is not None
    return report.program, chosen


def compiler_for(hardware: Hardware) -> tuple[str, str]:
    """The target to plan with on that hardware, and why it is not the hardware's own: its tools are not there."""
    try:
        find_target(hardware.target)
    except TargetError as error:
        return "cpu", f"{error.what}. {error.fix}"
    return hardware.target, ""


def engine_of(program: Program, precision: str, target: str, why: str = "") -> Engine:
    """How an engine for that target runs the program. An op is a launch where the program is one of another target,
    where a kernel is missing, and where there is a reason `why`."""
    has_buckets = "buckets" in program.meta
    if has_buckets != (target != "cpu") and not why:
        why = "the package is one of another target"
    if target != "cpu" and not why:
        try:
            return KernelsEngine(program, triton_target(target))
        except EmitError as error:
            why = f"{error.where}: {error.what}"
    return OpsEngine(program, method_work(program, precision), why)


def _packaged(path: Path, precision: str | None, context: int | None) -> tuple[Program, str]:
    from tmlc.compiler import PROGRAM
    from tmlc.ir.text import parse_program
    from tmlc.package import open_package
    from tmlc.package.fields import AGAIN

    if context is not None:
        what = "the context of a package is fixed"
        raise UsageError(what, where="--context", fix="plan from the checkpoint, or leave the option out")
    with open_package(path) as package:
        try:
            program = parse_program(package.read(PROGRAM).decode("utf-8", "replace"))
        except IRError as error:
            where = f"{path}: {PROGRAM}, {error.where}"
            raise PackageError(f"the program cannot be read: {error.what}", where=where, fix=AGAIN) from error
        own = next(iter(package.manifest.targets.values())).precision
    return program, precision or own
