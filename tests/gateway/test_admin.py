"""The admin port: alive, ready, and why not."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from aiohttp.test_utils import TestClient, TestServer

from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.clock import WallClock
from tmlc.runtimes.core.surface import SchedulerStats
from tmlc.runtimes.gateway.admin import MAX_LATE, Health, make_admin
from tmlc.runtimes.gateway.metrics import Metrics

STATS = SchedulerStats(
    running=True, slots=4, joining=0, ticking=1, detached=0, edge=9, lateness=0.0, step=0.02, batch=1,
    utilisation=0.25, pressure=0.25, level=Level.NORMAL, admits=True, predicted=0.03, ticks=18, batches=9, late=0,
    over_budget=0, collapses=0, collapsed=0, missing=0, dropped_late=0, dropped_overflow=0, skipped=0,
    dropped_frames=0, opened=1, refused=0,
)  # fmt: skip


ENGINE = SimpleNamespace(
    capacity=lambda: SimpleNamespace(session_bytes=1000, reserved_bytes=4000, weight_bytes=9000)
)


class Desk:
    """A health with numbers and a clock that a test sets."""

    def __init__(self) -> None:
        self.stats, self.now = STATS, 100.0
        self.draining = False
        self.health = Health(lambda: self.stats, lambda: self.draining, lambda: self.now)


def test_a_server_that_drains_is_not_ready():
    desk = Desk()
    desk.draining = True
    assert desk.health.not_ready() == "draining"


def test_a_server_without_sessions_stays_ready():
    desk = Desk()
    desk.stats = replace(STATS, ticking=0)
    for _ in range(5):
        desk.now += MAX_LATE
        assert desk.health.not_ready() is None


def test_a_full_server_is_ready():
    desk = Desk()
    desk.stats = replace(STATS, admits=False)
    assert desk.health.not_ready() is None


def test_a_device_that_hangs_makes_it_not_ready_until_ticks_go_on():
    desk = Desk()
    desk.health.watch()
    desk.now += MAX_LATE + 0.1
    assert "no tick" in (desk.health.not_ready() or "")
    desk.stats = replace(STATS, ticks=STATS.ticks + 1)
    assert desk.health.not_ready() is None


def test_a_session_after_a_long_silence_is_no_hang():
    desk = Desk()
    desk.stats = replace(STATS, ticking=0)
    desk.health.watch()
    desk.now += 3600
    desk.health.watch()
    desk.stats, desk.now = STATS, desk.now + 0.5
    assert desk.health.not_ready() is None


def test_a_scheduler_that_has_stopped_makes_it_not_ready():
    desk = Desk()
    desk.stats = replace(STATS, running=False)
    assert desk.health.not_ready() == "the scheduler has stopped"


def test_the_three_paths():
    async def talk() -> None:
        desk = Desk()
        metrics = Metrics(SimpleNamespace(stats=lambda: desk.stats, clock=WallClock(0.2), engine=ENGINE))
        async with TestClient(TestServer(make_admin(desk.health, metrics))) as client:
            assert (await client.get("/livez")).status == 200
            assert (await client.get("/readyz")).status == 200
            numbers = await client.get("/metrics")
            assert numbers.content_type == "text/plain"
            assert "tmlc_turn_latency_seconds_bucket" in await numbers.text()
            desk.draining = True
            ready = await client.get("/readyz")
            assert (ready.status, await ready.text()) == (503, "draining\n")
            assert (await client.get("/livez")).status == 200
            assert (await client.get("/v1/models")).status == 404

    asyncio.run(talk())
