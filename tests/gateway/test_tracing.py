"""Spans: turns, delegations and sampled ticks lie within their session, and hold nothing of what was said."""

import numpy as np
import pytest

from tmlc.runtimes.core.live import Published
from tmlc.runtimes.core.tick import TickOutput

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

from tmlc.runtimes.gateway.tracing import Tracer  # noqa: E402

SESSION = "sess_abcdefghijklmnopqrstuvwx"


class Kept(memory.InMemorySpanExporter):
    """Holds the spans also after it was shut down, which is when the last of them come."""


def published(index: int, user: bool, model: bool) -> Published:
    due = 10 + 0.2 * index
    output = TickOutput(index, [7], "a secret", np.zeros(0, np.float32), {}, {"silent": int(not model), "batch": 1})
    return Published(SESSION, due, due, due + 0.05, output, user_speaking=user, model_speaking=model)


def traced(voices, every=2, end=True):
    """The spans of a session with these (user, model) ticks and one delegation."""
    exporter = Kept()
    tracer = Tracer(exporter, every)
    tracer.session_opened(SESSION, "live")
    for index, (user, model) in enumerate(voices):
        tracer.tick(published(index, user, model))
    for stage in ("created", "progress", "done"):
        tracer.delegation(SESSION, stage, 0.5)
    if end:
        tracer.session_ended(SESSION, "closed")
    tracer.close()
    return exporter.get_finished_spans()


def named(spans, name):
    return [span for span in spans if span.name == name]


def test_everything_of_a_session_lies_within_its_span():
    spans = traced([(True, False), (True, False), (False, True), (False, False), (True, False), (False, True)])
    (session,) = named(spans, "session")
    assert session.parent is None
    assert session.attributes["tmlc.reason"] == "closed" and session.attributes["tmlc.dialect"] == "live"
    for span in spans:
        if span is not session:
            assert span.context.trace_id == session.context.trace_id
    turns, ticks, (delegation,) = (named(spans, name) for name in ("turn", "tick", "delegation"))
    assert len(turns) == 2
    assert all(span.parent.span_id == session.context.span_id for span in [*turns, delegation])
    assert delegation.attributes["tmlc.event"] == "done"
    assert 0.4e9 < delegation.end_time - delegation.start_time < 0.6e9
    parents = {span.attributes["tmlc.tick"]: span.parent.span_id for span in ticks}
    assert sorted(parents) == [0, 2, 4]
    first, second = sorted(turns, key=lambda span: span.start_time)
    assert parents == {0: first.context.span_id, 2: first.context.span_id, 4: second.context.span_id}


def test_a_tick_outside_of_a_turn_lies_in_the_session():
    spans = traced([(False, False)], every=1)
    (tick,), (session,) = named(spans, "tick"), named(spans, "session")
    assert tick.parent.span_id == session.context.span_id
    assert tick.end_time - tick.start_time == pytest.approx(0.05e9, rel=0.01)


def test_a_session_and_a_turn_that_are_still_open_when_the_server_ends_are_sent():
    spans = traced([(True, False)], end=False)
    assert {span.name for span in spans} == {"session", "turn", "tick", "delegation"}


def test_no_span_holds_a_word_or_a_whole_id():
    told = " ".join(span.to_json() for span in traced([(True, True)] * 4))
    assert "a secret" not in told and SESSION not in told


def test_a_session_that_was_not_opened_here_makes_no_span():
    exporter = Kept()
    tracer = Tracer(exporter, 1)
    tracer.tick(published(0, True, False))
    tracer.session_ended(SESSION, "closed")
    tracer.close()
    assert exporter.get_finished_spans() == ()
