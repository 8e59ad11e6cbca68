"""An engine without a model: it has the surface that the scheduler uses, and its steps take the time that was declared.

On a `VirtualClock` a step moves the clock and nothing else, so that a server with a thousand sessions can be watched
for hours in seconds. What a session says depends on its seed and on what it heard: when a voice ends, it answers with
`reply_ticks` ticks of a tone and of text. It says so in the name of its package; it is for tests and for measuring a
server, and no model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tmlc.errors import SessionError, UsageError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.engine import Capacity
from tmlc.runtimes.core.session import ADVICE, SessionState
from tmlc.runtimes.core.slots import all_taken
from tmlc.runtimes.core.surface import LogSink
from tmlc.runtimes.core.text import ByteTokenizer
from tmlc.runtimes.core.tick import TickInput, TickOutput, check_audio, check_tokens
from tmlc.runtimes.core.voice import BEGINS

SILENCE, END, VOCAB = 256, 257, 260
LAYOUT = TickLayout(
    duration_ms=200, audio_in=4, video_every=2, text_in=4, text_out=4, audio_out=4, silence_token_id=SILENCE,
    end_of_tick_token_id=END, sample_rate=16000, hop=800, clip_frames=1, frame_height=16, frame_width=16,
    video_positions=1, out_sample_rate=16000, out_hop=800, frames_per_position=5, n_mel=1,
)  # fmt: skip
"""Ticks of 200 ms at 16 kHz, frames of 16 × 16."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: `base + each · sessions + missed · ticks that are caught up`, times a random factor whose
    logarithm is normal with the standard deviation `jitter`."""

    base: float = 0.004
    each: float = 0.0001
    missed: float = 0.00003
    jitter: float = 0.0

    def seconds(self, sessions: int, missed: int, chance: np.random.Generator) -> float:
        factor = math.exp(self.jitter * chance.standard_normal()) if self.jitter else 1.0
        return (self.base + self.each * sessions + self.missed * missed) * factor


class SyntheticEngine:
    """See the head of this file.

    Args:
        clock: its steps move it.
        step: how long they take.
        sessions: slots.
        seed: of the jitter.
        reply_ticks: ticks for which a session answers when a voice has ended.
    """

    kind, batched, target, digest = "interaction", True, "synthetic", "synthetic"

    def __init__(
        self, clock: VirtualClock, step: StepTime | None = None, sessions: int = 16, seed: int = 0, reply_ticks: int = 3
    ) -> None:
        if sessions < 1 or reply_ticks < 0:
            raise UsageError(
                f"a synthetic engine of {sessions} sessions with replies of {reply_ticks} ticks",
                fix="give sessions of 1 or more, and reply_ticks of 0 or more",
            )
        self.clock, self.step, self.reply_ticks = clock, step or StepTime(), reply_ticks
        self.layout, self.vocab = LAYOUT, VOCAB
        self.tokenizer = ByteTokenizer({byte: byte for byte in range(256)})
        self._chance = np.random.default_rng(seed)
        self._sessions, self._free, self._stall = sessions, sessions, 0.0
        samples = LAYOUT.audio_in * LAYOUT.hop
        self._samples = samples
        self._tone = (0.3 * np.sin(np.arange(samples) * (2 * math.pi * 440 / LAYOUT.sample_rate))).astype(np.float32)

    def stall(self, seconds: float) -> None:
        """The next step takes so much longer."""
        self._stall += seconds

    def capacity(self) -> Capacity:
        """What it holds and can still admit."""
        return Capacity(self._sessions, self._free, 0, 0, 0, 0, 0, 1 << 40, "end", 64)

    def session(self, seed: int = 0, temperature: float = 0.0, log: LogSink | None = None) -> SyntheticSession:
        """Opens a conversation. Raises CapacityError when all slots are taken."""
        return SyntheticSession(self, Memory(seed, temperature), log)

    def restore(self, blob: bytes, log: LogSink | None = None) -> SyntheticSession:
        """The session that `SyntheticSession.snapshot` described. Raises SessionError, CapacityError."""
        try:
            memory = Memory(**json.loads(blob))
        except (ValueError, TypeError) as error:
            raise SessionError(
                f"not a snapshot of a synthetic session: {error}", fix="take it again with session.snapshot()"
            ) from None
        return SyntheticSession(self, memory, log)

    def take(self) -> None:
        """Takes a slot."""
        if not self._free:
            raise all_taken(self._sessions)
        self._free -= 1

    def give_back(self) -> None:
        """Frees a slot."""
        self._free += 1

    def tick_batch(
        self,
        sessions: Sequence[SyntheticSession],
        inputs: Sequence[TickInput | None],
        missed: Sequence[Sequence[TickInput]] | None = None,
    ) -> list[TickOutput | Exception]:
        """One tick of several sessions; moves the clock."""
        earlier = missed if missed is not None else [()] * len(sessions)
        took = self.step.seconds(len(sessions), sum(map(len, earlier)), self._chance) + self._stall
        self._stall = 0.0
        self.clock.advance(took)
        out: list[TickOutput | Exception] = []
        for session, given, late in zip(sessions, inputs, earlier, strict=True):
            try:
                out.append(session.run(given or TickInput(), late, len(sessions), 1000 * took))
            except Exception as error:
                out.append(error)
        return out

    def voice(self, audio: np.ndarray | None) -> bool:
        """Is there voice in a tick's audio?"""
        return audio is not None and bool(audio.size) and float(audio @ audio) >= BEGINS**2 * audio.size

    def sound(self, speaks: bool) -> np.ndarray:
        """One tick of the tone, or of silence, the caller's own."""
        return self._tone.copy() if speaks else np.zeros(self._samples, np.float32)


