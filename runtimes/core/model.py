"""An engine's methods by what they do, for a batch of sessions: embed what came in, decode, choose tokens, speak.

Sessions are named by their number in the batch; one session is a batch of one. A call takes the rows of all sessions,
as far as its limit allows, so a weight is read once for all of them; how rows are grouped into calls never changes a
bit of any session's result. Everything works over buffers that are allocated once for the engine, so whoever calls
holds the device.

A session whose part of a call the backend refuses (its context is full, its slot is damaged) leaves the batch: the call
runs again without it, and whatever is put for it later is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns

import numpy as np

from tmlc.errors import CapacityError, ContextFullError, KernelError, PackageError
from tmlc.package.fields import AGAIN
from tmlc.package.manifest import Manifest
from tmlc.runtimes.core.backend import DTYPES, Backend, MethodSpec, TensorSpec
from tmlc.runtimes.core.chains import Key
from tmlc.runtimes.core.slots import Slot

MAX_TICK_BYTES = 1 << 28
MAX_COLS = 1 << 22  # of a hidden state and of the logits

Sink = Callable[[np.ndarray], None]
Rows = tuple[int, np.ndarray]
"""A session's number in the batch, and rows of it: dense, a whole number of positions."""


def _odd(what: str) -> PackageError:
    """The error of a tick that no model has."""
    return PackageError(what, where="manifest.json: tick", fix=AGAIN)


def _rows(dtype: str, a: int, cols: int) -> TensorSpec:
    return TensorSpec(dtype, a, 0, cols)


