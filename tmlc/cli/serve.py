"""`tmlc serve`: a package as a live server that OpenAI's clients, LiveKit, Pipecat and browsers can talk to."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import HUGE_PAGES, PIN, THREADS, verb
from tmlc.errors import UsageError

_PATH = click.Path(path_type=Path)


@verb(
    "serve",
    example="""
tmlc serve nano.tmlc
tmlc serve model.tmlc --host 0.0.0.0 --keys keys.txt --certificate cert.pem --private-key key.pem
tmlc serve model.tmlc --background background.yaml --snapshots /var/lib/tmlc --sessions 32
""",
)
@click.argument("package", type=_PATH)
@click.option("--config", type=_PATH, metavar="YAML", help="Settings; the options below go over them.")
@click.option(
    "--host", metavar="ADDRESS", help="Where clients connect; anything but loopback needs --keys.  [127.0.0.1]"
)
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="0 takes a free one.  [8000]")
@click.option("--admin-host", metavar="ADDRESS", help="Of /livez, /readyz and /metrics.  [127.0.0.1]")
@click.option("--admin-port", type=click.IntRange(0, 65535), metavar="N", help="0 takes a free one.  [9000]")
@click.option(
    "--sessions", type=click.IntRange(1, 65536), metavar="N", help="Most at a time; memory is reserved.  [16]"
)
@click.option("--model", metavar="NAME", help="What clients ask for.  [the package's name]")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Another name for it; may be repeated.")
@click.option("--keys", type=_PATH, metavar="FILE", help="Bearer keys, one a line; mode 0600.")
@click.option("--origin", "origins", multiple=True, metavar="URL", help="Of a foreign page that may connect.")
@click.option(
    "--background", type=_PATH, metavar="YAML", help="The background model, tools and rules (docs/background.md)."
)
@click.option("--snapshots", type=_PATH, metavar="DIR", help="Keep sessions there, so that they outlive this process.")
@click.option("--record", type=_PATH, metavar="DIR", help="Write tick logs there: all that is said, for tmlc replay.")
@click.option("--certificate", type=_PATH, metavar="PEM", help="Of TLS.")
@click.option("--private-key", type=_PATH, metavar="PEM", help="Of TLS.")
@click.option("--drain", type=click.FloatRange(0, 3600), metavar="SECONDS", help="For sessions after SIGTERM.  [10]")
@click.option("--trace", metavar="URL", help="Send OpenTelemetry spans there (OTLP over HTTP).")
@THREADS
@PIN
@HUGE_PAGES
def command(package: Path, config: Path | None, pin: bool, huge_pages: bool, as_json: bool, **options: Any) -> None:
    """Serve PACKAGE: live sessions over OpenAI's Live and Realtime protocols, and a page for browsers.

    Runs until SIGTERM or Ctrl-C, then drains. Logs go to stderr as JSON lines, without what was said.
    """
    if find_spec("aiohttp") is None or find_spec("prometheus_client") is None:
        raise UsageError("serving needs packages that are not installed", fix="pip install 'tmlc[serve]'")
    import asyncio
    import sys

    import tmlc
    from tmlc.runtimes.gateway.logs import log_to
    from tmlc.runtimes.gateway.serving import Listening, Server
    from tmlc.runtimes.gateway.settings import check_exposure, read_settings

    given: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, ())}
    given |= {name: True for name, value in (("pin", pin), ("huge_pages", huge_pages)) if value}
    settings = read_settings(config, given)
    check_exposure(settings)
    log_to(sys.stderr)

    def announce(where: Listening) -> None:
        if as_json:
            click.echo(json.dumps(vars(where)))
            return
        key = '"YOUR KEY"' if where.keys else '"none"'
        lines = [
            f"serving {where.model}: {where.sessions} slots, {where.admits} of them within the budget as measured",
            f"  page   {where.page}",
            f"  api    {where.url}",
            f'         openai.AsyncOpenAI(base_url="{where.url}", api_key={key}).live.connect()',
            f"  admin  {where.admin}/metrics" if where.admin else "  admin  none",
        ]
        click.echo("\n".join(lines))
        sys.stdout.flush()

    with tmlc.load(
        package, threads=settings.threads, sessions=settings.sessions, pin=settings.pin, huge_pages=settings.huge_pages
    ) as engine:

        async def serve() -> None:
            await Server(engine, settings).run(announce)

        asyncio.run(serve())
