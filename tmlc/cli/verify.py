"""`tmlc verify`: replays a package's recorded outputs on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from tmlc.cli.common import PIN, PORTABLE_BITS, THREADS, note, print_json, progress, show, verb
from tmlc.errors import TargetError


@verb(
    "verify",
    example="""
tmlc verify nano.tmlc
tmlc verify nano.tmlc --isa portable --threads 1 --json
""",
)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--isa", metavar="NAME", help="Kernel variant to verify (`tmlc doctor` lists them).  [default: the best]")
@THREADS
@PIN
@PORTABLE_BITS
def command(package: Path, isa: str | None, threads: int | None, pin: bool, portable_bits: bool, as_json: bool) -> None:
    """Check every byte of PACKAGE, then replay its golden calls here and compare the outputs.

    Exit code 1 when an output differs by more than the package's tolerance. Where this machine cannot run the package
    (no GPU, say) only its bytes are checked: exit code 2, and what is missing.
    """
    import tmlc
    from tmlc.report.verify import replay, verify_tables

    try:
        engine = tmlc.load(package, threads=threads, sessions=1, pin=pin, isa=isa, portable_bits=portable_bits)
    except TargetError as error:  # asked for the engine, `load` had read and checked the package
        error.what = f"every byte is as it was written, but the recorded calls were not replayed: {error.what}"
        raise
    with engine, progress(as_json) as report:
        view = replay(engine, package, report)
    if as_json:
        print_json(view)
    else:
        show(*verify_tables(view))
    if not view["passed"]:
        bad = [row["method"] for row in view["methods"] if not row["passed"]]
        note(f"this machine's outputs differ from the recorded ones: {', '.join(bad)}")
        click.get_current_context().exit(1)
