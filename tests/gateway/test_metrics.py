"""The numbers for Prometheus: their names, what is counted, and that strangers make no time series."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.clock import WallClock
from tmlc.runtimes.core.live import Published
from tmlc.runtimes.core.surface import SchedulerStats
from tmlc.runtimes.core.tick import TickOutput
from tmlc.runtimes.gateway.metrics import MAX_WAITING, Metrics

STATS = SchedulerStats(
    running=True, slots=4, joining=0, ticking=2, detached=1, edge=9, lateness=0.0, step=0.02, batch=2,
    utilisation=0.25, pressure=0.25, level=Level.NORMAL, admits=True, predicted=0.03, ticks=18, batches=9, late=3,
    over_budget=1, collapses=1, collapsed=2, missing=320, dropped_late=0, dropped_overflow=0, skipped=0,
    dropped_frames=0, opened=3, refused=0,
)  # fmt: skip


def metrics_of(stats):
    capacity = SimpleNamespace(session_bytes=1000, reserved_bytes=4000, weight_bytes=9000)
    engine = SimpleNamespace(capacity=lambda: capacity)
    return Metrics(SimpleNamespace(stats=stats, engine=engine, clock=WallClock(0.2)))


def published(index: int, user: bool, model: bool, late: float = 0.01, step: float = 0.05) -> Published:
    due = 10 + 0.2 * index
    output = TickOutput(index, [], "", np.zeros(0, np.float32), {}, {"silent": int(not model), "batch": 1})
    return Published(
        "sess_a", due, due + late, due + late + step, output, user_speaking=user, model_speaking=model
    )


def text_of(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text_of(metrics))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_the_table_of_the_docs_is_what_is_exported():
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `tmlc_")]
    found = set()
    for family in text_string_to_metric_families(text_of(metrics_of(lambda: STATS))):
        if not family.name.endswith("_created"):
            found.add(family.name + ("_total" if family.type == "counter" else ""))
    assert sorted(rows) == sorted(found)


def test_a_turn_goes_into_its_histogram_and_a_session_that_ended_leaves_nothing():
    metrics = metrics_of(lambda: STATS)
    metrics.session_opened("sess_a", "realtime")
    for index, (user, model) in enumerate([(True, False), (False, True), (False, False)]):
        metrics.tick(published(index, user, model))
        metrics.handed_out("sess_a", index, 10 + 0.2 * index + 0.07)
    metrics.session_ended("sess_a", "closed")
    found = samples(metrics)
    assert found["tmlc_turn_latency_seconds_count", ()] == 1
    assert found["tmlc_turn_latency_seconds_bucket", (("le", "0.4"),)] == 0
    assert found["tmlc_turn_latency_seconds_bucket", (("le", "0.5"),)] == 1
    assert found["tmlc_tick_step_seconds_bucket", (("le", "0.16"),)] == 3
    assert found["tmlc_tick_lateness_seconds_count", ()] == 3
    assert found["tmlc_sessions_ended_total", (("reason", "closed"),)] == 1
    assert not metrics._followed


def test_the_schedulers_numbers_are_read_when_asked_for():
    now = [STATS]
    metrics = metrics_of(lambda: now[0])
    assert samples(metrics)["tmlc_sessions", (("state", "ticking"),)] == 2
    now[0] = replace(STATS, ticking=3, over_budget=7, admits=False)
    found = samples(metrics)
    assert found["tmlc_sessions", (("state", "ticking"),)] == 3
    assert found["tmlc_missed_ticks_total", ()] == 7
    assert (found["tmlc_admits", ()], found["tmlc_slot_bytes", ()]) == (0, 1000)
    assert found["tmlc_resident_bytes", ()] > 0


def test_what_is_never_handed_out_is_bounded_and_forgotten_with_its_session():
    metrics = metrics_of(lambda: STATS)
    for index in range(10 * MAX_WAITING):
        metrics.tick(published(index, False, False))
    assert len(metrics._followed["sess_a"].done) == MAX_WAITING
    metrics.session_ended("sess_a", "behind")
    metrics.handed_out("sess_a", 10 * MAX_WAITING - 1, 99.0)  # what waited on the socket when it ended
    assert not metrics._followed
    assert samples(metrics)["tmlc_output_queue_seconds_count", ()] == 0


def test_every_label_is_of_a_closed_set():
    metrics = metrics_of(lambda: STATS)
    for made_up in ("sess_abc", "ek_secret", "hello there"):
        metrics.session_opened("s", made_up)
        metrics.session_ended("s", made_up)
        metrics.refused(made_up)
        metrics.dropped(made_up, 1)
        metrics.delegation("s", made_up, 1.0)
        metrics.injected("s", made_up)
        metrics.message(made_up, made_up, made_up)
    values = {value for _, labels in samples(metrics) for name, value in labels if name not in ("le", "state")}
    assert values == {"other"}


def test_values_that_nobody_declared_share_one_time_series():
    metrics = metrics_of(lambda: STATS)
    metrics.refused("capacity")
    before = len(samples(metrics))
    metrics.refused("first of them")
    grown = len(samples(metrics))
    for number in range(1000):
        metrics.refused(f"made up {number}")
        metrics.message("live", "in", f"kind {number}")
    assert samples(metrics)["tmlc_refusals_total", (("reason", "other"),)] == 1001
    assert grown > before
    assert len(samples(metrics)) - grown <= 2  # the one series of messages, and when it was made
