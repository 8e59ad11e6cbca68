"""`tmlc tune`: block sizes of the Triton kernels, measured on this machine's GPU and written as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmlc.cli.common import note, print_json, progress, require, require_compiler, show, verb
from tmlc.errors import TargetError, UsageError

if TYPE_CHECKING:
    from tmlc.runtimes.cuda.driver import Driver

_PATH = click.Path(path_type=Path)
OPS = ("attention", "linear", "moe_down", "moe_gate_up")


@verb(
    "tune",
    example="""
tmlc tune nano/ --target triton:sm90 --dry-run
tmlc tune nano/ --target triton:sm90 -o measured.yaml
tmlc tune nano.tmlc --op linear --op moe_down -o measured.yaml
tmlc compile nano/ -o nano.tmlc --target triton:sm90 --tuning measured.yaml
""",
)
@click.argument("source", type=_PATH)
@click.option("--target", metavar="NAME", help="triton: and an architecture.  [default: the package's own]")
@click.option("--precision", metavar="NAME", help="Of a checkpoint: what its weights are compiled to.")
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), help="Tune this op only (may be given again).")
@click.option("-o", "--out", type=_PATH, metavar="YAML", help="The table to write; entries that it has are kept.")
@click.option("--dry-run", is_flag=True, help="List the candidates and what they cost; needs no GPU.")
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Processes that compile.  [default: the cores]")
def command(
    source: Path,
    target: str | None,
    precision: str | None,
    ops: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Find the fastest block sizes for the shapes of SOURCE, a package or a checkpoint.

    Every candidate is compiled ahead of time; those that spill registers or want too much shared memory are left out.
    The others are timed on the GPU, over a call of one position and one of a tick's append. No candidate changes the
    order of sums. The table that is written serves `tmlc compile --tuning`.
    """
    require_compiler("tuning")
    require("tuning", "triton", triton="Triton")
    if out is None and not dry_run:
        raise UsageError("no output was given", where="tmlc tune", fix="add -o measured.yaml, or --dry-run")
    driver = None if dry_run else open_driver()
    try:
        view = run(source, target, precision, ops, out, driver, jobs, as_json)
    finally:
        if driver is not None:
            driver.close()
    if as_json:
        print_json(view)
        return
    from tmlc.report.tune_view import tune_tables

    show(*tune_tables(view))
    if out is not None and not dry_run:
        note(f"wrote {out}: use it with `tmlc compile --tuning {out}`")


def open_driver() -> Driver:
    """The GPU of this machine.

    Raises:
        TargetError: there is none that can be used; says that `--dry-run` needs none.
    """
    from tmlc.runtimes.cuda.nvidia import NvidiaDriver

    try:
        return NvidiaDriver()
    except TargetError as error:
        raise TargetError(
            f"tuning measures on a GPU: {error.what}", where=error.where,
            fix=f"{error.fix}; --dry-run lists the candidates without a GPU",
        ) from error  # fmt: skip


def run(
    source: Path,
    target: str | None,
    precision: str | None,
    ops: tuple[str, ...],
    out: Path | None,
    driver: Driver | None,
    jobs: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Candidates of every shape, with times where there is a driver; writes the table then. The view of `--json`."""
    from tmlc.cache.key import write_whole
    from tmlc.emit.triton.tune import build_candidates, measure
    from tmlc.kernels.triton.tuning import Tiles, table

    tiles = Tiles.read(out) if out is not None and out.exists() else table()
    with progress(quiet) as tell:
        name, found = _samples(source, target, precision, tell)
        tuned, compiled = build_candidates(found, tiles, ops, tell, jobs)
        if not tuned:
            what = f"the model has no {' and no '.join(ops)} whose block sizes a table chooses"
            raise UsageError(what, where="--op", fix="leave --op out")
        if driver is not None:
            measure(tuned, compiled, driver, tell)
    if driver is not None and out is not None:
        chosen = [(one.shape, one.chosen) for one in tuned if one.chosen is not None]
        write_whole(out, tiles.with_measured(chosen).to_yaml().encode())
    device = None if driver is None else driver.info.name
    written = str(out) if driver is not None and out is not None else None
    return {"source": str(source), "target": name, "device": device, "table": written,
            "shapes": [one.to_json() for one in tuned]}  # fmt: skip


def _samples(source: Path, target: str | None, precision: str | None, tell: Any) -> tuple[str, Any]:
    """The target's name, and the launches that are tuned."""
    from tmlc.emit.targets import find_target
    from tmlc.emit.triton.target import TritonTarget
    from tmlc.emit.triton.tune import lowered_samples, package_samples

    if target is not None and target.partition(":")[0] != "triton":
        raise UsageError(f"target {target} has no block sizes to tune", where="--target", fix="name triton:sm90")
    if not (source / "config.json").is_file():
        from tmlc.package.reader import open_package

        if precision is not None:
            raise UsageError("a package has its precision", where="--precision", fix="leave --precision out")
        with open_package(source) as package:
            held = [name for name in package.manifest.targets if name.startswith("triton:")]
            chosen = find_target(target or (held or ["triton:sm90"])[0])
            assert isinstance(chosen, TritonTarget)
            return chosen.name, [pair for sm in chosen.architectures for pair in package_samples(package, sm)]
    if target is None:
        raise UsageError("no target was given", where="--target", fix="name the architecture: --target triton:sm90")
    chosen = find_target(target)
    assert isinstance(chosen, TritonTarget)
    from tmlc.compiler import compile

    done = compile(
        source, "unused", target=target, precision=precision, stop_after="memory.buckets", on_progress=tell
    )  # the pipeline's last pass: nothing is written
    assert done.program is not None
    lowered = chosen.lower(done.program, tell)
    return chosen.name, [pair for sm in chosen.architectures for pair in lowered_samples(lowered, sm)]
