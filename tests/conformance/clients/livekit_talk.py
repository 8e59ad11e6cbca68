"""A LiveKit agent that talks to a Live server for some seconds and prints what happened as one JSON object.

Runs in an environment of its own (`make clients`), nothing of livekit changed: an `AgentSession` over `GPTLiveModel`,
a microphone that plays a tone in real time, and a loudspeaker that takes the time that its audio lasts.

    python livekit_talk.py BASE_URL MODEL SECONDS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents import Agent, AgentSession
from livekit.agents.voice import io
from livekit.plugins.openai.realtime import GPTLiveModel

RATE, FRAME = 24000, 480
ANSWER = "the answer is 42"


class Microphone(io.AudioInput):
    """Two seconds of a tone, then silence, on a grid of 20 ms."""

    def __init__(self) -> None:
        super().__init__(label="microphone")
        self.begun, self.count = time.monotonic(), 0

    async def __anext__(self) -> rtc.AudioFrame:
        await asyncio.sleep(max(0.0, self.begun + self.count * FRAME / RATE - time.monotonic()))
        at = np.arange(FRAME) + self.count * FRAME
        loud = 0.3 * (at < 2 * RATE)
        pcm = (loud * np.sin(2 * np.pi * 220 * at / RATE) * 32767).astype(np.int16)
        self.count += 1
        return rtc.AudioFrame(pcm.tobytes(), RATE, 1, FRAME)


class Loudspeaker(io.AudioOutput):
    """Counts what it is given, and says when it would have been played."""

    def __init__(self) -> None:
        super().__init__(label="loudspeaker", capabilities=io.AudioOutputCapabilities(pause=False))
        self.samples, self.energy, self._segment = 0, 0.0, 0.0

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        if not self._segment:
            self.on_playback_started(created_at=time.time())
        pcm = np.frombuffer(frame.data, np.int16) / 32768
        self.samples += pcm.size
        self.energy += float((pcm**2).sum())
        self._segment += frame.duration

    def flush(self) -> None:
        super().flush()
        self._finish(False)

    def clear_buffer(self) -> None:
        self._finish(True)

    def _finish(self, interrupted: bool) -> None:
        if self._segment:
            played, self._segment = self._segment, 0.0
            self.on_playback_finished(playback_position=played, interrupted=interrupted)


async def talk(base_url: str, model: str, seconds: float) -> dict[str, Any]:
    live = GPTLiveModel(model=model, base_url=base_url, api_key="sk-test", delegation="client")
    session: AgentSession = AgentSession(llm=live)
    speaker = Loudspeaker()
    session.input.audio, session.output.audio = Microphone(), speaker
    errors: list[str] = []
    session.on("error", lambda event: errors.append(str(event.error)))
    agent = Agent(instructions="Answer briefly.")
    await session.start(agent)
    duplex = agent.duplex_session
    kinds: dict[str, int] = {}
    said: list[str] = []
    delegated: list[str] = []

    def received(event: dict[str, Any]) -> None:
        kinds[event["type"]] = kinds.get(event["type"], 0) + 1
        if event["type"] == "session.output_transcript.delta":
            said.append(event["delta"])
        if event["type"] == "error":
            errors.append(json.dumps(event["error"]))

    def answer(delegation: Any) -> None:
        delegated.append(delegation.id)
        duplex.append_commentary(ANSWER, delegation_id=delegation.id)

    duplex.on("openai_server_event_received", received)
    duplex.on("delegation_created", answer)
    await asyncio.sleep(seconds / 2)
    duplex.append_thinking("The user is called Ada.")
    await asyncio.sleep(seconds / 2)
    await session.aclose()
    await live.aclose()
    return {
        "events": kinds,
        "seconds_of_audio": speaker.samples / RATE,
        "rms": (speaker.energy / max(1, speaker.samples)) ** 0.5,
        "transcript": "".join(said),
        "delegations": delegated,
        "errors": errors,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(talk(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
