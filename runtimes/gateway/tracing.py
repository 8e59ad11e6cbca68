"""OpenTelemetry spans: a session, in it its turns and delegations, and in these one tick in so many. No content in any.

Needs `pip install 'tmlc[otel]'`; without it, asking for traces is an error that says so.
"""

from __future__ import annotations

import time
from typing import Any

from tmlc.errors import UsageError
from tmlc.runtimes.core.live import Published
from tmlc.runtimes.gateway.logs import short
from tmlc.runtimes.gateway.observer import Observer

FIX = "pip install 'tmlc[otel]'"


def exporter_to(endpoint: str) -> Any:
    """What sends spans to an OTLP endpoint over HTTP. Raises UsageError: the packages are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UsageError("tracing needs OpenTelemetry, which is not installed", where="--trace", fix=FIX) from None
    return OTLPSpanExporter(endpoint=endpoint)


class Tracer(Observer):
    """An observer that makes spans.

    Args:
        exporter: a span exporter of opentelemetry-sdk.
        every: one tick in so many gets a span.

    Raises (when made) UsageError: opentelemetry-sdk is not installed.
    """

    def __init__(self, exporter: Any, every: int) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise UsageError("tracing needs OpenTelemetry, which is not installed", where="--trace", fix=FIX) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tmlc"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer, self._trace, self._every = self._provider.get_tracer("tmlc.serve"), trace, every
        self._sessions: dict[str, Any] = {}
        self._turns: dict[str, Any] = {}
        self._offset = time.time() - time.monotonic()

    def _inside(self, session: str) -> Any:
        span = self._sessions.get(session)
        return None if span is None else self._trace.set_span_in_context(span)

    def session_opened(self, session: str, dialect: str) -> None:
        facts = {"tmlc.session": short(session), "tmlc.dialect": dialect}
        self._sessions[session] = self._tracer.start_span("session", attributes=facts)

    def session_ended(self, session: str, reason: str) -> None:
        self._end_turn(session)
        span = self._sessions.pop(session, None)
        if span is not None:
            span.set_attribute("tmlc.reason", reason)
            span.end()

    def _end_turn(self, session: str) -> None:
        turn = self._turns.pop(session, None)
        if turn is not None:
            turn.end()

    def tick(self, out: Published) -> None:
        inside = self._inside(out.seat)
        if inside is None:
            return
        if out.user_speaking and out.seat not in self._turns:
            begun = self._nanoseconds(out.started)
            self._turns[out.seat] = self._tracer.start_span("turn", context=inside, start_time=begun)
        if out.output.index % self._every == 0:
            turn = self._turns.get(out.seat)
            within = inside if turn is None else self._trace.set_span_in_context(turn)
            facts = {"tmlc.tick": out.output.index, "tmlc.late_ms": 1000 * out.late, "tmlc.collapsed": out.collapsed}
            begun = self._nanoseconds(out.started)
            span = self._tracer.start_span("tick", context=within, start_time=begun, attributes=facts)
            span.end(end_time=self._nanoseconds(out.done))
        if out.model_speaking and not out.user_speaking:
            self._end_turn(out.seat)

    def _nanoseconds(self, at: float) -> int:
        """Since the epoch, of seconds on the scheduler's clock."""
        return int((self._offset + at) * 1e9)

    def delegation(self, session: str, event: str, seconds: float) -> None:
        inside = self._inside(session)
        if inside is None or event in ("created", "progress", "tool"):
            return
        now = time.time_ns()
        begun = now - int(seconds * 1e9)
        span = self._tracer.start_span("delegation", context=inside, start_time=begun, attributes={"tmlc.event": event})
        span.end(end_time=now)

    def close(self) -> None:
        """Ends what is open, and sends what waits."""
        for session in tuple(self._sessions):
            self.session_ended(session, "shutdown")
        self._provider.shutdown()
