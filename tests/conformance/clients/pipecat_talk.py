"""A Pipecat pipeline that talks to a Live server for some seconds and prints what happened as one JSON object.

Runs in an environment of its own (`make clients`), with nothing of pipecat changed: `OpenAILiveLLMService` between a
microphone that plays a tone in real time and a processor that counts what comes out.

    python pipecat_talk.py BASE_URL MODEL SECONDS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
from loguru import logger
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    LLMContextFrame,
    OutputAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.live import events
from pipecat.services.openai.live.llm import OpenAILiveLLMService
from pipecat.workers.runner import WorkerRunner

RATE, FRAME = 24000, 480
ANSWER = "the answer is 42"


class Ear(FrameProcessor):
    """The end of the pipeline: counts audio, joins text, keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.samples, self.energy, self.text, self.errors = 0, 0.0, "", list[str]()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, OutputAudioRawFrame):
            pcm = np.frombuffer(frame.audio, np.int16) / 32768
            self.samples += pcm.size
            self.energy += float((pcm**2).sum())
        elif isinstance(frame, TTSTextFrame):
            self.text += frame.text
        elif isinstance(frame, ErrorFrame):
            self.errors.append(frame.error)
        await self.push_frame(frame, direction)


async def microphone(worker: PipelineWorker, seconds: float) -> None:
    """Two seconds of a tone, then silence, on a grid of 20 ms."""
    begun = time.monotonic()
    for count in range(int(seconds * RATE / FRAME)):
        await asyncio.sleep(max(0.0, begun + count * FRAME / RATE - time.monotonic()))
        at = np.arange(FRAME) + count * FRAME
        loud = 0.3 * (at < 2 * RATE)
        pcm = (loud * np.sin(2 * np.pi * 220 * at / RATE) * 32767).astype(np.int16)
        await worker.queue_frame(InputAudioRawFrame(pcm.tobytes(), RATE, 1))


async def talk(base_url: str, model: str, seconds: float) -> dict[str, Any]:
    settings = OpenAILiveLLMService.Settings(model=model, system_instruction="Answer briefly.")
    url = base_url.replace("http", "ws", 1) + "/live/sessions"
    llm = OpenAILiveLLMService(api_key="sk-test", base_url=url, settings=settings)
    started: list[str] = []
    delegated: list[str] = []

    @llm.event_handler("on_session_started")
    async def on_started(_: Any, session: Any) -> None:
        started.append(session.id)

    @llm.event_handler("on_delegation_created")
    async def on_delegation(_: Any, delegation: Any) -> None:
        delegated.append(delegation.id)
        await llm.send_client_event(events.SessionCommentaryAppendEvent(content=ANSWER, delegation_id=delegation.id))

    ear = Ear()
    params = PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE)
    worker = PipelineWorker(Pipeline([llm, ear]), params=params, idle_timeout_secs=None)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    await worker.queue_frame(LLMContextFrame(LLMContext([{"role": "user", "content": "Hello."}])))
    await microphone(worker, seconds)
    await worker.queue_frame(EndFrame())
    await running
    return {
        "sessions": started,
        "seconds_of_audio": ear.samples / RATE,
        "rms": (ear.energy / max(1, ear.samples)) ** 0.5,
        "transcript": ear.text,
        "delegations": delegated,
        "errors": ear.errors,
    }


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    print(json.dumps(asyncio.run(talk(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
