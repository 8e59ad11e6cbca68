"""The tick: 200 ms of input in, 200 ms of output out, for interaction models and for plain token models.

One tick of an interaction model appends, in this order, and nothing else:

1. `audio_in` positions of what was heard, a video clip when one came (at most every `video_every` ticks),
   and up to `text_in` typed tokens. The hidden state of the last of them chooses the first token.
2. While the chosen token is text and fewer than `text_out` were chosen: that token; its hidden state
   chooses the next.
3. The last chosen token (unless it is <end_of_tick> itself), <end_of_tick>, and the model's own last
   `hop` samples. The hidden state there speaks output position 0; then, for each further position, the
   samples just spoken.

A tick in which <silence> was chosen skips the flow head and vocodes constant frames; all positions are
appended just the same, so the context cannot tell how silence was made. What the model hears of itself is
what was handed out, held to [-1, 1]. Random numbers are keyed by (seed, tick, output): outputs
0..text_out-1 are the tokens, output text_out + j is audio position j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from time import perf_counter_ns

import numpy as np

from tmlc.errors import InputError, KernelError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core.model import Model
from tmlc.runtimes.core.text import TextDecoder

MAX_QUEUED_TOKENS = 1 << 16


@dataclass(slots=True)
class TickInput:
    """What one tick brings.

    Attributes:
        audio: float32 mono, at most one tick of samples; fewer are padded with silence, None is all
        silence.
        video: uint8 [frames, height, width, 3], one frame or a whole clip; None for no video.
        text: typed text, appended after what is still queued.
        tokens: token ids, appended after the text.
    """

    audio: np.ndarray | None = None
    video: np.ndarray | None = None
    text: str | None = None
    tokens: Sequence[int] = ()


@dataclass(slots=True)
class TickOutput:
    """What one tick gives.

    Attributes:
        index: the number of the tick, from 0.
        tokens: every token chosen, <silence> and <end_of_tick> included.
        text: the text that these tokens complete.
        audio: float32 [samples of one tick] in -1..1, owned by the caller; empty for a token model.
        timings: milliseconds by stage: each method called, "first_audio" (from the start of the step to
            the first output samples), "total" (the step), "wait" (for the device, not part of the step).
        stats: "appended" positions of this tick, "positions" in all, "silent", "queued_tokens" left over,
            "padded_samples", "dropped_clips".
    """

    index: int
    tokens: list[int]
    text: str
    audio: np.ndarray
    timings: dict[str, float]
    stats: dict[str, int]


@dataclass(slots=True)
class Conversation:
    """What a session remembers beside its slot; with the slot it is all of the session's memory."""

    seed: int
    temperature: float
    heard: np.ndarray
    hidden: np.ndarray
    decoder: TextDecoder | None
    tick: int = 0
    positions: int = 0
    last_clip: int | None = None
    queue: deque[int] = field(default_factory=deque)


@dataclass(slots=True)
class Staged:
    """A checked TickInput in the session's own buffers."""

    pcm: np.ndarray
    samples: int = 0
    clip: np.ndarray | None = None
    tokens: list[int] = field(default_factory=list)
    padded: int = 0


class Driver(ABC):
    """Runs ticks of one kind of model. Shared by the sessions of an engine; the caller holds the device."""

    def __init__(self, model: Model) -> None:
        self.model, self.layout = model, model.layout

    @abstractmethod
    def tick(self, slot: np.ndarray, talk: Conversation, staged: Staged) -> TickOutput:
        """One tick. `talk` changes with the slot; after an error neither may be used again."""

    def _finish(
        self, talk: Conversation, begun: int, first: int, tokens: list[int], audio: np.ndarray, **stats: int
    ) -> TickOutput:
        now, model = perf_counter_ns(), self.model
        timings = {name: ns / 1e6 for name, ns in model.times.items() if ns}
        if audio.size:
            timings["first_audio"] = (first - begun) / 1e6
        timings["total"] = (now - begun) / 1e6
        text = talk.decoder.push(tokens) if talk.decoder is not None else ""
        stats |= {
            "appended": model.appended,
            "positions": talk.positions,
            "queued_tokens": len(talk.queue),
        }
        out = TickOutput(talk.tick, tokens, text, audio, timings, stats)
        talk.tick += 1
        return out


