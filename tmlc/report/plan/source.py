"""The Program of a preset, a checkpoint or a package, as far as a plan needs it: no weight is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tmlc.errors import IRError, PackageError, UsageError
from tmlc.ir.program import Program

COMPILE_AS = {"fp32": "fp32"}  # every other precision changes the bytes of a weight, and nothing else that is counted


def load_planned(source: str, precision: str | None, context: int | None) -> tuple[Program, str]:
    """The program after the passes of the CPU target, and its precision.

    Args:
        source: the name of a preset, a checkpoint's folder, or a package. What has the name of a preset and is no
            checkpoint (`tmlc plan small` beside an empty folder `small`) is the preset.
        precision: of the plan; None takes the package's own, else bf16.
        context: positions that a session keeps; None takes the model's.

    Raises:
        UsageError: nothing is there, or a package with options that only a checkpoint can follow.
        CheckpointError, PackageError: it is damaged.
    """
    from tmlc.compiler import compile
    from tmlc.model_zoo.interaction.config import PRESETS
    from tmlc.report.gpu_plan import create_hollow_checkpoint

    path = Path(source)
    if path.is_file() or (path / "manifest.json").is_file():
        return _packaged(path, precision, context)
    chosen = precision or "bf16"
    options = {"target": "cpu", "precision": COMPILE_AS.get(chosen, "bf16"), "stop_after": "memory.plan"}
    if path.is_dir() and (source not in PRESETS or (path / "config.json").is_file()):
        report = compile(path, path, context=context, **options)  # type: ignore[arg-type]
    elif source in PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            create_hollow_checkpoint(source, folder)
            report = compile(folder, scratch, context=context, **options)  # type: ignore[arg-type]
    else:
        raise UsageError(
            f"{source!r} is neither a preset nor a checkpoint nor a package",
            fix=f"presets: {', '.join(PRESETS)}",
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
