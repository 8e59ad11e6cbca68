"""`tmlc replay`: does a logged session again, bit for bit; compares what it gives, or writes it to files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import FORCE, PIN, PORTABLE_BITS, THREADS, print_json, progress, show, verb
from tmlc.cli.outputs import Outputs
from tmlc.errors import InputError, TmlcError, UsageError

NAMES = ["output.wav", "transcript.txt", "timeline.jsonl"]


@verb(
    "replay",
    example="""
tmlc replay nano.tmlc session.jsonl --verify
tmlc replay nano.tmlc session.jsonl -o out/
tmlc replay nano.tmlc resumed.jsonl --snapshot session.tmlcsnap --verify --json
""",
)
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare every tick with the log; exit code 1 where one differs.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for output.wav, transcript.txt and timeline.jsonl, as of `tmlc run`. Needed without --verify.",
)
@click.option(
    "--snapshot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The snapshot that the session went on from, if its log does not begin at tick 0.",
)
@THREADS
@PIN
@PORTABLE_BITS
@FORCE
def command(
    package: Path,
    log: Path,
    verify: bool,
    out: Path | None,
    snapshot: Path | None,
    threads: int | None,
    pin: bool,
    portable_bits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Do the session of LOG (JSON lines, a tick log) again on PACKAGE.

    What a session says depends on the package, its seed and its log only. With --verify every tick's tokens, text and
    audio are compared with the log. With -o what the session said is written as files; ticks that were missed are
    silent there, as they were for the client.
    """
    import tmlc
    from tmlc.report.tables import grid
    from tmlc.runtimes.core.ticklog import CUT, redo

    if out is None and not verify:
        raise UsageError("there is nothing to do", where="replay", fix="give --verify, or -o DIR for files")
    outputs = Outputs(out, NAMES, force) if out is not None else None
    events: Counter[str] = Counter()
    blob = snapshot.read_bytes() if snapshot is not None else None
    engine = tmlc.load(package, threads=threads, sessions=1, pin=pin, portable_bits=portable_bits)
    ticks = missed = 0
    try:
        with progress(as_json) as report, _Files(outputs, engine) as files:
            for redone in redo(engine, _records(log, events), blob):
                if verify:
                    redone.check()
                files.write(redone)
                ticks, missed = ticks + 1 + len(redone.missed), missed + len(redone.missed)
                report("replaying", ticks, ticks)
    except TmlcError as error:
        error.where = error.where or f"{log}:{max(1, sum(events.values()))}"
        raise
    finally:
        engine.close()
    result: dict[str, Any] = {
        "package": str(package),
        "log": str(log),
        "ticks": ticks,
        "missed": missed,
        "events": dict(events),
        "verified": verify,
        "files": [str(out / name) for name in NAMES if (out / name).exists()] if out is not None else [],
    }
    if as_json:
        print_json(result)
        return
    ended = ", then it was cut: the session went on" if events[CUT] else ""
    how = "every one gave what the log holds" if verify else "not compared with the log"
    show(
        grid(
            [
                ("replayed", f"{ticks} ticks, {missed} of them missed ({how})"),
                ("in the log", ", ".join(f"{count} {event}" for event, count in events.items()) + ended),
                *(("wrote", name) for name in result["files"]),
            ]
        )
    )


def _records(path: Path, events: Counter[str]) -> Iterator[dict[str, Any]]:
    """The records of a log, line by line; counts them by event. Raises InputError with the line that is not one."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError("not a line of JSON", where=f"{path}:{number}", fix="give a tick log") from None
            named = isinstance(record, dict) and isinstance(record.get("event"), str)
            events[record["event"][:40] if named else "unnamed"] += 1
            yield record


class _Files:
    """The files of a replay; none without `outputs`."""

    def __init__(self, outputs: Outputs | None, engine: Any) -> None:
        self._outputs, self._engine = outputs, engine

    def __enter__(self) -> _Files:
        with ExitStack() as stack:
            if self._outputs is not None:
                from tmlc.report.transcript import Transcript
                from tmlc.runtimes.media.audio import WavWriter

                layout, outputs = self._engine.layout, stack.enter_context(self._outputs)
                self._period = layout.duration_ms / 1000
                self._samples = layout.audio_out * layout.out_hop
                self._transcript = Transcript(self._period)
                self._timeline = stack.enter_context(open(outputs.path("timeline.jsonl"), "w", encoding="utf-8"))
                rate = layout.out_sample_rate
                self._wav = WavWriter(outputs.path("output.wav"), rate) if rate else None
                if self._wav is not None:
                    stack.callback(self._wav.close)
            self._stack = stack.pop_all()
        return self

    def write(self, redone: Any) -> None:
        """One tick, and silence for the missed ones before it."""
        if self._outputs is None:
            return
        import numpy as np

        output, first = redone.output, redone.output.index - len(redone.missed)
        for tick, given in enumerate([*redone.missed, redone.given], first):
            typed, newest = self._typed(given), tick == output.index
            self._transcript.add(tick, typed, output.text if newest else "")
            line = {"tick": tick, "at": round(tick * self._period, 6), "typed": typed, "missed": not newest,
                    "injected": len(given.inject), "said": list(given.say), "tokens": output.tokens if newest else [],
                    "text": output.text if newest else ""}  # fmt: skip
            self._timeline.write(json.dumps(line) + "\n")
            if self._wav is not None:
                self._wav.write(output.audio if newest else np.zeros(self._samples, np.float32))

    def _typed(self, given: Any) -> str | None:
        """What was typed: text, or what the scheduler made of it."""
        text = given.text or ""
        if given.tokens and self._engine.tokenizer is not None:
            text += self._engine.tokenizer.decoder().push(given.tokens)
        return text or None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._outputs is not None and kind is None:
            self._outputs.path("transcript.txt").write_text(self._transcript.text(), encoding="utf-8")
        self._stack.__exit__(kind, error, trace)