class Model:
    """The methods of one loaded backend, checked once against the manifest.

    Attributes:
        width: columns of a hidden state.
        vocab: columns of the logits; token ids are below it.
        hop: samples of one audio position, in and out (0 without audio).
        chunk: the most positions that one decode call takes, of all sessions together.
        times: nanoseconds spent in each method since `begin`, for the whole batch.
        watch: when it is set, told of every call: the method, when it began and when it ended (ns of
            `time.perf_counter_ns`).
        hidden: float32 [sessions, width], the hidden state of each session's last position.
        appended: positions that each session of the batch has appended.
        failed: why a session left the batch, by number.

    Raises (when made): PackageError when a method that the model's kind needs is missing or has another
    form.
    """

    def __init__(self, backend: Backend, manifest: Manifest, sessions: int) -> None:
        self.backend, self.layout = backend, manifest.tick
        self.width = self._spec("decode").inputs[0].cols if self._spec("decode").inputs else 0
        outputs = self._spec("unembed").outputs
        self.vocab = outputs[0].cols if outputs else 0
        self.hears = self.sees = self.speaks = False
        self.hop = 0
        self._check_text()
        if manifest.model.kind == "interaction":
            self._check_interaction()
        elif self.layout.audio_out or (self.layout.audio_in and self.layout.hop < 1):
            raise _odd("a token model may hear and see, but it does not speak")
        self._check_media()
        self.chunk = min(self._spec("decode").max_n, manifest.context.max_append)
        self.times = dict.fromkeys(backend.methods, 0)
        self.watch: Callable[[str, int, int], None] | None = None
        try:
            self._reserve(sessions)
        except (MemoryError, ValueError) as error:
            raise CapacityError("cannot reserve the buffers of a batch", fix="load with fewer sessions") from error
        self._slots: list[Slot] = []
        self._staged: list[int] = []
        self.appended: list[int] = []
        self.failed: dict[int, ContextFullError | KernelError] = {}
        self._sink: Sink | None = None

    def _reserve(self, sessions: int) -> None:
        """The buffers: rows that wait for decode, and the arguments of a call that brings several sessions."""
        self.hidden = np.zeros((sessions, self.width), np.float32)
        self._rows = np.zeros((sessions, self.chunk, self.width), np.float32)
        self._limits: dict[str, int] = {}
        self._joined: dict[str, list[np.ndarray]] = {}
        for name, spec in self.backend.methods.items():
            if any(of.b or not of.a for of in spec.inputs):
                continue  # no method that is called here
            row = sum(of.a * of.cols * DTYPES[of.dtype].itemsize for of in spec.inputs)
            most = self.chunk if name == "decode" else spec.max_n
            limit = min(most, max(1, MAX_TICK_BYTES // max(row, 1)))
            self._limits[name] = limit
            self._joined[name] = [of.allocate(limit) for of in spec.inputs]

    def _spec(self, name: str) -> MethodSpec:
        if name not in self.backend.methods:
            raise PackageError(
                f"the package has no method {name!r}",
                fix="compile the checkpoint again with this version of tmlc",
            )
        return self.backend.methods[name]

    def _check_text(self) -> None:
        hidden, ids, key = _rows("f32", 1, self.width), _rows("i32", 1, 1), _rows("i64", 1, 3)
        if max(self.width, self.vocab) > MAX_COLS:
            raise PackageError(f"a model {self.width} wide with a vocabulary of {self.vocab} is absurd", fix=AGAIN)
        self._spec("decode").require([hidden], [hidden])
        self._spec("embed_text").require([ids], [hidden])
        self._spec("unembed").require([hidden], [_rows("f32", 1, self.vocab)])
        self._spec("next_token").require([hidden, key, _rows("f32", 1, 1)], [ids])
        for name in ("silence_token_id", "end_of_tick_token_id"):
            if getattr(self.layout, name) >= self.vocab:
                raise _odd(f"{name} is outside the vocabulary of {self.vocab}")

    def _check_interaction(self) -> None:
        layout = self.layout
        if layout.audio_in < 1 or layout.hop < 1 or layout.end_of_tick_token_id < 0:
            raise _odd("an interaction model needs audio positions and an end-of-tick token")
        self.speaks = layout.audio_out > 0

    def _check_media(self) -> None:
        """What the model hears and sees, of any kind, and what an interaction model says."""
        layout = self.layout
        hidden, key = _rows("f32", 1, self.width), _rows("i64", 1, 3)
        sizes = {
            "audio": 4 * layout.audio_in * layout.hop,
            "video": layout.clip_frames * layout.frame_height * layout.frame_width * 3,
            "speech": 4 * layout.audio_out * max(layout.frames_per_position * layout.n_mel, layout.hop),
        }
        for what, size in sizes.items():
            if size > MAX_TICK_BYTES:
                raise _odd(f"{size} bytes of {what} a tick are absurd")
        if layout.video_positions and not sizes["video"]:
            raise _odd("video needs frames that are not empty")
        if layout.audio_in:
            self.hears, self.hop = True, layout.hop
            self._spec("embed_audio").require([_rows("f32", 1, self.hop)], [hidden])
        if layout.video_positions:
            frame_rows, frame_cols = layout.clip_frames * layout.frame_height, layout.frame_width * 3
            clip = _rows("u8", frame_rows, frame_cols)
            self._spec("embed_video").require([clip], [_rows("f32", layout.video_positions, self.width)])
            self.sees = True
        if self.speaks:
            mel = _rows("f32", layout.frames_per_position, layout.n_mel)
            pcm = _rows("f32", 1, self.hop)
            self._spec("embed_speech").require([pcm], [hidden])
            self._spec("speak").require([hidden, key], [mel])
            self._spec("vocode").require([mel], [pcm])

    def begin(self, slots: Sequence[Slot], sink: Sink | None = None) -> None:
        """Starts work on a batch. `sink` gets the hidden rows of every decode call, in order."""
        self._slots, self._sink = list(slots), sink
        self._staged, self.appended, self.failed = [0] * len(slots), [0] * len(slots), {}
        for name in self.times:
            self.times[name] = 0

    @property
    def present(self) -> list[int]:
        """The sessions that are still in the batch."""
        return [s for s in range(len(self._slots)) if s not in self.failed]

    def leave(self, session: int, error: ContextFullError | KernelError) -> None:
        """Takes a session out of the batch; raises `error` when it was the last one."""
        self.failed[session] = error
        if len(self.failed) == len(self._slots):
            raise error

    def _each(self, method: str, pieces: Sequence[tuple[int, Sequence[np.ndarray]]]) -> Iterator[Rows]:
        """Runs `method` on the arguments of several sessions, each of them once in `pieces`, and gives back each
        session's rows of the first output (in order; a session's may come in several parts). The rows are valid until
        the next ones are asked for."""
        if not pieces:  # a method that the model may not have
            return
        spec, limit = self.backend.methods[method], self._limits[method]
        if len(pieces) == 1:
            session, arrays = pieces[0]
            count = arrays[0].shape[0] // spec.inputs[0].a
            if 0 < count <= limit and session not in self.failed:  # nothing to cut
                yield from self._run(spec, [(session, count, arrays)])
                return
        group: list[tuple[int, int, Sequence[np.ndarray]]] = []
        used = 0
        for session, arrays in pieces:
            start, count = 0, arrays[0].shape[0] // spec.inputs[0].a
            while start < count and session not in self.failed:
                n = min(count - start, limit - used)
                cut = [x[start * of.a : (start + n) * of.a] for x, of in zip(arrays, spec.inputs, strict=True)]
                group.append((session, n, cut))
                start, used = start + n, used + n
                if used == limit:
                    yield from self._run(spec, group)
                    group, used = [], 0
        if group:
            yield from self._run(spec, group)

    def _run(self, spec: MethodSpec, group: list[tuple[int, int, Sequence[np.ndarray]]]) -> Iterator[Rows]:
        """One call, and again without a session that it is refused for."""
        start = perf_counter_ns()
        while True:
            parts = [(n, self._slots[session]) for session, n, _ in group]
            try:
                rows = self.backend.call(spec.name, parts, self._join(spec, group))[0]
                break
            except (ContextFullError, KernelError) as error:
                if error.part is None:
                    raise
                self.leave(group.pop(error.part)[0], error)
                if not group:
                    return
        done = perf_counter_ns()
        self.times[spec.name] += done - start
        if self.watch is not None:
            self.watch(spec.name, start, done)
        at, height = 0, spec.outputs[0].a
        for session, n, _ in group:
            yield session, rows[at : at + n * height]
            at += n * height

    def _join(self, spec: MethodSpec, group: list[tuple[int, int, Sequence[np.ndarray]]]) -> Sequence[np.ndarray]:
        """The arguments of a call: those of its only session, or copies of all one after another."""
        if len(group) == 1:
            return group[0][2]
        joined = []
        for k, buffer in enumerate(self._joined[spec.name]):
            at = 0
            for _, _, arrays in group:
                buffer[at : at + arrays[k].shape[0]] = arrays[k]
                at += arrays[k].shape[0]
            joined.append(buffer[:at])
        return joined

    def flush(self) -> None:
        """Decodes what is staged; `hidden` has the states of the last positions then."""
        pieces = [(s, (self._rows[s, :n],)) for s, n in enumerate(self._staged) if n]
        self._staged = [0] * len(self._slots)
        for session, hidden in self._each("decode", pieces):
            self.appended[session] += hidden.shape[0]
            self.hidden[session] = hidden[-1]
            if self._sink is not None:
                self._sink(hidden)

    def _put(self, method: str, pieces: Sequence[Rows]) -> None:
        """Embeds rows and stages what they become, each session's behind what it has staged already."""
        for session, rows in self._each(method, [(s, (array,)) for s, array in pieces]):
            start, count = 0, rows.shape[0]
            while start < count and session not in self.failed:
                staged = self._staged[session]
                step = min(count - start, self.chunk - staged)
                self._rows[session, staged : staged + step] = rows[start : start + step]
                self._staged[session] += step
                start += step
                if staged + step == self.chunk:
                    self.flush()

    def put_audio(self, pieces: Sequence[Rows]) -> None:
        """Stages what is heard: float32 [n, hop] of each session."""
        self._put("embed_audio", pieces)

    def put_speech(self, pieces: Sequence[Rows]) -> None:
        """Stages what the model said itself: float32 [n, hop] of each session."""
        self._put("embed_speech", pieces)

    def put_video(self, pieces: Sequence[Rows]) -> None:
        """Stages whole clips: uint8 [clips · clip_frames · height, width · 3] of each session."""
        self._put("embed_video", pieces)

    def put_text(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Stages tokens of each session; ids must be in the vocabulary."""
        self._put("embed_text", [(s, np.array(tokens, np.int32).reshape(-1, 1)) for s, tokens in pieces])

    def logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        """Writes the logits of `hidden` [n, width], rows of a batch of one, to `out` [n, vocab]."""
        at = 0
        for _, rows in self._each("unembed", [(0, (hidden,))]):
            out[at : at + rows.shape[0]] = rows
            at += rows.shape[0]

    def next_token(self, asked: Sequence[tuple[int, Key, float]]) -> Iterator[tuple[int, int]]:
        """One token id for each (session, key, temperature), from the session's hidden state."""
        pieces = [
            (s, (self.hidden[s : s + 1], np.array([key], np.int64), np.array([[heat]], np.float32)))
            for s, key, heat in asked
        ]
        for session, ids in self._each("next_token", pieces):
            yield session, int(ids[0, 0])

    def speak(self, asked: Sequence[tuple[int, Key]], mel: np.ndarray) -> None:
        """Writes the mel frames that the flow head gives for a session's hidden state to `mel[session]`, of
        float32 [sessions, frames_per_position, n_mel]."""
        pieces = [(s, (self.hidden[s : s + 1], np.array([key], np.int64))) for s, key in asked]
        for session, frames in self._each("speak", pieces):
            mel[session] = frames

    def vocode(self, pieces: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """For each (session, mel, out): writes the samples of `mel` [n · frames_per_position, n_mel] to `out`
        [n, hop], held to [-1, 1]."""
        outs, done = {s: out for s, _, out in pieces}, {s: 0 for s, _, _ in pieces}
        for session, pcm in self._each("vocode", [(s, (mel,)) for s, mel, _ in pieces]):
            at = done[session]
            done[session] += pcm.shape[0]
            np.clip(pcm, -1.0, 1.0, out=outs[session][at : done[session]])
