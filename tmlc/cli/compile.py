"""`tmlc compile`: from a checkpoint to a package."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmlc.cli.common import FORCE, check_output, note, print_json, progress, require_compiler, show, verb
from tmlc.errors import TmlcError, UsageError

if TYPE_CHECKING:
    from tmlc.cache import CompileCache, CompileKey, Lookup

_PATH = click.Path(path_type=Path)


@verb(
    "compile",
    example="""
tmlc compile nano/ -o nano.tmlc
tmlc compile nano/ -o nano.tmlc --precision bf16 --check
tmlc compile nano/ -o nano.tmlc --precision int8 --kv int8
tmlc compile nano/ -o nano.tmlc --force --no-cache
tmlc compile nano/ -o nano.tmlc --context 4096 --context-policy end
tmlc compile nano/ -o nano.tmlc --target tensorrt:sm89
tmlc compile nano/ -o nano.tmlc --target triton:sm90 --tuning measured.yaml
tmlc compile nano/ --target tensorrt:sm89 --dry-run
tmlc compile nano/ --stop-after state.insert --dump passes/
tmlc compile nano/ --print-pipeline > mine.yaml
tmlc compile nano/ -o nano.tmlc --pipeline mine.yaml
""",
)
@click.argument("checkpoint", type=_PATH)
@click.option("-o", "--out", type=_PATH, metavar="PATH", help="The package to write, e.g. model.tmlc.")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="What to compile for.")
@click.option(
    "--precision", metavar="NAME", help="fp32, bf16, fp16, int8, fp8 or int4.  [default: the pipeline's, else fp32]"
)
@click.option("--preset", metavar="NAME", help="O0, O1, O2, or a target's name.  [default: the target's own = O2]")
@click.option("--pipeline", type=_PATH, metavar="YAML", help="Pipeline file to use instead.")
@click.option("--passes", metavar="A,B,…", help="Run just these passes, with their default settings.")
@click.option("--disable", multiple=True, metavar="PASS", help="Leave a pass out (may be given again).")
@click.option("--stop-after", metavar="PASS", help="End after this pass; writes no package. Useful with --dump.")
@click.option("--dump", type=_PATH, metavar="DIR", help="Write the program's text form before and after every pass.")
@click.option("--dry-run", is_flag=True, help="Say which ops the target would refuse, and why; writes no package.")
@click.option("--print-pipeline", is_flag=True, help="Print the pipeline as YAML and end.")
@click.option("--check", is_flag=True, help="Compare outputs on real inputs after every pass.")
@click.option("--kv", metavar="NAME", help="Keys and values in fp32, bf16, fp16 or int8.  [default: as --precision]")
@click.option("--tuning", type=_PATH, metavar="YAML", help="Block sizes that `tmlc tune` measured, for triton.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Positions that a session keeps.")
@click.option(
    "--context-policy",
    type=click.Choice(["ring_with_sinks", "end"]),
    metavar="NAME",
    help="At the bound: ring_with_sinks or end.",
)
@click.option("--sinks", type=click.IntRange(0), metavar="N", help="First positions that a ring never forgets.")
@click.option("--max-append", type=click.IntRange(1), metavar="N", help="Positions that one call may bring.")
@click.option("--folder", is_flag=True, help="Write the package as a folder instead of one file.")
@click.option("--threads", type=click.IntRange(1, 256), metavar="N", help="PyTorch threads of the compiler itself.")
@click.option("--no-cache", is_flag=True, help="Compile anew, and do not keep the package in the cache.")
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
    dry_run: bool,
    print_pipeline: bool,
    threads: int | None,
    no_cache: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile CHECKPOINT (a folder in the Hugging Face form) into a package.

    Weights stream from shard to package, so memory is needed for the largest tensor and not for the model. Whatever
    stops a compilation leaves nothing half-written. Finished packages are kept in a cache ($TMLC_CACHE, else
    ~/.cache/tmlc; TMLC_CACHE=off keeps nothing): the same compilation again costs a link.
    """
    require_compiler("compiling")
    from tmlc.package.writer import replaceable

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
    if dry_run and stop_after is not None:
        raise UsageError("--dry-run and --stop-after exclude each other", where="tmlc compile", fix="give one of them")
    unwritten = dry_run or stop_after is not None
    if out is None and not unwritten:
        raise UsageError("no output was given", where="tmlc compile", fix="add -o model.tmlc")
    if out is not None and not unwritten:
        check_output(out, force, folder=options["folder"])
        if options["folder"] and out.is_dir() and not replaceable(out):
            raise UsageError(
                "the folder is no package, so --force does not replace it",
                where=str(out),
                fix="name another folder, or remove this one yourself",
            )
    if dump is not None and dump.exists() and not dump.is_dir():
        raise UsageError("the place of the dump is not a folder", where=str(dump), fix="give another one with --dump")
    chosen_passes: dict[str, Any] = {"preset": preset, "pipeline": pipeline, "passes": chosen, "disable": disable}
    keeper = None if no_cache or out is None or unwritten or dump is not None else _Keeper.of(
        checkpoint, out, {**chosen_passes, **options}
    )  # fmt: skip
    view = keeper.found() if keeper is not None else None
    if view is None:
        import torch

        from tmlc.compiler import compile

        if threads is not None:
            torch.set_num_threads(threads)
        with progress(as_json) as report:
            done = compile(
                checkpoint,
                out if out is not None else Path("unused"),
                **chosen_passes,
                stop_after=stop_after,
                dump=dump,
                dry_run=dry_run,
                on_progress=report,
                **options,
            )
        view = done.to_json()
        if keeper is not None:
            view = keeper.keep(view, as_json)
    refused = dry_run and any(row["kernel"] is None for row in view["coverage"])
    if as_json:
        print_json(view)
    else:
        _show(view, dry_run, stop_after, dump)
    if refused:
        click.get_current_context().exit(1)


