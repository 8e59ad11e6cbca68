"""The numbers of a server for Prometheus. No label can take more than a few values: sessions and keys are in none.

docs/operations.md has the table; a test holds the two together.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tmlc.runtimes.background.delegations import Stage
from tmlc.runtimes.background.injections import Policy
from tmlc.runtimes.core.live import EndReason, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.turns import TurnWatch

STEP_EDGES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.2, 0.4, 0.8, 1.6)
TURN_EDGES = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0)
LAG_EDGES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
MAX_FOLLOWED = 65536
MAX_WAITING = 64
"""Ticks of a session that wait to be handed out; a connection holds fewer."""
FORGET_SECONDS = 10.0
"""An answer that comes later than this is none to what was said then."""
OTHER = "other"
REASONS = frozenset({"capacity", "key", "origin", "host", "rate", "sessions_per_key", "secrets_per_key"})
STREAMS = frozenset({"input_audio", "input_video", "input_text", "output"})
DIALECTS, DIRECTIONS = frozenset({"live", "realtime"}), frozenset({"in", "out"})
ENDS, STAGES, POLICIES = (frozenset(map(str, kind)) for kind in (EndReason, Stage, Policy))


@dataclass(slots=True)
class _Followed:
    """What is remembered of a session until it ends: its turns; when its ticks that wait to be handed out were done."""

    turns: TurnWatch
    done: dict[int, float] = field(default_factory=dict)


def _of(known: frozenset[str], value: str) -> str:
    """A label's value: one of a closed set."""
    return value if value in known else OTHER


