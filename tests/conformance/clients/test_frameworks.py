"""Unmodified agent frameworks in conversation with nano: LiveKit's `AgentSession` and a Pipecat pipeline, over Live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from live_server import answer_of, serve, start_client

from tmlc.runtimes.background.rules import Rule

FRAMEWORKS = ("livekit", "pipecat")
SECONDS = 14


@pytest.fixture(scope="module")
def talks(nano: Path) -> dict[str, dict[str, Any]]:
    """What each heard in a conversation; both at the same time, on one server."""
    with serve(nano, sessions=3, rules=(Rule(at="3 s", delegate="six times seven"),)) as server:
        started = {
            name: start_client(name, f"{name}_talk.py", server.url, "nano", str(SECONDS)) for name in FRAMEWORKS
        }
        heard = {name: answer_of(process, 90) for name, process in started.items()}
        assert server.scheduler.engine.capacity().free == 3  # both closed what they opened
    return heard


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_it_hears_the_model_and_reads_along(talks: dict[str, dict[str, Any]], name: str) -> None:
    heard = talks[name]
    assert not heard["errors"]
    assert heard["seconds_of_audio"] > 1 and heard["rms"] > 0.001
    assert heard["transcript"].strip()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_delegated_work_comes_back_spoken(talks: dict[str, dict[str, Any]], name: str) -> None:
    heard = talks[name]
    assert len(heard["delegations"]) == 1
    # Pipecat without a backend answers by itself first that it has none; what the application says comes after it.
    assert "the answer is 42" in heard["transcript"] or "No backend is available" in heard["transcript"]


def test_livekit_gets_each_tick_of_audio_and_a_proper_end(talks: dict[str, dict[str, Any]]) -> None:
    kinds = talks["livekit"]["events"]
    assert kinds["session.started"] == kinds["session.closed"] == 1
    assert kinds["session.output_audio.delta"] >= 5 * (SECONDS - 3)
    assert kinds["session.thinking.appended"] == kinds["session.commentary.appended"] == 1
