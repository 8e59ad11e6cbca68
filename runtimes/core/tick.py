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

Before all of that stand the `inject`ed tokens of the tick, which nobody hears. A tick with `say` does not choose: it
says these tokens.

A tick that was **missed** is taken in without an answer: its input, then <silence>, <end_of_tick> and the model's own
silence, which are the positions of a tick in which <silence> was chosen. Nothing is decoded for it, so that all missed
ticks and the input of the newest one go through the model in calls as wide as `max_append` allows.

A driver runs the tick of a batch of sessions in lock-step: each step above is one call for all sessions that take it.
A session that has chosen its last token, or has nothing to say, sits out the calls that are not its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from time import perf_counter_ns

import numpy as np

from tmlc.errors import InputError, KernelError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core.chains import Key
from tmlc.runtimes.core.model import Model
from tmlc.runtimes.core.slots import Slot
from tmlc.runtimes.core.text import TextDecoder, Tokenizer

MAX_QUEUED_TOKENS = 1 << 16
MAX_INJECTED = 64
"""Positions that may be injected into one session at one edge; the rest waits for the next edge."""
MAX_MISSED = 64
"""Ticks that can be caught up at once."""
_WILD = "close it, and open a new session or restore a snapshot; if it comes again, compile with --precision fp32"


@dataclass(slots=True)
class TickInput:
    """What one tick brings.

    Attributes:
        audio: float32 mono, at most one tick of samples; fewer are padded with silence, None is all
        silence.
        video: uint8 [frames, height, width, 3], one frame or a whole clip; None for no video.
        text: typed text, appended after what is still queued.
        tokens: token ids, appended after the text.
        inject: token ids, at most `MAX_INJECTED`, appended before everything else of this tick.
        say: token ids, at most `text_out`, that this tick says in place of those that the model would choose; without
        <silence>, and without <end_of_tick>, which follows by itself.
    """

    audio: np.ndarray | None = None
    video: np.ndarray | None = None
    text: str | None = None
    tokens: Sequence[int] = ()
    inject: Sequence[int] = ()
    say: Sequence[int] = ()


@dataclass(slots=True)
class TickOutput:
    """What one tick gives.

    Attributes:
        index: the number of the tick, from 0.
        tokens: every token chosen, <silence> and <end_of_tick> included.
        text: the text that these tokens complete.
        audio: float32 [samples of one tick] in -1..1, owned by the caller; empty for a token model.
        timings: milliseconds by stage: each method called, "first_audio" (from the start of the step to
            the first output samples), "total" (the step), "wait" (for the device, not part of the step). All but
            "first_audio" are those of the whole batch: its calls are shared.
        stats: "appended" positions of this tick, "positions" in all, "silent", "queued_tokens" left over,
            "padded_samples", "dropped_clips", "batch" (sessions that were ticked together), "collapsed" (missed ticks
            before this one that were taken in with it; "appended", "padded_samples" and "dropped_clips" count theirs
            too).
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

    def copy(self, tokenizer: Tokenizer | None) -> Conversation:
        """The same memory again; `tokenizer` is the one that made the decoder."""
        decoder = tokenizer.decoder(self.decoder.state()) if tokenizer and self.decoder else None
        again = replace(self, heard=self.heard.copy(), hidden=self.hidden.copy(), decoder=decoder)
        again.queue = self.queue.copy()
        return again


@dataclass(frozen=True, slots=True)
class Tokens:
    """The checked tokens of a TickInput: typed ones (of its text, then its own), to inject, to say."""

    typed: list[int]
    inject: list[int]
    say: list[int]


@dataclass(slots=True)
class Staged:
    """A checked TickInput in the session's own buffers."""

    pcm: np.ndarray
    samples: int = 0
    clip: np.ndarray | None = None
    tokens: list[int] = field(default_factory=list)
    padded: int = 0
    inject: list[int] = field(default_factory=list)
    say: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """One session's part of a batch, and what its tick gives so far."""

    slot: Slot
    talk: Conversation
    staged: Staged
    missed: list[Staged] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    audio: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    first: int = 0
    dropped: int = 0

    def key(self, output: int) -> Key:
        return self.talk.seed, self.talk.tick, output


