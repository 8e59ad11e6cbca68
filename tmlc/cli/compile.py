"""`tmlc compile`: from a checkpoint to a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import FORCE, check_output, note, print_json, progress, require_compiler, show, verb
from tmlc.errors import UsageError

_PATH = click.Path(path_type=Path)


@verb(
    "compile",
    example="""
tmlc compile nano/ -o nano.tmlc
tmlc compile nano/ -o nano.tmlc --precision bf16 --check
tmlc compile nano/ -o nano.tmlc --context 4096 --context-policy end
tmlc compile nano/ --stop-after state.insert --dump passes/
tmlc compile nano/ --print-pipeline > mine.yaml
tmlc compile nano/ -o nano.tmlc --pipeline mine.yaml
""",
)
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--out", type=_PATH, metavar="PATH", help="The package to write, e.g. model.tmlc.")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="What to compile for.")
@click.option("--precision", metavar="NAME", help="Of weights: fp32 or bf16.  [default: the pipeline's, else fp32]")
@click.option("--preset", metavar="NAME", help="Pipeline that comes with tmlc.  [default: the target's]")
@click.option("--pipeline", type=_PATH, metavar="YAML", help="Pipeline file to use instead.")
@click.option("--passes", metavar="A,B,…", help="Run just these passes, with their default settings.")
@click.option("--disable", multiple=True, metavar="PASS", help="Leave a pass out (may be given again).")
@click.option("--stop-after", metavar="PASS", help="End after this pass; writes no package. Useful with --dump.")
@click.option("--dump", type=_PATH, metavar="DIR", help="Write the program's text form before and after every pass.")
@click.option("--print-pipeline", is_flag=True, help="Print the pipeline as YAML and end.")
@click.option("--check", is_flag=True, help="Compare outputs on real inputs after every pass.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Positions that a session keeps.")
@click.option("--context-policy", metavar="NAME", help="At the bound: ring_with_sinks or end.")
@click.option("--sinks", type=click.IntRange(0), metavar="N", help="First positions that a ring never forgets.")
@click.option("--max-append", type=click.IntRange(1), metavar="N", help="Positions that one call may bring.")
@click.option("--folder", is_flag=True, help="Write the package as a folder instead of one file.")
@click.option("--threads", type=click.IntRange(1, 256), metavar="N", help="PyTorch threads of the compiler itself.")
@FORCE
def command(
    checkpoint: Path,
    out: Path | None,
    pipeline: Path | None,
    preset: str | None,
    passes: str | None,
    disable: tuple[str, ...],
    stop_after: str | None,
    dump: Path | None,
    print_pipeline: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile CHECKPOINT (a folder in the Hugging Face form) into a package.

    Weights stream from shard to package, so memory is needed for the largest tensor and not for the model. Whatever
    stops a compilation leaves nothing half-written.
    """
    require_compiler("compiling")
    if preset is not None and pipeline is not None:
        raise UsageError("--preset and --pipeline exclude each other", where="tmlc compile", fix="give one of them")
    chosen = [name.strip() for name in passes.split(",") if name.strip()] if passes is not None else None
    if chosen == []:
        raise UsageError("--passes names no pass", where="--passes", fix="write names with commas between them")
    if print_pipeline:
        text = _pipeline_text(options["target"], preset, pipeline, chosen, disable, stop_after)
        if as_json:
            print_json({"pipeline": text})
        else:
            click.echo(text, nl=False)
        return
    if out is None and stop_after is None:
        raise UsageError("no output was given", where="tmlc compile", fix="add -o model.tmlc")
    if out is not None and stop_after is None:
        check_output(out, force)
    import torch

    from tmlc.compiler import compile

    if threads is not None:
        torch.set_num_threads(threads)
    with progress(as_json) as report:
        done = compile(
            checkpoint,
            out if out is not None else Path("unused"),
            preset=preset,
            pipeline=pipeline,
            passes=chosen,
            disable=disable,
            stop_after=stop_after,
            dump=dump,
            on_progress=report,
            **options,
        )
    view = done.to_json()
    if as_json:
        print_json(view)
        return
    from tmlc.report.compile_view import compile_tables

    show(*compile_tables(view))
    if done.out is None:
        where = f"; the programs are in {dump}" if dump is not None else ""
        note(f"stopped after {stop_after}: no package was written{where}")


def _pipeline_text(
    target: str,
    preset: str | None,
    pipeline: Path | None,
    passes: list[str] | None,
    disable: tuple[str, ...],
    stop_after: str | None,
) -> str:
    """The pipeline that these options choose, as YAML that --pipeline reads back."""
    from tmlc.pipeline.pipeline import Pipeline, load_pipeline

    steps = Pipeline.of(passes) if passes else load_pipeline(pipeline or preset or target)
    steps = steps.disable(disable)
    return (steps.stop_after(stop_after) if stop_after else steps).to_yaml()
