"""What each pass of a package bought: the checkpoint is compiled again without it, by the package's own record, and
both engines are played interleaved. Imports the compiler, and torch with it, when something is compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import TmlcError, UsageError
from tmlc.package.manifest import Manifest
from tmlc.report.compare import FAMILY_ERROR
from tmlc.report.interleave import interleave
from tmlc.report.scenario.case import Case
from tmlc.runtimes.media.recording import TickShape

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine


def passes_to_leave_out(pipeline: Sequence[Mapping[str, Any]], asked: Sequence[str]) -> list[str]:
    """The passes to leave out, in the package's order: those asked for, or all.

    Raises:
        UsageError: the package was compiled without one of them.
    """
    known = list(dict.fromkeys(str(record["pass"]) for record in pipeline))
    for name in asked:
        if name not in known:
            raise UsageError(
                f"the package was compiled without a pass {name!r}",
                where="--ablate",
                fix=f"leave out some of: {', '.join(known) or 'none'}",
            )
    return [name for name in known if not asked or name in asked]


def check_ablation(manifest: Manifest, checkpoint: Path, names: str) -> list[str]:
    """The passes to leave out, of `names` with commas between them or none for all; before anything is played.

    Raises:
        UsageError: another checkpoint, or a pass that the package was compiled without.
        CheckpointError: no checkpoint is there, or it is damaged.
    """
    chosen = passes_to_leave_out(manifest.pipeline, [name.strip() for name in names.split(",") if name.strip()])
    check_source(manifest, checkpoint)
    return chosen


def check_source(manifest: Manifest, checkpoint: Path) -> None:
    """UsageError when the package was not made from this checkpoint."""
    from tmlc.frontend.checkpoint import open_checkpoint

    found, recorded = open_checkpoint(checkpoint).digest(), manifest.model.source
    differing = sorted(name for name in {**found, **recorded} if found.get(name) != recorded.get(name))
    if differing:
        raise UsageError(
            f"the package was not made from this checkpoint: {differing[0]} differs",
            where=str(checkpoint),
            fix="give the checkpoint that the package was compiled from",
        )


def ablation(
    engine: Engine,
    checkpoint: Path,
    names: Sequence[str],
    load: Callable[[Path], Engine],
    case: Case,
    shape: TickShape,
    seed: int,
    report: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """The record `ablation` of a profile, one row a pass.

    Args:
        engine: of the package as it is, with room for the case's sessions.
        names: passes to leave out, as `check_ablation` gave them.
        load: an engine of another package, loaded the same way.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tmlc-ablate-") as folder:
        for name in names:
            out = Path(folder) / f"{len(rows)}.tmlc"
            rows.append(_row(engine, checkpoint, name, out, load, case, shape, seed, FAMILY_ERROR / len(names), report))
            out.unlink(missing_ok=True)
    return rows


def _row(
    engine: Engine,
    checkpoint: Path,
    name: str,
    out: Path,
    load: Callable[[Path], Engine],
    case: Case,
    shape: TickShape,
    seed: int,
    error: float,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    empty: dict[str, Any] = {"pass": name, "p50_with_ms": None, "p50_without_ms": None, "change": None,
                             "interval": None}  # fmt: skip
    records = [record for record in engine.manifest.pipeline if record["pass"] == name]
    if _did_nothing(records):
        return {**empty, "verdict": "no match", "note": "it rewrote nothing in this model"}
    report(f"without {name}", 0, 1)
    try:
        _compile_without(engine, checkpoint, name, out)
    except TmlcError as failed:
        return {**empty, "verdict": "required", "note": f"without it the model does not compile: {failed.what}"}
    with load(out) as without:
        if without.digest == engine.digest:
            return {**empty, "verdict": "no match", "note": "the package without it is the same, byte by byte"}
        found = interleave(engine, without, case, shape, seed, lambda done, of: report(f"without {name}", done, of))
    median = found.figures(error)[0]
    told = [str(found.outputs)]
    if alike := len(found.alike) - sum(found.alike):
        told.append(f"{alike} of {len(found.alike)} ticks did other work and count for nothing")
    return {
        "pass": name,
        "p50_with_ms": median.a,
        "p50_without_ms": median.b,
        "change": median.change,
        "interval": None if median.low is None or median.high is None else [median.low, median.high],
        "verdict": f"{median.verdict} without it" if median.verdict in ("slower", "faster") else median.verdict,
        "note": "; ".join(told),
    }


def _did_nothing(records: Sequence[Mapping[str, Any]]) -> bool:
    return all(not r.get("matches") and r.get("ops_before") == r.get("ops_after") for r in records)


def _compile_without(engine: Engine, checkpoint: Path, name: str, out: Path) -> None:
    """The checkpoint by the package's own record, without one pass."""
    from tmlc.compiler import compile
    from tmlc.pipeline.pipeline import Pipeline, Step

    steps = tuple(Step(str(r["pass"]), dict(r.get("config", {}))) for r in engine.manifest.pipeline)
    context = engine.manifest.context
    compile(
        checkpoint, out, target=engine.target, pipeline=Pipeline("the package's own record", steps), disable=[name],
        context=context.limit, context_policy=context.policy, sinks=context.sinks, max_append=context.max_append,
    )  # fmt: skip