class Driver(ABC):
    """Runs ticks of one kind of model. Shared by the sessions of an engine; the caller holds the device."""

    def __init__(self, model: Model, sessions: int) -> None:
        self.model, self.layout = model, model.layout

    def tick(self, jobs: Sequence[Job]) -> list[TickOutput | Exception]:
        """One tick of each session: its output, or the error that ended it.

        A conversation changes with its slot; after an error neither may be used again.
        """
        begun, model = perf_counter_ns(), self.model
        results: list[TickOutput | Exception] = []
        model.begin([job.slot for job in jobs])
        try:
            self._run(jobs)
            for s in model.present:
                if not np.isfinite(jobs[s].audio).all():
                    where = f"tick {jobs[s].talk.tick}"
                    what = "the model spoke a sample that is not a number"
                    model.leave(s, KernelError(what, where=where, fix=_WILD))
        except Exception as error:  # of a call that all of them shared, or of the last session that was left
            return [model.failed.get(s, error) for s in range(len(jobs))]
        now = perf_counter_ns()
        for s in range(len(jobs)):
            try:
                results.append(model.failed.get(s) or self._finish(s, jobs, begun, now))
            except Exception as error:  # of the tokenizer, over what this session has said
                results.append(error)
        return results

    @abstractmethod
    def _run(self, jobs: Sequence[Job]) -> None:
        """The steps of the tick, for the sessions that are present."""

    def _choose(self, jobs: Sequence[Job], sessions: Sequence[int], output: int) -> None:
        """Chooses the next token of each of `sessions`."""
        asked = [(s, jobs[s].key(output), jobs[s].talk.temperature) for s in sessions]
        for s, token in self.model.next_token(asked):
            jobs[s].tokens.append(token)

    def _finish(self, s: int, jobs: Sequence[Job], begun: int, now: int) -> TickOutput:
        job, model = jobs[s], self.model
        talk, tokens = job.talk, job.tokens
        timings = {name: ns / 1e6 for name, ns in model.times.items() if ns}
        if job.audio.size:
            timings["first_audio"] = (job.first - begun) / 1e6
        timings["total"] = (now - begun) / 1e6
        text = talk.decoder.push(tokens) if talk.decoder is not None else ""
        talk.positions += model.appended[s]
        stats = {
            "silent": int(self._silent(tokens)),
            "padded_samples": job.staged.padded + sum(staged.padded for staged in job.missed),
            "dropped_clips": job.dropped,
            "collapsed": len(job.missed),
            "appended": model.appended[s],
            "positions": talk.positions,
            "queued_tokens": len(talk.queue),
            "batch": len(jobs),
        }
        out = TickOutput(talk.tick, tokens, text, job.audio.reshape(-1), timings, stats)
        talk.tick += 1
        return out

    @abstractmethod
    def _silent(self, tokens: list[int]) -> bool:
        """Did a session that chose these tokens say nothing?"""