def _show(view: dict[str, Any], dry_run: bool, stop_after: str | None, dump: Path | None) -> None:
    from tmlc.report.compile_view import compile_tables, coverage_tables

    show(*compile_tables(view))
    if dry_run:
        show(*coverage_tables(view))
    elif view["out"] is None:
        where = f"; the programs are in {dump}" if dump is not None else ""
        note(f"stopped after {stop_after}: no package was written{where}")


class _Keeper:
    """The cache beside one compilation: looks it up before, keeps its package after."""

    def __init__(self, cache: CompileCache, make_key: Callable[[], CompileKey], checkpoint: Path, out: Path) -> None:
        self.cache, self.make_key, self.checkpoint, self.out = cache, make_key, checkpoint, out
        self.key = make_key()
        self.lookup: Lookup | None = None

    @staticmethod
    def of(checkpoint: Path, out: Path, options: dict[str, Any]) -> _Keeper | None:
        """None where there is no cache, or where the key cannot be made: then the compiler says what is wrong."""
        from tmlc.cache import CompileCache, cache_folder, compile_key

        folder = cache_folder()
        if folder is None:
            return None
        cache = CompileCache(folder)
        named = {name: options.pop(name) for name in ("target", "precision", "preset", "pipeline", "passes", "disable")}
        try:
            make_key = partial(compile_key, checkpoint, **named, options=options, memo=cache.memo)
            return _Keeper(cache, make_key, checkpoint, out)
        except (TmlcError, OSError, UnicodeDecodeError):
            return None

    def found(self) -> dict[str, Any] | None:
        """The report of the same compilation, its package put in place; None when it has to be done."""
        started = time.perf_counter()
        self.lookup, view = self.cache.find(self.key, self.checkpoint, self.out)
        if view is None:
            return None
        self.cache.deliver(self.key, self.out)
        seconds = {"cache": time.perf_counter() - started}
        return {**view, "checkpoint": str(self.checkpoint), "out": str(self.out), "seconds": seconds, **self._said()}

    def keep(self, view: dict[str, Any], quiet: bool) -> dict[str, Any]:
        """Stores what was compiled; the view with what the cache had to say."""
        if self.make_key() != self.key:  # somebody wrote into the checkpoint, or into tmlc, meanwhile
            return {**view, **self._said()}
        problem = self.cache.store(self.key, self.out, view)
        if problem and not quiet:
            note(problem)
        return {**view, **self._said()}

    def _said(self) -> dict[str, Any]:
        assert self.lookup is not None
        return {"cache": {"outcome": self.lookup.outcome, "reason": self.lookup.reason, "key": self.key.digest}}


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

    steps = Pipeline.of(passes) if passes else load_pipeline(pipeline or preset or target.partition(":")[0], target)
    steps = steps.disable(disable)
    return (steps.stop_after(stop_after) if stop_after else steps).to_yaml()