@dataclass(slots=True)
class Memory:
    """All that a synthetic session remembers; `heard` and `read` count samples and typed tokens."""

    seed: int
    temperature: float
    ticks: int = 0
    voice: bool = False
    left: int = 0
    heard: int = 0
    read: int = 0


class SyntheticSession:
    """Made by `SyntheticEngine.session` and `restore`."""

    def __init__(self, engine: SyntheticEngine, memory: Memory, log: LogSink | None) -> None:
        engine.take()
        self.engine, self.memory, self.state, self._log = engine, memory, "open", log
        if log is not None:
            log(ticklog.opened(engine.digest, memory.seed, memory.temperature, memory.ticks, self.positions))

    def __enter__(self) -> SyntheticSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seed(self) -> int:
        return self.memory.seed

    @property
    def ticks(self) -> int:
        """Ticks done so far."""
        return self.memory.ticks

    @property
    def positions(self) -> int:
        """Positions appended so far."""
        layout = self.engine.layout
        return self.memory.ticks * (layout.audio_in + 2 + layout.audio_out)

    def append(self, tokens: Sequence[int] = (), *, logits: str = "none") -> np.ndarray:
        """Reads tokens outside a tick; there are no logits."""
        self.memory.read += len(check_tokens(tokens, VOCAB))
        return np.zeros((0, VOCAB), np.float32)

    def run(self, given: TickInput, missed: Sequence[TickInput], batch: int, ms: float) -> TickOutput:
        """One tick and the missed ones before it."""
        if self.state != "open":
            raise SessionError(f"the session is {self.state}", fix=ADVICE[SessionState(self.state)])
        for late in missed:
            self._take_in(late)
        self._take_in(given)
        memory = self.memory
        speaks = bool(given.say) or memory.left > 0
        memory.left -= memory.left > 0
        tokens = list(given.say) or ([97 + (memory.seed + memory.ticks) % 26] if speaks else [SILENCE])
        text = bytes(token for token in tokens if token < 256).decode("ascii", "replace")
        stats = {
            "appended": self.engine.layout.audio_in * (1 + len(missed)), "positions": self.positions,
            "silent": int(not speaks), "queued_tokens": 0, "padded_samples": 0, "dropped_clips": 0, "batch": batch,
            "collapsed": len(missed),
        }  # fmt: skip
        out = TickOutput(memory.ticks - 1, tokens, text, self.engine.sound(speaks), {"total": ms}, stats)
        if self._log is not None:
            self._log(ticklog.ticked(given, out, missed))
        return out

    def _take_in(self, given: TickInput) -> None:
        memory = self.memory
        if given.audio is not None:
            memory.heard += check_audio(given.audio, self.engine.layout).size
        memory.read += len(check_tokens(given.tokens, VOCAB)) + len(given.inject)
        voice = self.engine.voice(given.audio)
        if voice:
            memory.left = 0
        elif memory.voice:
            memory.left = self.engine.reply_ticks
        memory.voice = voice
        memory.ticks += 1

    def snapshot(self) -> bytes:
        """Everything the session remembers."""
        return json.dumps(asdict(self.memory)).encode()

    def detach(self) -> None:
        """The owner left."""
        self.state = "detached"

    def attach(self) -> None:
        """A new owner took over."""
        self.state = "open"

    def close(self) -> None:
        """Ends the session and frees its slot; twice does nothing."""
        if self.state != "closed":
            self.state = "closed"
            self.engine.give_back()
