"""A server from its settings: puts the parts together, runs them until it is told to stop, and drains.

SIGTERM (and the first SIGINT): nobody is admitted any more, `/readyz` says so, sessions get `drain` seconds to end,
those that are left end with a snapshot. A second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tmlc.errors import UsageError
from tmlc.runtimes.background.config import read_settings as read_background
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.admission import Level, StepTable, measure
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.gateway.admin import Health, make_admin
from tmlc.runtimes.gateway.caps import PASS, Meter
from tmlc.runtimes.gateway.frames import ImageLimits
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.logs import LogObserver, TickLogs
from tmlc.runtimes.gateway.metrics import Metrics
from tmlc.runtimes.gateway.observer import Observer, Observers
from tmlc.runtimes.gateway.places import RETRY_SECONDS, KeyedSessions, Places
from tmlc.runtimes.gateway.security import Guard, Keys
from tmlc.runtimes.gateway.server import RESUME, make_app, refusal
from tmlc.runtimes.gateway.settings import Caps, ServeSettings, check_exposure, is_loopback
from tmlc.runtimes.gateway.snapshots import SnapshotStore
from tmlc.runtimes.gateway.tracing import Tracer, exporter_to
from tmlc.runtimes.gateway.wire import METER

SWEEP_SECONDS = 60.0
log = logging.getLogger("tmlc.serve")


@dataclass(frozen=True)
class Listening:
    """Where a server listens: `url` with `/v1`, `page`, and `admin` ("" for none); what it serves."""

    url: str
    page: str
    admin: str
    model: str
    sessions: int
    admits: int
    keys: bool


class Server:
    """One server. `run` does everything.

    Args:
        engine: loaded by the caller, who closes it afterwards.
        settings: of the server.

    Raises (when made) UsageError: settings that cannot work here: an open bind without keys, unreadable files.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        check_exposure(settings)
        self.engine, self.settings = engine, settings
        self._keys = Keys(settings.keys) if settings.keys is not None else None
        self._background = read_background(settings.background) if settings.background is not None else None
        self._tls = _tls(settings)
        self._tracer = Tracer(exporter_to(settings.trace), settings.trace_ticks) if settings.trace else None
        self._logs = TickLogs(settings.record, settings.record_bytes) if settings.record is not None else None
        self._store = SnapshotStore(settings.snapshots) if settings.snapshots is not None else None
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    def stop(self) -> None:
        """As a signal does: drain, and at the second call end at once."""
        if self._stop.is_set():
            self._now.set()
        self._stop.set()

    async def run(self, announce: Callable[[Listening], None]) -> None:
        """Serves until it is told to stop; `announce` is called once it listens."""
        loop = asyncio.get_running_loop()
        table = await asyncio.to_thread(measure, self.engine)
        scheduler = Scheduler(self.engine, table=table, resume_window=self.settings.resume_window)
        scheduler.start()
        try:
            await self._serve(scheduler, table, announce, loop)
        finally:
            await asyncio.to_thread(scheduler.close)
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    async def _serve(
        self, scheduler: Scheduler, table: StepTable, announce: Callable[[Listening], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        settings = self.settings
        metrics = Metrics(scheduler)
        observer = Observers([metrics, LogObserver(), *([self._tracer] if self._tracer is not None else [])])
        places = Places(settings.caps.sessions)
        background = self._make_background(scheduler)
        sessions = KeyedSessions(places, scheduler, background, observer, self._store, self._logs)
        limits = ImageLimits(bytes=settings.caps.image_bytes, pixels=settings.caps.image_pixels)
        hub = Hub(sessions, observer, settings.model or self.engine.manifest.model.name, settings.aliases, limits)
        guard = Guard(self._keys, settings.origins, is_loopback(settings.host), observer, (hub.model, *hub.aliases))
        app = make_app(hub, (guard.middleware(), caps_middleware(places, settings.caps, observer)))
        app.add_routes(guard.routes())
        public, admin = web.AppRunner(app, access_log=None), None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        sweeper = asyncio.create_task(self._sweep())
        try:
            port = await _listen(public, settings.host, settings.port, self._tls)
            where = ""
            if settings.admin_port is not None:
                health = Health(scheduler.stats, lambda: scheduler.draining)
                admin = web.AppRunner(make_admin(health, metrics), access_log=None)
                admin_port = await _listen(admin, settings.admin_host, settings.admin_port, None)
                where = f"http://{_shown(settings.admin_host)}:{admin_port}"
            page = f"{settings.scheme}://{_shown(settings.host)}:{port}/"
            admits = table.largest(0.8 * scheduler.step_budget, settings.sessions)
            keyed = self._keys is not None
            with settled():
                announce(Listening(f"{page}v1", page, where, hub.model, settings.sessions, admits, keyed))
                await self._stop.wait()
                await self._drain(scheduler)
        finally:
            sweeper.cancel()
            await asyncio.to_thread(scheduler.close)
            await asyncio.sleep(0)  # the ends of sessions, which the device thread has handed over, come first
            await public.cleanup()
            await hub.close()
            if admin is not None:
                await admin.cleanup()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _make_background(self, scheduler: Scheduler) -> Background:
        if self._background is None:
            return Background()
        return self._background.make(
            first_target=self.engine.target, preempted=lambda: scheduler.level >= Level.NO_BACKGROUND
        )

    async def _drain(self, scheduler: Scheduler) -> None:
        log.info("draining", extra={"facts": {"seconds": self.settings.drain}})
        draining = asyncio.create_task(asyncio.to_thread(scheduler.drain, self.settings.drain))
        now = asyncio.create_task(self._now.wait())
        await asyncio.wait([draining, now], return_when=asyncio.FIRST_COMPLETED)
        now.cancel()

    async def _sweep(self) -> None:
        """Removes kept sessions that nobody came back for."""
        while self._store is not None:
            await asyncio.to_thread(self._store.sweep)
            await asyncio.sleep(SWEEP_SECONDS)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """All that was made so far lives as long as the server: the garbage collector does not look at it meanwhile.

    A full collection holds up every thread, the device's too, for as long as it looks at 60,000 objects of modules.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def caps_middleware(places: Places, caps: Caps, observer: Observer) -> Any:
    """Refuses, before the upgrade, sockets of a key that has its fill; gives the others their meter.

    One that comes back (`tmlc_resume`) needs no place of its own: `KeyedSessions` sees to those that do.
    """

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if "upgrade" not in request.headers.get("Connection", "").lower():
            return await handler(request)
        name = PASS.get().name
        if RESUME not in request.query and not places.free(name):
            why = f"this key has {places.most} sessions already"
        elif not places.connect(name):
            why = "this key has too many connections"
        else:
            request[METER] = Meter(caps)
            try:
                return await handler(request)
            finally:
                places.disconnect(name)
        observer.refused("sessions_per_key")
        return refusal(429, why, "rate_limit_exceeded", "rate_limit_error", RETRY_SECONDS)

    return check


def _tls(settings: ServeSettings) -> ssl.SSLContext | None:
    if settings.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.certificate, settings.private_key)
    except (OSError, ssl.SSLError) as error:
        fix = "give a certificate and the private key that belongs to it, both in PEM form"
        where = f"{settings.certificate}, {settings.private_key}"
        reason = "not PEM, or not of each other" if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(f"the certificate cannot be used: {reason}", where=where, fix=fix) from None
    return context


async def _listen(runner: web.AppRunner, host: str, port: int, tls: ssl.SSLContext | None) -> int:
    """Starts a runner; the port that it got. Raises UsageError: the address cannot be had."""
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except OSError as error:
        fix = "use another --port, or 0 for a free one"
        raise UsageError(f"{host}:{port} cannot be listened on: {error.strerror}", fix=fix) from None
    return int(runner.addresses[0][1])


def _shown(host: str) -> str:
    """A host as a URL has it."""
    return f"[{host}]" if ":" in host else host
