"""The Program of a preset, a checkpoint or a package, as far as a plan needs it: no weight is read."""

from __future__ import annotations

from pathlib import Path

from tmlc.errors import IRError, PackageError, UsageError
from tmlc.ir.program import Program

COMPILE_AS = {"fp32": "fp32"}  # every other precision changes the bytes of a weight, and nothing else that is counted


def load_planned(source: str, precision: str | None, context: int | None) -> tuple[Program, str]:
    """The program after the passes of the CPU target, and its precision.

    Args:
        source: the name of a preset, a checkpoint's folder (config.json alone will do), or a package.
        precision: of the plan; None takes the package's own, else bf16.
        context: positions that a session keeps; None takes the model's.

    Raises:
        UsageError: nothing is there, or a package with options that only a checkpoint can follow.
        CheckpointError, PackageError: it is damaged.
    """
    from tmlc.compiler import compile
    from tmlc.report.gpu_plan import unread_source

    path = Path(source)
    if path.is_file() or (path / "manifest.json").is_file():
        return _packaged(path, precision, context)
    chosen = precision or "bf16"
    own = COMPILE_AS.get(chosen, "bf16")
    report = compile(
        unread_source(source), "", target="cpu", precision=own, stop_after="memory.plan", context=context
    )
    assert report.program is not None
    return report.program, chosen


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
