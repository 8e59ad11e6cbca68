"""`tmlc bench`: an open-loop load on a live server, measured at the client."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import click

from tmlc.cli.common import FORCE, note, print_json, progress, require, show, verb
from tmlc.cli.outputs import Outputs
from tmlc.errors import UsageError


@verb(
    "bench",
    example="""
tmlc bench nano.tmlc --sessions 16 --seconds 120
tmlc bench http://127.0.0.1:8080/v1 --sessions 8 --max-p99 400ms --max-misses 0.1%
tmlc bench nano.tmlc --arrivals poisson --hold 20 --sessions 12 --seconds 300 --json
tmlc bench nano.tmlc --dialogues recordings/ --dialect realtime
""",
)
@click.argument("target", metavar="URL|PACKAGE")
@click.option("--sessions", type=click.IntRange(1, 4096), default=4, show_default=True, help="Sessions open at once.")
@click.option("--seconds", type=click.FloatRange(2, 86400), default=60.0, show_default=True, help="Length of it all.")
@click.option("--ramp", type=click.FloatRange(0, 3600), default=2.0, show_default=True, metavar="SECONDS",
              help="Time over which the first sessions begin.")  # fmt: skip
@click.option("--hold", type=click.FloatRange(2, 86400), metavar="SECONDS",
              help="How long a session lasts; another one follows it.  [default: to the end]")  # fmt: skip
@click.option("--arrivals", type=click.Choice(["fixed", "poisson"]), default="fixed", show_default=True,
              help="When sessions begin. poisson needs --hold.")  # fmt: skip
@click.option("--piece", type=click.Choice(["20", "40", "60", "100", "200"]), default="20", show_default=True,
              metavar="MS", help="Audio in one message: 20, 40, 60, 100 or 200 ms.")  # fmt: skip
@click.option("--dialect", type=click.Choice(["live", "realtime"]), default="live", show_default=True,
              help="How the server is spoken to.")  # fmt: skip
@click.option("--dialogues", type=click.Path(path_type=Path), metavar="DIR",
              help="Labelled recordings: NAME.wav with NAME.yaml.  [default: made-up voices]")  # fmt: skip
@click.option("--model", help="As the server names it.  [default: the first that it lists]")
@click.option("--key", metavar="KEY", help="Bearer key.  [default: TMLC_API_KEY]")
@click.option("--metrics", metavar="URL", help="The server's /metrics, read before and after.")
@click.option("--processes", type=click.IntRange(1, 64), help="Of the load generator.  [default: one for 32 sessions]")
@click.option("--max-p99", metavar="TIME", help="Exit code 1 when the turn latency's p99 is above it, as 400ms.")
@click.option("--max-misses", metavar="PART", help="Exit code 1 when more ticks are missed, as 0.1%.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of arrivals and voices.")
@click.option("--serve-option", "options", multiple=True, metavar="TEXT",
              help='For the `tmlc serve` of a PACKAGE, as "--threads 1"; may be repeated.')  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="STEM", help="Also write STEM.json and STEM.txt.")
@FORCE
def command(
    target: str, sessions: int, seconds: float, ramp: float, hold: float | None, arrivals: str, piece: str,
    dialect: str, dialogues: Path | None, model: str | None, key: str | None, metrics: str | None,
    processes: int | None, max_p99: str | None, max_misses: str | None, seed: int, options: tuple[str, ...],
    out: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Hold conversations with the server at URL, or with one that is started for PACKAGE, and measure what they get.

    The load is fixed beforehand: a server that is slow gets no less of it. Every attempt is counted. Exit code 1 when
    --max-p99 or --max-misses is not kept.
    """
    require("the client", "bench", openai="the package openai", websockets="the package websockets")
    from tmlc.bench.plan import Load
    from tmlc.bench.run import Server, first_model, run
    from tmlc.bench.server import ServedPackage
    from tmlc.bench.view import judge, tables
    from tmlc.report.latency import parse_milliseconds
    from tmlc.report.tables import plain_text

    load = Load(sessions, seconds, ramp, hold, arrivals, int(piece), seed)
    allowed = None if max_p99 is None else parse_milliseconds(max_p99, "--max-p99")
    part = None if max_misses is None else parse_part(max_misses)
    outputs = (
        Outputs(out.absolute().parent, [f"{out.name}.json", f"{out.name}.txt"], force) if out is not None else None
    )
    is_url = re.match(r"https?://", target) is not None
    if is_url and options:
        raise UsageError("the server is there already", where="--serve-option", fix="give a package, or no options")
    bearer = key or os.environ.get("TMLC_API_KEY") or "none"
    with ExitStack() as stack:
        url = target.rstrip("/")
        if not is_url:
            if not Path(target).exists():
                raise UsageError("no such package", where=target, fix="give a package, or a URL that begins with http://")
            note("  starting a server")
            words = [word for option in options for word in shlex.split(option)]
            slots = () if "--sessions" in words else ("--sessions", str(max(16, sessions)))
            served = stack.enter_context(ServedPackage(Path(target), *slots, *words))
            url, metrics = served.url, metrics or f"{served.admin}/metrics"
        named = model or first_model(url, bearer)
        report = stack.enter_context(progress(as_json))
        folder = None if dialogues is None else str(dialogues)
        view = run(Server(url, bearer, named, dialect, metrics), load, folder, processes, report)
    broken = judge(view, allowed, part)
    view["broken"] = broken
    shown = tables(view)
    if outputs is not None and out is not None:
        with outputs:
            text = json.dumps(view, indent=2, allow_nan=False) + "\n"
            outputs.write(f"{out.name}.json", text)
            outputs.write(f"{out.name}.txt", plain_text(shown))
    if as_json:
        print_json(view)
    else:
        show(*shown)
    for line in broken:
        note(line)
    if broken:
        click.get_current_context().exit(1)


def parse_part(text: str, where: str = "--max-misses") -> float:
    """'0.1%' or '0.001' as a part of one.

    Raises:
        UsageError: neither of them, or not from 0 to 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    value = float(match[1]) / (100.0 if match[2] else 1.0) if match else 2.0
    if value > 1:
        raise UsageError(f"{text!r} is not a part", where=where, fix="write it as 0.1% or 0.001")
    return value
