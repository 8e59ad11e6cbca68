"""`tmlc VERB …`: finds the verb, and turns every error into two lines and an exit code.

Exit codes: 0 done; 1 a check failed (verify, budget); 2 wrong usage or bad input; 70 a bug in tmlc; 130
interrupted, 143 terminated. A verb's module is imported only when the verb is used, so `tmlc --help` costs no
numpy.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import Any

import click

from tmlc import __version__
from tmlc.cli.common import help_without_verb
from tmlc.errors import TmlcError

VERBS = {
    "compile": "checkpoint to package: trace, rewrite, pack",
    "inspect": "what is in a package or a checkpoint",
    "verify": "replay a package's recorded outputs on this machine",
    "run": "play a recorded conversation into a model",
    "serve": "a package as a live server",
    "replay": "do a logged session again, and check that it gives the same",
    "eval": "what an interaction model does in conversation, scored",
    "profile": "latency against the budget, memory, start-up",
    "tune": "block sizes of GPU kernels, measured into a table",
    "plan": "memory, step time and sessions on hardware that is not here",
    "bench": "an open-loop load on a live server, measured at the client",
    "zoo": "reference models: list them, create a checkpoint",
    "doctor": "what this machine can compile for and run",
}
BUG, INTERRUPTED, TERMINATED = 70, 130, 143


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: clean-up runs, handlers of errors do not."""


class Verbs(click.Group):
    """The command group: imports verbs late, and is the one place where errors become text and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return import_module(f"tmlc.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        as_json = "--json" in words
        for stream in ("stdout", "stderr"):  # closed by whoever started us (`>&-`): nobody reads, and nothing fails
            if getattr(sys, stream) is None:
                setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends
            if isinstance(opened := getattr(sys, stream), io.TextIOWrapper):
                # A terminal that is not UTF-8, a file name that is none: shown as escapes, after all the work.
                opened.reconfigure(errors="backslashreplace")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            code = super().main(words, prog_name or "tmlc", standalone_mode=False, **extra)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # the reader left, e.g. `| head`; click turns that into an exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except (KeyboardInterrupt, click.Abort, Terminated) as stop:
            code = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
            _say({"what": "stopped before it was done", "where": "", "fix": "run the command again"}, as_json)
        except Exception as error:
            if "--debug" in words:
                raise
            found, code = _explain(error, words)
            _say(found, as_json)
        sys.exit(code if isinstance(code, int) else 0)


def _named(words: list[str]) -> str:
    """`tmlc VERB`, as far as the words name a verb."""
    verb = next((word for word in words if not word.startswith("-")), "")
    return f"tmlc {verb}" if verb in VERBS else "tmlc"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _explain(error: Exception, words: list[str]) -> tuple[dict[str, str], int]:
    """What went wrong, where, and what to do; and the exit code it stands for."""
    if isinstance(error, TmlcError):
        return {"what": error.what, "where": error.where, "fix": error.fix}, error.exit_code
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else _named(words)
        return {"what": error.format_message(), "where": "", "fix": f"see `{path} --help`"}, 2
    fix = "check the path and its permissions"
    if isinstance(error, click.ClickException):
        return {"what": error.format_message(), "where": "", "fix": fix}, 2
    if isinstance(error, OSError) and error.errno:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space and run the command again"
        return {"what": os.strerror(error.errno), "where": str(error.filename or ""), "fix": fix}, 2
    if isinstance(error, MemoryError):
        return {"what": "not enough memory", "where": "", "fix": "use a machine with more memory"}, 2
    what = f"a bug in tmlc: {type(error).__name__}: {str(error)[:300]}"
    return {"what": what, "where": "", "fix": "run it again with --debug and report the traceback"}, BUG


def _say(found: dict[str, str], as_json: bool) -> None:
    """Two lines on stderr, and with --json the same as an object on stdout."""
    from tmlc.report.tables import printable  # it takes a stranger's names to a terminal

    found = {key: printable(" ".join(value.split())) for key, value in found.items()}
    where = f" ({found['where']})" if found["where"] else ""
    click.echo(f"error: {found['what']}{where}\n  {found['fix']}", err=True)
    if as_json:
        with suppress(OSError):  # what could not be written may be standard output itself
            click.echo(json.dumps({"error": found}))


@click.command("tmlc", cls=Verbs, invoke_without_command=True, subcommand_metavar="VERB [ARGS]...",
               context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip
@click.version_option(__version__, prog_name="tmlc")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compile interaction models and run them within 400 ms.

    \b
    A first walk, from nothing to a conversation:
      tmlc zoo create nano -o nano/
      tmlc compile nano/ -o nano.tmlc
      tmlc run nano.tmlc --audio speech.wav -o out/
      tmlc profile nano.tmlc
    """
    help_without_verb(context)


def main() -> None:
    """Entry point of the console script."""
    cli.main()


if __name__ == "__main__":
    main()
