"""What the server counts and times, for Prometheus. Labels take fixed values: never a session, a key or a text.

`METRICS` is the table of all names; docs/operations.md says what each one means.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tmlc.runtimes.core.live import EndReason, Published
from tmlc.runtimes.core.surface import SchedulerStats
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.turns import TurnWatch

TURN_EDGES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
STEP_EDGES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2, 0.3, 0.4, 1.0)
LATE_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.2, 0.4, 1.0)
STOP_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0)
WAIT_EDGES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0, 120.0)

KNOWN = {
    "dialect": {"live", "realtime"},
    "direction": {"in", "out"},
    "reason": {"capacity", "key", "origin", "host", "rate", "sessions_per_key"},
    "ended": {str(reason) for reason in EndReason},
    "stream": {"input_audio", "input_video", "input_text", "output"},
    "event": {"created", "progress", "tool", "done", "failed", "timeout", "cancelled"},
    "policy": {"silent", "when_idle", "next_gap", "interrupt"},
}
"""The values that labels may take; anything else counts as "other"."""

METRICS = (
    "tmlc_turn_latency_seconds", "tmlc_barge_in_stop_seconds", "tmlc_tick_lateness_seconds", "tmlc_tick_step_seconds",
    "tmlc_event_loop_lag_seconds", "tmlc_delegation_seconds", "tmlc_sessions_opened_total",
    "tmlc_sessions_resumed_total", "tmlc_sessions_ended_total", "tmlc_refusals_total", "tmlc_dropped_total",
    "tmlc_delegations_total", "tmlc_injections_total", "tmlc_messages_total", "tmlc_sessions", "tmlc_slots",
    "tmlc_slot_bytes", "tmlc_running", "tmlc_admits", "tmlc_pressure_level", "tmlc_utilisation",
    "tmlc_predicted_step_seconds", "tmlc_ticks_total", "tmlc_late_ticks_total", "tmlc_missed_ticks_total",
    "tmlc_collapses_total", "tmlc_collapsed_ticks_total", "tmlc_missing_samples_total", "tmlc_late_samples_total",
    "tmlc_resident_memory_bytes",
)  # fmt: skip


def known(label: str, value: str) -> str:
    """`value` when the label may have it, else "other": what a stranger sends never makes a new time series."""
    return value if value in KNOWN[label] else "other"


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system has no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class _Present(Collector):
    """The scheduler's present numbers, read when somebody asks."""

    def __init__(self, stats: Callable[[], SchedulerStats], slot_bytes: int) -> None:
        self._stats, self._slot_bytes = stats, slot_bytes

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        sessions = GaugeMetricFamily("tmlc_sessions", "Sessions by state.", labels=["state"])
        for state in ("joining", "ticking", "detached"):
            sessions.add_metric([state], getattr(now, state))
        yield sessions
        for name, text, value in (
            ("tmlc_slots", "Sessions that there is memory for.", now.slots),
            ("tmlc_slot_bytes", "Memory that the states of one session take.", self._slot_bytes),
            ("tmlc_running", "1 while sessions can be served.", int(now.running)),
            ("tmlc_admits", "1 while a new session would be admitted.", int(now.admits)),
            ("tmlc_pressure_level", "What is given up under pressure, from 0 (nothing) to 4.", int(now.level)),
            ("tmlc_utilisation", "Part of the last second that steps took.", now.utilisation),
            ("tmlc_predicted_step_seconds", "Predicted step with one session more.", now.predicted),
            ("tmlc_resident_memory_bytes", "Memory of the process that is in RAM.", resident_bytes()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("tmlc_ticks", "Ticks done, collapsed ones included.", now.ticks),
            ("tmlc_late_ticks", "Ticks that began late.", now.late),
            ("tmlc_missed_ticks", "Ticks that were done later than the step budget after their edge.", now.over_budget),
            ("tmlc_collapses", "Collapses of late sessions.", now.collapses),
            ("tmlc_collapsed_ticks", "Ticks that were taken in with a later one.", now.collapsed),
            ("tmlc_missing_samples", "Input samples that had not come and ran as silence.", now.missing),
            ("tmlc_late_samples", "Input samples dropped because they came too late.", now.dropped_late),
        ):
            yield CounterMetricFamily(name, text, value=value)


class Metrics(Observer):
    """Counts what the gateway tells. On the event loop; `text` too.

    Args:
        stats: the scheduler's.
        period: seconds of a tick.
        slot_bytes: of one session.
    """

    def __init__(self, stats: Callable[[], SchedulerStats], period: float, slot_bytes: int) -> None:
        self._period = period
        self._turns: dict[str, TurnWatch] = {}
        self.registry = CollectorRegistry()
        self.registry.register(_Present(stats, slot_bytes))

        def times(name: str, text: str, edges: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=edges, registry=self.registry)

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._turn = times("tmlc_turn_latency_seconds", "End of the user's voice to the answer's.", TURN_EDGES)
        self._stop = times("tmlc_barge_in_stop_seconds", "User's voice over the model's to its silence.", STOP_EDGES)
        self._late = times("tmlc_tick_lateness_seconds", "Edge of the grid to the start of the step.", LATE_EDGES)
        self._step = times("tmlc_tick_step_seconds", "Duration of the step of a tick's batch.", STEP_EDGES)
        self._lag = times("tmlc_event_loop_lag_seconds", "How late the event loop came.", LATE_EDGES)
        self._took = times("tmlc_delegation_seconds", "Delegation to its end.", WAIT_EDGES, ("event",))
        self._opened = count("tmlc_sessions_opened", "Sessions admitted.", "dialect")
        self._resumed = count("tmlc_sessions_resumed", "Sessions that a client took over again.")
        self._ended = count("tmlc_sessions_ended", "Sessions that ended.", "ended")
        self._refused = count("tmlc_refusals", "Requests refused.", "reason")
        self._dropped = count("tmlc_dropped", "What bounded streams dropped.", "stream")
        self._delegated = count("tmlc_delegations", "Events of delegations.", "event")
        self._injected = count("tmlc_injections", "Injections delivered.", "policy")
        self._messages = count("tmlc_messages", "Events on sockets.", "dialect", "direction")

    def text(self) -> bytes:
        """Everything in Prometheus' text form."""
        return generate_latest(self.registry)

    def session_opened(self, session: str, dialect: str) -> None:
        self._opened.labels(known("dialect", dialect)).inc()
        self._turns[session] = TurnWatch(self._period)

    def session_ended(self, session: str, reason: str) -> None:
        self._ended.labels(known("ended", reason)).inc()
        self._turns.pop(session, None)

    def session_resumed(self, session: str) -> None:
        self._resumed.inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(known("reason", reason)).inc()

    def tick(self, out: Published) -> None:
        self._late.observe(max(0.0, out.late))
        self._step.observe(out.step)
        if (watch := self._turns.get(out.seat)) is not None:
            self._turned(watch.tick(out))

    def handed_out(self, session: str, tick: int, when: float) -> None:
        if (watch := self._turns.get(session)) is not None:
            self._turned(watch.handed_out(tick, when))

    def _turned(self, seconds: float | None) -> None:
        if seconds is not None:
            self._turn.observe(seconds)

    def interrupted(self, session: str, seconds: float) -> None:
        self._stop.observe(seconds)

    def dropped(self, stream: str, count: int) -> None:
        self._dropped.labels(known("stream", stream)).inc(count)

    def delegation(self, session: str, event: str, seconds: float) -> None:
        event = known("event", event)
        self._delegated.labels(event).inc()
        if event in ("done", "failed", "timeout", "cancelled"):
            self._took.labels(event).observe(max(0.0, seconds))

    def injected(self, session: str, policy: str) -> None:
        self._injected.labels(known("policy", policy)).inc()

    def message(self, dialect: str, direction: str, kind: str) -> None:
        self._messages.labels(known("dialect", dialect), known("direction", direction)).inc()

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)
