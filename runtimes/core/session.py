"""One conversation on an engine: its slot, what it remembers beside it, and the states it goes through.

NEW ──append/tick──▶ OPEN ◀──attach/detach──▶ DETACHED
 any ──close──▶ CLOSING (while a call still runs) ──▶ CLOSED
 a kernel error in a call ──▶ POISONED ──close──▶ CLOSED        context used up ──▶ CLOSED
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import ContextFullError, InputError, SessionError
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.snapshot import write_snapshot
from tmlc.runtimes.core.tick import (
    MAX_INJECTED,
    MAX_MISSED,
    MAX_QUEUED_TOKENS,
    Conversation,
    Staged,
    TickInput,
    TickOutput,
    Tokens,
    check_audio,
    check_reads,
    check_tokens,
    check_video,
)

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

LogSink = Callable[[dict[str, Any]], None]


class SessionState(StrEnum):
    """Where a session is in its life."""

    NEW = "new"
    OPEN = "open"
    DETACHED = "detached"
    CLOSING = "closing"
    CLOSED = "closed"
    POISONED = "poisoned"


class Session:
    """Made by `Engine.session`, `Engine.restore` and `fork`. One call at a time; many sessions may run at
    once.

    A call with bad arguments raises InputError and changes nothing. A session that is garbage-collected
    gives its slot back as if it had been closed.

    Attributes:
        engine: the engine that it runs on.
        index: the number of its slot.
    """

    def __init__(self, engine: Engine, index: int, talk: Conversation, log: LogSink | None) -> None:
        self.engine = engine
        self._talk, self._log = talk, log
        self.index, self._slot = index, engine.slots.handle(index)
        self._release = weakref.finalize(self, engine.slots.give_back, index)
        self._release.atexit = False
        self._lock = threading.Lock()
        self._busy = False
        self._state = SessionState.OPEN if talk.positions else SessionState.NEW
        layout = engine.model.layout
        self._pcm = np.zeros((layout.audio_in, layout.hop), np.float32)
        clip = (layout.clip_frames, layout.frame_height, layout.frame_width * 3)
        self._clip = np.zeros(clip if layout.video_positions else (0, 0, 0), np.uint8)
        if log is not None:
            log(ticklog.opened(engine.digest, talk.seed, talk.temperature, talk.tick, talk.positions))

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def seed(self) -> int:
        return self._talk.seed

    @property
    def ticks(self) -> int:
        """Ticks done so far, which is the index of the next one."""
        return self._talk.tick

    @property
    def positions(self) -> int:
        """Positions appended so far."""
        return self._talk.positions

    def __repr__(self) -> str:
        return f"<Session {self._state} seed={self.seed} ticks={self.ticks} positions={self.positions}>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def append(
        self,
        tokens: Sequence[int] = (),
        audio: np.ndarray | None = None,
        video: np.ndarray | None = None,
        logits: str = "all",
    ) -> np.ndarray:
        """Appends positions outside a tick: audio first, then video, then tokens.

        Args:
            tokens: token ids.
            audio: float32 mono at the model's rate, a whole number of positions (`hop` samples each).
            video: uint8 [frames, height, width, 3], a whole number of clips.
            logits: of which positions: "all", "last" or "none". Only these are computed.

        Returns:
            float32 [positions, vocab]: the logits at each position asked for.

        Raises:
            InputError: wrong shape, dtype or range; nothing was changed.
            SessionError: the session is not open, or another call of it is running.
            ContextFullError: the bounded context is used up and the policy is `end`; the session is
            closed.
            KernelError: a kernel stopped; the session is poisoned.
        """
        model, layout = self.engine.model, self.engine.model.layout
        ids = check_tokens(tokens, model.vocab)
        pcm = None if audio is None else self._whole_positions(check_audio(audio, layout))
        clips = None if video is None else self._whole_clips(check_video(video, layout))
        count = len(ids) + (0 if pcm is None else pcm.shape[0])
        if clips is not None:
            count += clips.shape[0] // (layout.clip_frames * layout.frame_height) * layout.video_positions
        if not count:
            raise InputError(
                "append needs at least one position of tokens, audio or video",
                fix="give one of them, or call tick() for a tick without input",
            )
        if logits not in _LOGITS:
            raise InputError(
                f"logits must be one of {', '.join(_LOGITS)}, not {logits!r}", fix="leave it out for all positions"
            )
        wanted = _LOGITS[logits](count)
        out = np.empty((wanted, model.vocab), np.float32)
        done = 0

        def sink(hidden: np.ndarray) -> None:
            nonlocal done
            model.logits(hidden, out[done : done + hidden.shape[0]])
            done += hidden.shape[0]

        with self._running(), self.engine.device():
            model.begin([self._slot], sink if logits == "all" else None)
            if pcm is not None:
                model.put_audio([(0, pcm)])
            if clips is not None:
                model.put_video([(0, clips)])
            model.put_text([(0, ids)])
            model.flush()
            self._talk.hidden[0] = model.hidden[0]
            if logits == "last":
                model.logits(self._talk.hidden, out)
            self._talk.positions += model.appended[0]
        if self._log is not None:
            self._log(ticklog.appended(ids, audio, video))
        return out

    def _whole_positions(self, audio: np.ndarray) -> np.ndarray:
        hop = self.engine.model.hop
        if audio.size % hop:
            raise InputError(
                f"audio must be a whole number of positions of {hop} samples, not {audio.size}",
                fix=f"keep the last {audio.size % hop} for the next append, or add {-audio.size % hop} zeros",
            )
        return np.require(audio, requirements=["C", "A"]).reshape(-1, hop)

    def _whole_clips(self, video: np.ndarray) -> np.ndarray:
        layout = self.engine.model.layout
        if video.shape[0] % layout.clip_frames:
            raise InputError(
                f"video must be whole clips of {layout.clip_frames} frames, not {video.shape[0]}",
                fix="keep the last frames for the next append, or repeat the last one until its clip is whole",
            )
        return np.ascontiguousarray(video).reshape(-1, layout.frame_width * 3)

    def tick(self, tick: TickInput | None = None) -> TickOutput:
        """One tick: 200 ms of input in, 200 ms of output out (see `tmlc.runtimes.core.tick`).

        Raises what `append` raises, in the same cases. Several sessions: `Engine.tick_batch`.
        """
        (result,) = self.engine.tick_batch([self], [tick])
        if isinstance(result, Exception):
            raise result
        return result

    def _check(self, ticks: Sequence[TickInput]) -> list[Tokens]:
        """Checks the inputs of missed ticks and, the last one, of the tick to run; returns their tokens."""
        layout, kind = self.engine.model.layout, self.engine.kind
        if len(ticks) - 1 > MAX_MISSED:
            raise InputError(
                f"at most {MAX_MISSED} missed ticks are caught up at once, not {len(ticks) - 1}",
                fix="run the oldest of them first, in a tick_batch of their own",
            )
        if len(ticks) > 1 and kind == "interaction" and layout.silence_token_id < 0:
            raise InputError(
                "this model has no <silence>: a tick of it cannot be missed",
                fix="run its ticks one by one, with nothing in `missed`",
            )
        out = [self._check_one(given, missed=n < len(ticks) - 1) for n, given in enumerate(ticks)]
        typed = sum(len(tokens.typed) for tokens in out)
        if kind == "interaction" and typed and len(self._talk.queue) + typed > MAX_QUEUED_TOKENS:
            raise InputError(
                f"more than {MAX_QUEUED_TOKENS} typed tokens are waiting", fix="tick until the model has read some"
            )
        brings = any(
            tokens.typed or tokens.inject or tokens.say or given.video is not None or _samples(given)
            for given, tokens in zip(ticks, out, strict=True)
        )
        if not brings and kind == "tokens" and not self._talk.positions:
            raise InputError(
                "the first tick of a token model needs at least one token",
                fix="give it text or tokens, or append() a prompt before it",
            )
        return out

    def _check_one(self, given: TickInput, missed: bool) -> Tokens:
        engine, layout = self.engine, self.engine.model.layout
        if given.audio is not None and check_audio(given.audio, layout).size > layout.audio_in * layout.hop:
            raise InputError(
                f"a tick takes at most {layout.audio_in * layout.hop} samples, not {given.audio.size}",
                fix=f"cut the audio into pieces of {layout.duration_ms} ms",
            )
        frames = 1 if given.video is None else check_video(given.video, layout).shape[0]
        if frames not in (1, layout.clip_frames):
            raise InputError(
                f"a tick takes 1 or {layout.clip_frames} frames, not {frames}",
                fix="give the newest frame alone; it stands for the whole clip",
            )
        tokens = check_tokens(given.tokens, engine.model.vocab)
        if given.text:
            if engine.tokenizer is None:
                raise InputError(
                    "this package has no tokenizer: it takes tokens, not text",
                    fix="give `tokens`, or compile the checkpoint with its tokenizer.json beside it",
                )
            tokens = check_tokens(engine.tokenizer.encode(given.text), engine.model.vocab) + tokens
        if tokens:
            check_reads(engine.kind, layout)
        inject = check_tokens(given.inject, engine.model.vocab)
        if len(inject) > MAX_INJECTED:
            raise InputError(f"a tick takes at most {MAX_INJECTED} injected tokens, not {len(inject)}", fix=_LATER)
        say = check_tokens(given.say, engine.model.vocab)
        if len(say) > layout.text_out:
            raise InputError(f"a tick says at most {layout.text_out} tokens, not {len(say)}", fix=_LATER)
        if say and missed:
            raise InputError("a missed tick is silent: it says nothing", fix="let the newest tick say it")
        if engine.kind == "interaction" and {layout.silence_token_id, layout.end_of_tick_token_id} & set(say):
            raise InputError(
                "what a tick says holds neither <silence> nor <end_of_tick>",
                fix="leave them out: <end_of_tick> follows by itself",
            )
        return Tokens(tokens, inject, say)

    def _fill(self, ticks: Sequence[TickInput], tokens: Sequence[Tokens]) -> list[Staged]:
        """Copies checked inputs into buffers: the last one into the session's own, those of missed ticks into new
        ones."""
        out = []
        for given, ids in zip(ticks[:-1], tokens[:-1], strict=True):
            clip = self._clip if given.video is None else np.empty_like(self._clip)
            out.append(self._fill_one(given, ids, np.empty_like(self._pcm), clip))
        return [*out, self._fill_one(ticks[-1], tokens[-1], self._pcm, self._clip)]

    def _fill_one(self, given: TickInput, tokens: Tokens, pcm: np.ndarray, clip: np.ndarray) -> Staged:
        """An input padded to a whole clip and a whole tick (for a token model, which hears no silence of its own: to
        whole positions)."""
        samples = 0
        if given.audio is not None:
            samples = given.audio.size
            pcm.reshape(-1)[:samples] = given.audio
        pcm.reshape(-1)[samples:] = 0.0
        whole = self.engine.kind == "interaction" or not samples
        heard = pcm if whole else pcm[: -(-samples // self.engine.model.hop)]
        staged = Staged(heard, samples=samples, tokens=tokens.typed, inject=tokens.inject, say=tokens.say)
        staged.padded = heard.size - samples if samples or self.engine.kind == "interaction" else 0
        if given.video is not None:
            clip[:] = given.video.reshape(given.video.shape[0], *clip.shape[1:])
            staged.clip = clip.reshape(-1, clip.shape[2])
        return staged

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Around the part of a call that changes the session: one at a time, and failing inside is final."""
        self._begin({SessionState.NEW, SessionState.OPEN})
        try:
            yield
        except ContextFullError:
            self._end(SessionState.CLOSED)
            raise
        except BaseException:
            # Anything else, an interrupt included, may have left the slot between two positions.
            self._end(SessionState.POISONED)
            raise
        self._end(SessionState.OPEN)

    def _begin(self, allowed: set[SessionState]) -> None:
        with self._lock:
            if self._state not in allowed:
                raise SessionError(f"the session is {self._state}", fix=ADVICE[self._state])
            if self._busy:
                raise SessionError("another call of this session is running", fix="wait for it to return")
            self._busy = True

    def _end(self, state: SessionState | None = None) -> None:
        """A call is over; `state` is where it took the session (None: nowhere)."""
        with self._lock:
            self._busy = False
            if self._state is SessionState.CLOSING:
                state = SessionState.CLOSED
            if state is not None:
                self._state = state
            if state is SessionState.CLOSED:
                self._release()

    def snapshot(self) -> bytes:
        """Everything the session remembers; `Engine.restore` continues from it bit for bit."""
        self._begin({SessionState.NEW, SessionState.OPEN, SessionState.DETACHED})
        try:
            slot = self.engine.slots.memory.read(self.index)
            return write_snapshot(slot, self._talk, self.engine.digest, self.engine.target)
        finally:
            self._end()

    def fork(self) -> Session:
        """A twin in a slot of its own, equal bit for bit; from here on the two are independent.

        Raises CapacityError when no slot is free.
        """
        self._begin({SessionState.NEW, SessionState.OPEN, SessionState.DETACHED})
        try:
            return self.engine.twin(self._talk, self.index)
        finally:
            self._end()

    def detach(self) -> None:
        """The owner left: the session keeps its slot and takes no calls until `attach`."""
        self._move({SessionState.NEW, SessionState.OPEN}, SessionState.DETACHED)

    def attach(self) -> None:
        """A new owner took over a detached session."""
        self._move({SessionState.DETACHED}, SessionState.OPEN)

    def _move(self, allowed: set[SessionState], state: SessionState) -> None:
        self._begin(allowed)
        self._end(state)

    def close(self) -> None:
        """Ends the session and frees its slot, after a call that still runs. Closing twice does nothing."""
        with self._lock:
            if self._busy:
                self._state = SessionState.CLOSING
            elif self._state is not SessionState.CLOSED:
                self._state = SessionState.CLOSED
                self._release()


def _samples(given: TickInput) -> int:
    return 0 if given.audio is None else given.audio.size


_LOGITS: dict[str, Callable[[int], int]] = {"all": lambda count: count, "last": lambda _: 1, "none": lambda _: 0}
"""How many rows of logits an append of so many positions gives."""

_LATER = "give the rest to the next ticks"

_ATTACHED = "go on with tick() or append(): only a detached session is attached"
ADVICE = {
    SessionState.NEW: _ATTACHED,
    SessionState.OPEN: _ATTACHED,
    SessionState.DETACHED: "attach() it first",
    SessionState.CLOSING: "open a new session",
    SessionState.CLOSED: "open a new session, or restore a snapshot",
    SessionState.POISONED: "close it, and open a new session or restore a snapshot",
}
"""What to do where a call is refused in a state."""
