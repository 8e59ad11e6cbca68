"""What the conversations of a case show of the model: how long it hesitates, and how soon it stops when cut in on.

The output of a session is one stream of hops of 50 ms, voiced or not by the detector that the scheduler uses. Sample s
of tick k is heard (k + 1) ticks after the session began, plus decoding, the step of that tick, sending, and s. A tick
that began late is heard that much later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmlc.bench.dialogues import Utterance
from tmlc.report.latency import DECODE_MS, SEND_MS, as_dict, spread
from tmlc.runtimes.core.voice import HANGOVER, HOP_SECONDS, VoiceDetector, hops_of

HOP_MS = 1000 * HOP_SECONDS


@dataclass
class Voice:
    """The voice in one session's output.

    Attributes:
        tick_ms: length of a tick.
        voiced: for each hop, is a voice going on in it? The detector's hangover is taken off again: a voice ends with
            its last hop above the threshold.
        delays: for each tick, ms from the end of its input to its first sample: lateness, decoding, step, sending.
    """

    tick_ms: float
    voiced: list[bool] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    _detector: VoiceDetector = field(default_factory=VoiceDetector)

    @property
    def hops(self) -> int:
        """Hops in a tick."""
        return hops_of(self.tick_ms / 1000)

    def add(self, audio: np.ndarray, step_ms: float, late_ms: float) -> None:
        """The next tick's output."""
        self.delays.append(late_ms + DECODE_MS + step_ms + SEND_MS)
        for hop in np.array_split(audio, self.hops):
            self._detector.heard(hop, 1)
            speaking = self._detector.speaking
            if not speaking and len(self.voiced) and self.voiced[-1]:
                for back in range(1, HANGOVER):
                    self.voiced[-back] = False
            self.voiced.append(speaking)

    def heard_at(self, hop: int) -> float:
        """When a hop of the output begins to be heard, in ms of the session."""
        tick = hop // self.hops
        return (tick + 1) * self.tick_ms + self.delays[tick] + (hop % self.hops) * HOP_MS

    def answering(self, moment_ms: float) -> int:
        """The first hop of the output of the tick that took in what was said at this moment."""
        return math.floor(round(moment_ms / self.tick_ms, 6)) * self.hops


@dataclass(frozen=True)
class Talk:
    """One session: when somebody spoke in it, and what the model's voice did."""

    utterances: Sequence[Utterance]
    voice: Voice


def hesitation(talks: Sequence[Talk]) -> dict[str, Any]:
    """For each labelled end of speech, the ms of the model's output that stay silent before it speaks: from the start
    of the tick that heard the end to the first voiced hop. Ends at which the model was speaking already, and ends that
    it did not answer before the next utterance (or the session's end), are counted and have no time.
    """
    times: list[float] = []
    ends = already = unanswered = 0
    for talk in talks:
        voice = talk.voice
        following = [*(u.start for u in talk.utterances), math.inf][1:]
        for utterance, after in zip(talk.utterances, following, strict=True):
            first = voice.answering(1000 * utterance.end)
            last = len(voice.voiced) if after == math.inf else min(len(voice.voiced), voice.answering(1000 * after))
            if first >= len(voice.voiced):
                continue  # it ended in the very last moment: no tick took it in
            ends += 1
            if first and voice.voiced[first - 1] and voice.voiced[first]:
                already += 1
                continue
            answer = next((hop for hop in range(first, last) if voice.voiced[hop]), None)
            if answer is None:
                unanswered += 1
            else:
                times.append((answer - first) * HOP_MS)
    counts = {"ends": ends, "already_speaking": already, "unanswered": unanswered}
    return {**counts, **_figures(times)}


def _figures(times: Sequence[float]) -> dict[str, Any]:
    if times:
        return as_dict(spread(times))
    return {"count": 0, "p50": None, "p95": None, "p99": None, "max": None, "mean": None, "jitter": None}


def stop_latency(talks: Sequence[Talk]) -> dict[str, Any]:
    """For each utterance that begins while the model is heard to speak, the ms from its start until nothing more of
    that voice is heard. A trial counts as stopped when that is before the utterance's end.
    """
    times: list[float] = []
    trials = 0
    for talk in talks:
        voice = talk.voice
        for utterance in talk.utterances:
            start, end = 1000 * utterance.start, 1000 * utterance.end
            heard = _heard(voice, start)
            if heard is None or not voice.voiced[heard]:
                continue
            trials += 1
            silent = next((hop for hop in range(heard, len(voice.voiced)) if not voice.voiced[hop]), None)
            if silent is not None and voice.heard_at(silent) <= end:
                times.append(voice.heard_at(silent) - start)
    percentiles = spread(times) if times else None
    return {
        "trials": trials,
        "stopped": len(times),
        "p50_ms": percentiles.p50 if percentiles else None,
        "p95_ms": percentiles.p95 if percentiles else None,
        "max_ms": percentiles.max if percentiles else None,
    }


def _heard(voice: Voice, moment_ms: float) -> int | None:
    """The hop of the output that is heard at this moment; None before the first one and after the last one."""
    for hop in range(len(voice.voiced) - 1, -1, -1):
        if voice.heard_at(hop) <= moment_ms:
            return hop if moment_ms < voice.heard_at(hop) + HOP_MS or hop + 1 < len(voice.voiced) else None
    return None
