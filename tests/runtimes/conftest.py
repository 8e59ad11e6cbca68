"""A small backend in plain numpy behind the real engine: what the runtime does is seen by what it calls, and when."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from tmlc.errors import ContextFullError, KernelError
from tmlc.package.manifest import ContextInfo, Manifest, MemoryInfo, ModelInfo, TickLayout
from tmlc.runtimes.core.backend import Backend, MethodSpec, TensorSpec, check_inputs
from tmlc.runtimes.core.clock import ManualClock
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.live import Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.text import ByteTokenizer

WIDTH, VOCAB, HOP, MEL = 4, 260, 8, 3
SILENCE, END = 257, 258
BAD_TOKEN = 255  # the fake's kernels stop on it
LAYOUT = TickLayout(
    duration_ms=200,
    audio_in=2,
    video_every=2,
    text_in=2,
    text_out=2,
    audio_out=2,
    silence_token_id=SILENCE,
    end_of_tick_token_id=END,
    eos_token_ids=(256,),
    sample_rate=80,
    hop=HOP,
    clip_frames=2,
    frame_height=2,
    frame_width=3,
    video_positions=3,
    out_sample_rate=80,
    out_hop=HOP,
    frames_per_position=2,
    n_mel=MEL,
    silence_level=-7.0,
)


def row(dtype: str, a: int, cols: int) -> TensorSpec:
    return TensorSpec(dtype, a, 0, cols)


HIDDEN, KEY, IDS, PCM = row("f32", 1, WIDTH), row("i64", 1, 3), row("i32", 1, 1), row("f32", 1, HOP)
METHODS = {
    "embed_text": ([IDS], HIDDEN),
    "embed_audio": ([PCM], HIDDEN),
    "embed_speech": ([PCM], HIDDEN),
    "embed_video": ([row("u8", 4, 9)], row("f32", 3, WIDTH)),
    "decode": ([HIDDEN], HIDDEN),
    "unembed": ([HIDDEN], row("f32", 1, VOCAB)),
    "next_token": ([HIDDEN, KEY, row("f32", 1, 1)], IDS),
    "speak": ([HIDDEN, KEY], row("f32", 2, MEL)),
    "vocode": ([row("f32", 2, MEL)], PCM),
}


class FakeBackend(Backend):
    """Embeddings are (kind, value, 0, 0); decode keeps a leaky sum in the slot, so hidden states depend on the order
    of all positions and on nothing else.

    `said` lists (kind, value) of every decoded position, `calls` every (method, n), `batches` every (method, n of each
    session), `keys` the random keys asked for,
    `script` the tokens that next_token answers (then it answers <silence>).
    """

    def __init__(self, max_n: int = 8, limit: int = 1 << 30) -> None:
        self.target, self.isa, self.threads, self.limit = "fake", "numpy", 1, limit
        self.methods = {
            name: MethodSpec(name, max_n, tuple(inputs), (output,)) for name, (inputs, output) in METHODS.items()
        }
        self.slot_bytes = 8 * (1 + WIDTH)
        self.said: list[tuple[str, float]] = []
        self.calls: list[tuple[str, int]] = []
        self.batches: list[tuple[str, list[int]]] = []
        self.keys: list[tuple[str, tuple[int, ...]]] = []
        self.mels: list[np.ndarray] = []
        self.script: deque[int] = deque()
        self.closed = False
        self.on_call: Callable[[str], None] = lambda method: None

    def call(
        self, method: str, parts: Sequence[tuple[int, np.ndarray]], inputs: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        assert not self.closed
        spec, total = self.methods[method], sum(n for n, _ in parts)
        check_inputs(spec, total, inputs)
        assert len({slot.ctypes.data for _, slot in parts}) == len(parts)
        for part, (n, slot) in enumerate(parts):
            assert slot.ctypes.data % 64 == 0 and slot.nbytes == self.slot_bytes
            if method == "decode" and slot.view(np.float64)[0] + n > self.limit:
                full = ContextFullError("the context is used up", fix="open a new session")
                full.part = part
                raise full
        self.calls.append((method, total))
        self.batches.append((method, [n for n, _ in parts]))
        self.on_call(method)
        outs, at = [], 0
        for n, slot in parts:
            cut = [x[at * of.a : (at + n) * of.a] for x, of in zip(inputs, spec.inputs, strict=True)]
            outs.append(getattr(self, f"_{method}")(n, slot.view(np.float64), *cut))
            at += n
        return [np.concatenate(outs)]

    @staticmethod
    def _tag(kind: int, values: np.ndarray) -> np.ndarray:
        out = np.zeros((values.shape[0], WIDTH), np.float32)
        out[:, 0], out[:, 1] = kind, values
        return out

    def _embed_text(self, n, state, ids):
        if (ids == BAD_TOKEN).any():
            raise KernelError("index out of range", fix="give ids of the vocabulary")
        return self._tag(0, ids[:, 0])

    def _embed_audio(self, n, state, pcm):
        return self._tag(1, pcm.sum(1))

    def _embed_speech(self, n, state, pcm):
        return self._tag(2, pcm.sum(1))

    def _embed_video(self, n, state, video):
        return self._tag(3, np.repeat(video.reshape(n, -1).astype(np.float32).sum(1), 3))

    def _decode(self, n, state, x):
        out = np.empty_like(x)
        for i, position in enumerate(x):
            self.said.append((("text", "audio", "speech", "video")[int(position[0])], float(position[1])))
            state[0] += 1
            state[1:] = 0.5 * state[1:] + position
            out[i] = state[1:]
        return out

    def _unembed(self, n, state, hidden):
        return np.repeat(hidden.sum(1, keepdims=True), VOCAB, 1)

    def _next_token(self, n, state, hidden, key, temperature):
        self.keys.append(("token", tuple(key[0].tolist())))
        return np.full((n, 1), self.script.popleft() if self.script else SILENCE, np.int32)

    def _speak(self, n, state, hidden, key):
        self.keys.append(("audio", tuple(key[0].tolist())))
        return np.full((2 * n, MEL), 0.01 * hidden.sum(), np.float32)

    def _vocode(self, n, state, mel):
        self.mels.append(mel.copy())
        return np.repeat(mel.reshape(n, -1)[:, :1], HOP, 1) * np.float32(0.25)

    def memory(self) -> dict[str, int]:
        return {"weights": 0, "arena": 0, "scratch": 0}

    def close(self) -> None:
        self.closed = True


def make_manifest(kind: str = "interaction", layout: TickLayout = LAYOUT, max_append: int = 8) -> Manifest:
    return Manifest(
        model=ModelInfo("fake", kind),
        methods=(),
        states=(),
        session_bytes=8 * (1 + WIDTH),
        tick=layout,
        context=ContextInfo(limit=1024, policy="end", sinks=0, max_append=max_append),
        memory=MemoryInfo(0, 0, 0),
        targets={},
        tolerances={},
    )


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def fake_engine(backend=None, kind="interaction", sessions=3, max_append=8, **layout) -> Engine:
    """An engine over a fake backend; `layout` changes the tick layout."""
    plain = LAYOUT if kind == "interaction" else TickLayout(duration_ms=200, text_out=2, eos_token_ids=(256,))
    manifest = make_manifest(kind, replace(plain, **layout), max_append)
    tokenizer = ByteTokenizer({b: b for b in range(256)})
    digest = hashlib.sha256(repr(manifest).encode()).hexdigest()
    return Engine(backend or FakeBackend(), manifest, digest, tokenizer, sessions)


@pytest.fixture(scope="session")
def make_fake():
    """`fake_engine`, for tests that make many engines of their own (hypothesis); nobody closes them."""
    return fake_engine


@pytest.fixture
def make_engine():
    """Engines over fake backends: make(backend=…, kind=…, sessions=…, max_append=…, **changes of the layout)."""
    engines = []

    def make(*args, **kwargs) -> Engine:
        engines.append(fake_engine(*args, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


class Guest:
    """A client of a scheduler: keeps what its sink and its log get."""

    def __init__(self, scheduler: Scheduler, **options):
        self.events: list[Published | Ended] = []
        self.log: list[dict] = []
        self.seat = scheduler.open(self.events.append, log=self.log.append, **options)

    def hear(self, level: float, samples: int = 2 * HOP) -> None:
        """Samples of one level; as many as a tick has, unless told otherwise."""
        self.seat.hear(np.full(samples, level, np.float32))

    @property
    def outs(self):
        return [event for event in self.events if isinstance(event, Published)]

    @property
    def end(self):
        assert len([e for e in self.events if isinstance(e, Ended)]) <= 1
        return self.events[-1] if self.events and isinstance(self.events[-1], Ended) else None

    def noted(self, event):
        return [record for record in self.log if record["event"] == event]


class World:
    """An engine, a clock that only the test moves, and a scheduler."""

    def __init__(self, engine: Engine, table=None, resume_window=30.0):
        self.engine, self.clock = engine, ManualClock()
        self.scheduler = Scheduler(engine, clock=self.clock, table=table, resume_window=resume_window)

    def guest(self, **options) -> Guest:
        return Guest(self.scheduler, **options)

    def edges(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.advance(0.2)
            self.scheduler.step()


@pytest.fixture
def world(make_engine):
    """make(table=…, resume_window=…, **options of the engine) -> World."""

    def make(table=None, resume_window=30.0, **options):
        return World(make_engine(**options), table, resume_window)

    return make
