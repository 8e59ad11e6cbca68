"""An engine's methods by what they do: embed what came in, decode positions, choose tokens, speak.

Everything here works over buffers that are allocated once for the engine, so whoever calls holds the
device. Rows are staged until the call's limit and then decoded together; how they are grouped never
changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

import numpy as np

from tmlc.errors import PackageError
from tmlc.package.manifest import Manifest
from tmlc.runtimes.core.backend import Backend, MethodSpec, TensorSpec

MAX_TICK_BYTES = 1 << 28
MAX_COLS = 1 << 22  # of a hidden state and of the logits

Sink = Callable[[np.ndarray], None]


def _rows(dtype: str, a: int, cols: int) -> TensorSpec:
    return TensorSpec(dtype, a, 0, cols)


class Model:
    """The methods of one loaded backend, checked once against the manifest.

    Attributes:
        width: columns of a hidden state.
        vocab: columns of the logits; token ids are below it.
        hop: samples of one audio position, in and out (0 without audio).
        chunk: the most positions that one decode call takes.
        times: nanoseconds spent in each method since `reset_times`.

    Raises (when made): PackageError when a method that the model's kind needs is missing or has another
    form.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
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
            raise PackageError("a token model may hear and see, but it does not speak", where="manifest.json: tick")
        self._check_media()
        self.chunk = min(self._spec("decode").max_n, manifest.context.max_append)
        self.times = dict.fromkeys(backend.methods, 0)
        self._x = np.zeros((self.chunk, self.width), np.float32)
        self._ids = np.zeros((max(self._spec("embed_text").max_n, 1), 1), np.int32)
        self._key = np.zeros((1, 3), np.int64)
        self._temperature = np.zeros((1, 1), np.float32)
        self._staged = 0
        self._slot = np.zeros(0, np.uint8)
        self._sink: Sink | None = None
        self._hidden: np.ndarray = self._x[:0]
        self.appended = 0

    @property
    def buffer_bytes(self) -> int:
        return self._x.nbytes + self._ids.nbytes

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
            raise PackageError(f"a model {self.width} wide with a vocabulary of {self.vocab} is absurd")
        self._spec("decode").require([hidden], [hidden])
        self._spec("embed_text").require([ids], [hidden])
        self._spec("unembed").require([hidden], [_rows("f32", 1, self.vocab)])
        self._spec("next_token").require([hidden, key, _rows("f32", 1, 1)], [ids])
        for name in ("silence_token_id", "end_of_tick_token_id"):
            if getattr(self.layout, name) >= self.vocab:
                what = f"{name} is outside the vocabulary of {self.vocab}"
                raise PackageError(what, where="manifest.json: tick")

    def _check_interaction(self) -> None:
        layout = self.layout
        if layout.audio_in < 1 or layout.hop < 1 or layout.end_of_tick_token_id < 0:
            raise PackageError(
                "an interaction model needs audio positions and an end-of-tick token",
                where="manifest.json: tick",
            )
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
                raise PackageError(f"{size} bytes of {what} a tick are absurd", where="manifest.json: tick")
        if layout.video_positions and not sizes["video"]:
            raise PackageError("video needs frames that are not empty", where="manifest.json: tick")
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

    def reset_times(self) -> None:
        for name in self.times:
            self.times[name] = 0

    def _call(self, method: str, n: int, *inputs: np.ndarray) -> np.ndarray:
        start = perf_counter_ns()
        out = self.backend.call(method, n, self._slot, inputs)[0]
        self.times[method] += perf_counter_ns() - start
        return out

    def begin(self, slot: np.ndarray, sink: Sink | None = None) -> None:
        """Starts work on one session. `sink` gets the hidden rows of every decode call, in order."""
        self._slot, self._sink, self._staged, self.appended = slot, sink, 0, 0
        self._hidden = self._x[:0]

    def flush(self) -> np.ndarray:
        """Decodes what is staged. Returns the hidden state [1, width] of the last position, which is
        valid until the next decode call."""
        if self._staged:
            n, self._staged = self._staged, 0
            hidden = self._call("decode", n, self._x[:n])
            self.appended += n
            self._hidden = hidden[n - 1 :]
            if self._sink is not None:
                self._sink(hidden)
        return self._hidden

    def _stage(self, rows: np.ndarray) -> None:
        start, count = 0, rows.shape[0]
        while start < count:
            step = min(count - start, self.chunk - self._staged)
            self._x[self._staged : self._staged + step] = rows[start : start + step]
            self._staged += step
            start += step
            if self._staged == self.chunk:
                self.flush()

    def _embed(self, method: str, rows: np.ndarray, per_position: int) -> None:
        """Embeds and stages `rows`, of which every `per_position` make one position of the method's n."""
        limit, total = self.backend.methods[method].max_n, rows.shape[0] // per_position
        for start in range(0, total, limit):
            n = min(limit, total - start)
            part = rows[start * per_position : (start + n) * per_position]
            self._stage(self._call(method, n, part))

    def put_audio(self, pcm: np.ndarray) -> None:
        """Stages what is heard: float32 [n, hop]."""
        self._embed("embed_audio", pcm, 1)

    def put_speech(self, pcm: np.ndarray) -> None:
        """Stages what the model said itself: float32 [n, hop]."""
        self._embed("embed_speech", pcm, 1)

    def put_video(self, rows: np.ndarray) -> None:
        """Stages whole clips: uint8 [clips · clip_frames · height, width · 3]."""
        self._embed("embed_video", rows, self.layout.clip_frames * self.layout.frame_height)

    def put_text(self, tokens: Sequence[int]) -> None:
        """Stages tokens; ids must be in the vocabulary."""
        limit = self._ids.shape[0]
        for start in range(0, len(tokens), limit):
            part = tokens[start : start + limit]
            ids = self._ids[: len(part)]
            ids[:, 0] = part
            self._embed("embed_text", ids, 1)

    def logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        """Writes the logits of `hidden` [n, width] to `out` [n, vocab]."""
        limit = self._spec("unembed").max_n
        for start in range(0, hidden.shape[0], limit):
            part = hidden[start : start + limit]
            out[start : start + limit] = self._call("unembed", part.shape[0], part)

    def next_token(self, hidden: np.ndarray, key: tuple[int, int, int], temperature: float) -> int:
        """One token id from `hidden` [1, width]; `key` is (seed, tick, index of the output in its tick)."""
        self._key[0] = key
        self._temperature[0, 0] = temperature
        return int(self._call("next_token", 1, hidden, self._key, self._temperature)[0, 0])

    def speak(self, hidden: np.ndarray, key: tuple[int, int, int]) -> np.ndarray:
        """The mel frames [frames_per_position, n_mel] that the flow head gives for `hidden` [1, width]."""
        self._key[0] = key
        return self._call("speak", 1, hidden, self._key)

    def vocode(self, mel: np.ndarray, out: np.ndarray) -> None:
        """Writes the samples of `mel` [n · frames_per_position, n_mel] to `out` [n, hop], held to [-1, 1]."""
        limit, frames = self._spec("vocode").max_n, self.layout.frames_per_position
        for start in range(0, out.shape[0], limit):
            n = min(limit, out.shape[0] - start)
            pcm = self._call("vocode", n, mel[start * frames : (start + n) * frames])
            np.clip(pcm, -1.0, 1.0, out=out[start : start + n])