class InteractionDriver(Driver):
    """Ticks as the head of this file describes them."""

    def __init__(self, model: Model, sessions: int) -> None:
        super().__init__(model, sessions)
        layout = self.layout
        frames = layout.frames_per_position
        self._quiet = np.full((layout.audio_out * frames, layout.n_mel), layout.silence_level, np.float32)
        self._mel = np.zeros((sessions, frames, layout.n_mel), np.float32)
        self._spoken = np.zeros((sessions, layout.audio_out, model.hop), np.float32)
        self._stops = {layout.silence_token_id, layout.end_of_tick_token_id}

    def _run(self, jobs: Sequence[Job]) -> None:
        model, layout = self.model, self.layout
        self._catch_up(jobs)
        self._take_in(jobs, [(s, job.staged) for s, job in enumerate(jobs)])
        model.flush()
        for job in jobs:
            job.tokens = list(job.staged.say)
        choosing = [s for s in model.present if not jobs[s].tokens]
        for output in range(layout.text_out if choosing else 0):
            if output:
                model.put_text([(s, jobs[s].tokens[-1:]) for s in choosing])
                model.flush()
            choosing = [s for s in choosing if s not in model.failed]
            self._choose(jobs, choosing, output)
            choosing = [s for s in choosing if jobs[s].tokens[-1] not in self._stops]
            if not choosing:
                break
        model.put_text([(s, self._tail(jobs[s])) for s in model.present])
        if layout.audio_out:
            self._speak(jobs)
        else:
            model.flush()

    def _catch_up(self, jobs: Sequence[Job]) -> None:
        """Stages the missed ticks, oldest first, each as a tick in which <silence> was chosen; decodes only what is
        more than one call takes."""
        model, layout = self.model, self.layout
        late = [s for s, job in enumerate(jobs) if job.missed]
        spoken = {s: np.empty((len(jobs[s].missed) * layout.audio_out, model.hop), np.float32) for s in late}
        if layout.audio_out:
            model.vocode([(s, np.tile(self._quiet, (len(jobs[s].missed), 1)), spoken[s]) for s in late])
        for n in range(max((len(jobs[s].missed) for s in late), default=0)):
            late = [s for s in late if n < len(jobs[s].missed)]
            self._take_in(jobs, [(s, jobs[s].missed[n]) for s in late])
            model.put_text([(s, [layout.silence_token_id, layout.end_of_tick_token_id]) for s in late])
            if layout.audio_out:
                own = {s: spoken[s][n * layout.audio_out : (n + 1) * layout.audio_out] for s in late}
                model.put_speech([(s, np.concatenate([jobs[s].talk.heard, own[s][:-1]])) for s in late])
                for s in late:
                    jobs[s].talk.heard[:] = own[s][-1:]
            for s in late:
                jobs[s].talk.tick += 1

    def _take_in(self, jobs: Sequence[Job], arrived: Sequence[tuple[int, Staged]]) -> None:
        """Stages one tick's input of some sessions."""
        model = self.model
        model.put_text([(s, staged.inject) for s, staged in arrived if staged.inject])
        model.put_audio([(s, staged.pcm) for s, staged in arrived])
        model.put_video([(s, clip) for s, staged in arrived if (clip := self._clip(jobs[s], staged)) is not None])
        model.put_text([(s, self._typed(jobs[s], staged)) for s, staged in arrived])

    def _typed(self, job: Job, staged: Staged) -> list[int]:
        """The typed tokens that this tick takes off the session's queue."""
        queue = job.talk.queue
        queue.extend(staged.tokens)
        return [queue.popleft() for _ in range(min(self.layout.text_in, len(queue)))]

    def _clip(self, job: Job, staged: Staged) -> np.ndarray | None:
        """The clip of this tick, unless it comes too soon after the last one."""
        talk = job.talk
        if staged.clip is None:
            return None
        if talk.last_clip is not None and talk.tick - talk.last_clip < self.layout.video_every:
            job.dropped += 1
            return None
        talk.last_clip = talk.tick
        return staged.clip

    def _tail(self, job: Job) -> list[int]:
        """What ends the tick's text: what of it is not yet appended (all that the tick was given to say; else the last
        token, unless it is <end_of_tick>), and <end_of_tick>."""
        end, tokens = self.layout.end_of_tick_token_id, job.tokens
        if job.staged.say:
            return [*tokens, end]
        return [end] if not tokens or tokens[-1] == end else [tokens[-1], end]

    def _silent(self, tokens: list[int]) -> bool:
        return self.layout.silence_token_id in tokens

    def _speak(self, jobs: Sequence[Job]) -> None:
        """The output positions. Who speaks hears each before the next; who is silent appends all of them with the first
        one of the others, because what silence sounds like is known before it is heard."""
        model, layout = self.model, self.layout
        for s in model.present:
            jobs[s].audio = np.empty((layout.audio_out, model.hop), np.float32)
        silent = [s for s in model.present if self._silent(jobs[s].tokens)]
        speaking = [s for s in model.present if s not in silent]
        self._vocode(jobs, [(s, self._quiet, jobs[s].audio) for s in silent])
        for j in range(layout.audio_out):
            heard = [(s, jobs[s].audio[j - 1 : j] if j else jobs[s].talk.heard) for s in speaking]
            if j == 0:
                for s in silent:
                    self._spoken[s, 0], self._spoken[s, 1:] = jobs[s].talk.heard[0], jobs[s].audio[:-1]
                heard += [(s, self._spoken[s]) for s in silent]
            model.put_speech(heard)
            model.flush()
            speaking = [s for s in speaking if s not in model.failed]
            if not speaking:
                break
            model.speak([(s, jobs[s].key(layout.text_out + j)) for s in speaking], self._mel)
            self._vocode(jobs, [(s, self._mel[s], jobs[s].audio[j : j + 1]) for s in speaking])
        for s in model.present:
            jobs[s].talk.heard[:] = jobs[s].audio[-1:]

    def _vocode(self, jobs: Sequence[Job], pieces: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        self.model.vocode(pieces)
        now = perf_counter_ns()
        for s, _, _ in pieces:
            jobs[s].first = jobs[s].first or now


class TokenDriver(Driver):
    """A plain token model: a tick appends what came (injected tokens, audio, a clip, tokens, in this order), then
    decodes up to `text_out` more tokens and appends each, or those that it was given to say. What came to missed ticks
    is appended before, and nothing is decoded for it.

    Stops early after an end-of-sequence token; that token is part of the context and of the output.
    """

    def _run(self, jobs: Sequence[Job]) -> None:
        model = self.model
        for s, job in enumerate(jobs):
            model.hidden[s] = job.talk.hidden[0]
            job.tokens = list(job.staged.say)
        for n in range(max(len(job.missed) for job in jobs)):
            self._take_in([(s, job.missed[n]) for s, job in enumerate(jobs) if n < len(job.missed)])
        self._take_in([(s, job.staged) for s, job in enumerate(jobs)])
        model.put_text([(s, job.tokens) for s, job in enumerate(jobs) if job.tokens])
        model.flush()
        for job in jobs:
            job.talk.tick += len(job.missed)
        choosing = [s for s in model.present if not jobs[s].tokens]
        ended = self.layout.eos_token_ids
        for output in range(self.layout.text_out if choosing else 0):
            self._choose(jobs, choosing, output)
            model.put_text([(s, jobs[s].tokens[-1:]) for s in choosing])
            model.flush()
            choosing = [s for s in choosing if s not in model.failed and jobs[s].tokens[-1] not in ended]
        for s in model.present:
            jobs[s].talk.hidden[0] = model.hidden[s]

    def _take_in(self, arrived: Sequence[tuple[int, Staged]]) -> None:
        """Stages one tick's input of some sessions."""
        model = self.model
        model.put_text([(s, staged.inject) for s, staged in arrived if staged.inject])
        model.put_audio([(s, staged.pcm) for s, staged in arrived if staged.samples])
        model.put_video([(s, staged.clip) for s, staged in arrived if staged.clip is not None])
        model.put_text([(s, staged.tokens) for s, staged in arrived])

    def _silent(self, tokens: list[int]) -> bool:
        return not tokens


DRIVERS: dict[str, type[Driver]] = {"interaction": InteractionDriver, "tokens": TokenDriver}


def check_tokens(tokens: Sequence[int], vocab: int) -> list[int]:
    """Token ids as a list. Raises InputError for anything that is not a whole number in the vocabulary."""
    out = []
    try:
        for token in tokens:
            value = index(token)
            if not 0 <= value < vocab:
                raise InputError(
                    f"token {value} is not in the vocabulary (0 to {vocab - 1})",
                    fix="give ids of the tokenizer of this model's checkpoint",
                )
            out.append(value)
    except TypeError:
        form = type(tokens).__name__
        raise InputError(
            f"tokens must be a sequence of whole numbers, not this {form}",
            fix="give a list of ids, such as engine.tokenizer.encode makes of a text",
        ) from None
    return out


def check_reads(kind: str, layout: TickLayout) -> None:
    """Raises InputError for a model of `kind` that takes no typed text."""
    if kind == "interaction" and not layout.text_in:
        raise InputError("this model does not read: it takes no text", fix="give it audio instead")


def check_audio(audio: np.ndarray, layout: TickLayout) -> np.ndarray:
    """`audio`, once it is known to be finite float32 samples in one dimension; InputError otherwise."""
    if not layout.audio_in:
        raise InputError("this model does not hear: it takes no audio", fix="give it text or tokens instead")
    if not isinstance(audio, np.ndarray) or audio.dtype != np.float32 or audio.ndim != 1:
        form = f"{audio.dtype}{list(audio.shape)}" if isinstance(audio, np.ndarray) else type(audio).__name__
        raise InputError(
            f"audio must be a one-dimensional float32 array, not {form}",
            fix=f"give mono samples at {layout.sample_rate} Hz between -1 and 1 as numpy.float32",
        )
    if not np.isfinite(audio).all():
        raise InputError(
            "audio holds samples that are not finite numbers", fix="put zeros in their place (numpy.nan_to_num)"
        )
    return audio


def check_video(video: np.ndarray, layout: TickLayout) -> np.ndarray:
    """`video`, once it is known to be whole frames of the model's size; InputError otherwise."""
    if not layout.video_positions:
        raise InputError("this model does not see: it takes no video", fix="leave the video out")
    size = (layout.frame_height, layout.frame_width, 3)
    if (
        not isinstance(video, np.ndarray)
        or video.dtype != np.uint8
        or video.ndim != 4
        or video.shape[1:] != size
        or not video.shape[0]
    ):
        form = f"{video.dtype}{list(video.shape)}" if isinstance(video, np.ndarray) else type(video).__name__
        raise InputError(
            f"video must be uint8 [frames, {size[0]}, {size[1]}, 3], not {form}",
            fix=f"scale RGB pictures to {size[1]} × {size[0]} pixels and numpy.stack them, one alone too",
        )
    return video


def finite_temperature(temperature: float) -> float:
    """A sampling temperature as float; InputError unless it is 0 (arg-max) or a positive finite number."""
    if not isinstance(temperature, int | float | np.floating) or not 0.0 <= temperature < 1e6:
        raise InputError(
            f"temperature must be 0 or a positive number, not {temperature!r}",
            fix="give 0 for the most likely token each time, or 1 to draw as the model predicts",
        )
    return float(temperature)


def whole_seed(seed: int) -> int:
    """A seed as int; InputError unless it is a whole number from 0 to 2⁶³-1."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(
            f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}",
            fix="give such a number, or leave it out for 0",
        )
    return int(seed)