class InteractionDriver(Driver):
    """Ticks as the head of this file describes them."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        layout = self.layout
        frames = layout.audio_out * layout.frames_per_position
        self._silence = np.full((frames, layout.n_mel), layout.silence_level, np.float32)
        self._spoken = np.zeros((layout.audio_out, model.hop), np.float32)
        self._stops = {layout.silence_token_id, layout.end_of_tick_token_id}

    def tick(self, slot: np.ndarray, talk: Conversation, staged: Staged) -> TickOutput:
        begun, model, layout = perf_counter_ns(), self.model, self.layout
        model.reset_times()
        model.begin(slot)
        model.put_audio(staged.pcm)
        dropped = 0
        if staged.clip is not None:
            if talk.last_clip is None or talk.tick - talk.last_clip >= layout.video_every:
                model.put_video(staged.clip)
                talk.last_clip = talk.tick
            else:
                dropped = 1
        talk.queue.extend(staged.tokens)
        model.put_text([talk.queue.popleft() for _ in range(min(layout.text_in, len(talk.queue)))])
        tokens = self._choose(talk, model.flush())
        silent = layout.silence_token_id in tokens
        tail = [layout.end_of_tick_token_id]
        if tokens and tokens[-1] != tail[0]:
            tail.insert(0, tokens[-1])
        model.put_text(tail)
        audio = np.empty((layout.audio_out, model.hop), np.float32)
        if not layout.audio_out:
            model.flush()
            first = begun
        else:
            first = self._keep_silent(talk, audio) if silent else self._speak(talk, audio)
            if not np.isfinite(audio).all():
                raise KernelError("the model spoke a sample that is not a number", where=f"tick {talk.tick}")
        talk.positions += model.appended
        return self._finish(
            talk,
            begun,
            first,
            tokens,
            audio.reshape(-1),
            silent=int(silent),
            padded_samples=staged.padded,
            dropped_clips=dropped,
        )

    def _choose(self, talk: Conversation, hidden: np.ndarray) -> list[int]:
        """The tokens of this tick; all but the last are appended already."""
        tokens: list[int] = []
        for output in range(self.layout.text_out):
            if tokens:
                self.model.put_text(tokens[-1:])
                hidden = self.model.flush()
            tokens.append(self.model.next_token(hidden, (talk.seed, talk.tick, output), talk.temperature))
            if tokens[-1] in self._stops:
                break
        return tokens

    def _speak(self, talk: Conversation, audio: np.ndarray) -> int:
        """Speaks the output positions, each hearing the one before. Returns when the first samples came."""
        model, first = self.model, 0
        for j in range(self.layout.audio_out):
            model.put_speech(audio[j - 1 : j] if j else talk.heard)
            mel = model.speak(model.flush(), (talk.seed, talk.tick, self.layout.text_out + j))
            model.vocode(mel, audio[j : j + 1])
            first = first or perf_counter_ns()
        talk.heard[:] = audio[-1:]
        return first

    def _keep_silent(self, talk: Conversation, audio: np.ndarray) -> int:
        """The same positions in one append: what silence sounds like is known before it is heard."""
        model = self.model
        model.vocode(self._silence, audio)
        first = perf_counter_ns()
        self._spoken[0], self._spoken[1:] = talk.heard[0], audio[:-1]
        model.put_speech(self._spoken)
        model.flush()
        talk.heard[:] = audio[-1:]
        return first


class TokenDriver(Driver):
    """A plain token model: a tick appends what came (audio, a clip, tokens, in this order), then decodes
    up to `text_out` more tokens and appends each.

    Stops early after an end-of-sequence token; that token is part of the context and of the output.
    """

    def tick(self, slot: np.ndarray, talk: Conversation, staged: Staged) -> TickOutput:
        begun, model = perf_counter_ns(), self.model
        model.reset_times()
        model.begin(slot)
        if staged.samples:
            model.put_audio(staged.pcm)
        if staged.clip is not None:
            model.put_video(staged.clip)
        model.put_text(staged.tokens)
        came = staged.samples or staged.clip is not None or staged.tokens
        hidden = model.flush() if came else talk.hidden
        tokens: list[int] = []
        for output in range(self.layout.text_out):
            tokens.append(model.next_token(hidden, (talk.seed, talk.tick, output), talk.temperature))
            model.put_text(tokens[-1:])
            hidden = model.flush()
            if tokens[-1] in self.layout.eos_token_ids:
                break
        talk.hidden[:] = hidden
        talk.positions += model.appended
        nothing = np.zeros(0, np.float32)
        return self._finish(
            talk, begun, begun, tokens, nothing, silent=int(not tokens),
            padded_samples=staged.padded if staged.samples else 0, dropped_clips=0,
        )


DRIVERS: dict[str, type[Driver]] = {"interaction": InteractionDriver, "tokens": TokenDriver}


def check_tokens(tokens: Sequence[int], vocab: int) -> list[int]:
    """Token ids as a list. Raises InputError for anything that is not a whole number in the vocabulary."""
    out = []
    try:
        for token in tokens:
            value = index(token)
            if not 0 <= value < vocab:
                raise InputError(f"token {value} is not in the vocabulary (0 to {vocab - 1})")
            out.append(value)
    except TypeError:
        form = type(tokens).__name__
        raise InputError(f"tokens must be a sequence of whole numbers, not this {form}") from None
    return out


def check_audio(audio: np.ndarray, layout: TickLayout) -> np.ndarray:
    """`audio`, once it is known to be finite float32 samples in one dimension; InputError otherwise."""
    if not layout.audio_in:
        raise InputError("this model does not hear: it takes no audio")
    if not isinstance(audio, np.ndarray) or audio.dtype != np.float32 or audio.ndim != 1:
        form = f"{audio.dtype}{list(audio.shape)}" if isinstance(audio, np.ndarray) else type(audio).__name__
        raise InputError(
            f"audio must be a one-dimensional float32 array, not {form}",
            fix=f"give mono samples at {layout.sample_rate} Hz between -1 and 1 as numpy.float32",
        )
    if not np.isfinite(audio).all():
        raise InputError("audio holds samples that are not finite numbers")
    return audio


def check_video(video: np.ndarray, layout: TickLayout) -> np.ndarray:
    """`video`, once it is known to be whole frames of the model's size; InputError otherwise."""
    if not layout.video_positions:
        raise InputError("this model does not see: it takes no video")
    size = (layout.frame_height, layout.frame_width, 3)
    if (
        not isinstance(video, np.ndarray)
        or video.dtype != np.uint8
        or video.ndim != 4
        or video.shape[1:] != size
        or not video.shape[0]
    ):
        form = f"{video.dtype}{list(video.shape)}" if isinstance(video, np.ndarray) else type(video).__name__
        raise InputError(f"video must be uint8 [frames, {size[0]}, {size[1]}, 3], not {form}")
    return video


def finite_temperature(temperature: float) -> float:
    """A sampling temperature as float; InputError unless it is 0 (arg-max) or a positive finite number."""
    if not isinstance(temperature, int | float | np.floating) or not 0.0 <= temperature < 1e6:
        raise InputError(f"temperature must be 0 or a positive number, not {temperature!r}")
    return float(temperature)