class Metrics(Observer):
    """An observer that counts.

    Args:
        scheduler: whose numbers are shown beside; asked when somebody reads them.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self._scheduler = scheduler
        own = self.registry
        self._turn = Histogram("tmlc_turn_latency_seconds", "User's last tick with voice to the first voiced output "
                               "handed out", buckets=TURN_EDGES, registry=own)  # fmt: skip
        self._stop = Histogram("tmlc_barge_in_stop_seconds", "User's voice over the model's until it falls silent",
                               buckets=TURN_EDGES, registry=own)  # fmt: skip
        self._late = Histogram(
            "tmlc_tick_lateness_seconds", "Edge to the start of the step", buckets=STEP_EDGES, registry=own
        )
        self._step = Histogram("tmlc_tick_step_seconds", "The step of a batch, once a session of it",
                               buckets=STEP_EDGES, registry=own)  # fmt: skip
        self._queue = Histogram("tmlc_output_queue_seconds", "A tick done until its audio was written to the socket",
                                buckets=LAG_EDGES, registry=own)  # fmt: skip
        self._lag = Histogram("tmlc_event_loop_lag_seconds", "By how much the event loop came late", buckets=LAG_EDGES,
                              registry=own)  # fmt: skip
        self._opened = Counter("tmlc_sessions_opened", "Sessions admitted", ["dialect"], registry=own)
        self._ended = Counter("tmlc_sessions_ended", "Sessions that left the scheduler", ["reason"], registry=own)
        self._resumed = Counter("tmlc_sessions_resumed", "Sessions that a client took over again", registry=own)
        self._refused = Counter("tmlc_refusals", "Requests refused", ["reason"], registry=own)
        self._dropped = Counter("tmlc_dropped", "What bounded streams of the gateway dropped", ["stream"], registry=own)
        self._delegations = Counter("tmlc_delegations", "Delegations by what became of them", ["event"], registry=own)
        self._injected = Counter("tmlc_injections_delivered", "Injections delivered", ["policy"], registry=own)
        self._messages = Counter("tmlc_messages", "Events over sockets", ["dialect", "direction"], registry=own)
        self.registry.register(_Scheduled(scheduler))
        self._followed: OrderedDict[str, _Followed] = OrderedDict()

    def session_opened(self, session: str, dialect: str) -> None:
        self._opened.labels(_of(DIALECTS, dialect)).inc()

    def session_ended(self, session: str, reason: str) -> None:
        self._ended.labels(_of(ENDS, reason)).inc()
        self._followed.pop(session, None)

    def session_resumed(self, session: str) -> None:
        self._resumed.inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(_of(REASONS, reason)).inc()

    def tick(self, out: Published) -> None:
        self._late.observe(max(0.0, out.late))
        self._step.observe(out.step)
        followed = self._followed.get(out.seat)
        if followed is None:
            followed = self._followed[out.seat] = _Followed(TurnWatch(self._scheduler.clock.period))
            while len(self._followed) > MAX_FOLLOWED:
                self._followed.popitem(last=False)
        followed.done[out.output.index] = time.monotonic()
        if len(followed.done) > MAX_WAITING:
            del followed.done[next(iter(followed.done))]
        self._turned(followed.turns.tick(out))

    def handed_out(self, session: str, tick: int, when: float) -> None:
        followed = self._followed.get(session)
        if followed is None:  # it has ended
            return
        done = followed.done.pop(tick, None)
        if done is not None:
            self._queue.observe(max(0.0, when - done))
        self._turned(followed.turns.handed_out(tick, when))

    def _turned(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= FORGET_SECONDS:
            self._turn.observe(seconds)

    def interrupted(self, session: str, seconds: float) -> None:
        self._stop.observe(seconds)

    def dropped(self, stream: str, count: int) -> None:
        self._dropped.labels(_of(STREAMS, stream)).inc(count)

    def delegation(self, session: str, event: str, seconds: float) -> None:
        self._delegations.labels(_of(STAGES, event)).inc()

    def injected(self, session: str, policy: str) -> None:
        self._injected.labels(_of(POLICIES, policy)).inc()

    def message(self, dialect: str, direction: str, kind: str) -> None:
        self._messages.labels(_of(DIALECTS, dialect), _of(DIRECTIONS, direction)).inc()

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)


class _Scheduled(Collector):
    """The scheduler's own numbers, read when somebody asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        stats, capacity = self._scheduler.stats(), self._scheduler.engine.capacity()
        gauges = {
            "tmlc_slots": ("Sessions that there is memory for", stats.slots),
            "tmlc_slot_bytes": ("Bytes of the state of one session", capacity.session_bytes),
            "tmlc_reserved_bytes": ("Bytes of all states", capacity.reserved_bytes),
            "tmlc_weight_bytes": ("Bytes of weights", capacity.weight_bytes),
            "tmlc_resident_bytes": ("Resident memory of the process", resident_bytes()),
            "tmlc_utilisation": ("Part of the last second that steps took", stats.utilisation),
            "tmlc_pressure_level": ("What is given up: 0 nothing, 4 background work", int(stats.level)),
            "tmlc_predicted_step_seconds": ("Predicted p99 step with one session more", stats.predicted),
            "tmlc_admits": ("Would a session be admitted now?", float(stats.admits)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
        states = GaugeMetricFamily("tmlc_sessions", "Sessions by state", labels=["state"])
        for state in ("joining", "ticking", "detached"):
            states.add_metric([state], getattr(stats, state))
        yield states
        counters = {
            "tmlc_ticks": ("Ticks done, collapsed ones included", stats.ticks),
            "tmlc_batches": ("Steps", stats.batches),
            "tmlc_late_ticks": ("Ticks that began late", stats.late),
            "tmlc_missed_ticks": ("Ticks done later than the step budget after their edge", stats.over_budget),
            "tmlc_collapses": ("Times that missed ticks were taken in at once", stats.collapses),
            "tmlc_collapsed_ticks": ("Ticks taken in without an answer", stats.collapsed),
            "tmlc_missing_samples": ("Samples that had not come and ran as silence", stats.missing),
            "tmlc_late_samples": ("Samples dropped because they were older than 400 ms", stats.dropped_late),
            "tmlc_overflow_samples": ("Samples dropped because a stream was full", stats.dropped_overflow),
            "tmlc_skipped_samples": ("Silent samples left out to catch up", stats.skipped),
            "tmlc_dropped_frames": ("Frames replaced by newer ones", stats.dropped_frames),
        }
        for name, (text, count) in counters.items():
            yield CounterMetricFamily(name, text, value=count)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
