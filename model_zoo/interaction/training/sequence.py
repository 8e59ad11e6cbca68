"""An episode as the sequence that the runtime appends, with what to choose and to speak at which position.

The order of a tick is that of `runtimes/core/tick.py`: injected tokens, `audio_in` positions of what is heard, a clip,
typed tokens; then the chosen tokens, <end_of_tick>, and `audio_out` positions of the model's own last samples. A choice
hangs on the hidden state before the chosen token, output position j of the speech on position j of the model's own
voice. What the model hears of itself is what the vocoder makes of the ideal mel frames, held to [-1, 1].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import InteractionConfig
from ..features import speech_mel
from ..modeling import InteractionModel
from ..speech import Vocoder
from ..tasks import Episode, TokenIds
from ..tasks.episode import EVENTS
from ..tasks.words import MODEL_WORDS
from ..tokenizer import special_tokens
from .late import runs
from .parallel import embed_levels
from .vocoder import synthesise

SILENT, STOPPED, SPOKEN = 0.5, 1.0, 1.0
"""Weights of a choice: <silence> that goes on, <silence> after speech, and anything else."""


def token_ids(config: InteractionConfig) -> TokenIds:
    """The ids that `Episode.output_tokens` needs, as the tokenizer of the checkpoint has them."""
    named = {name.strip("<>"): number for number, name in special_tokens(config).items()}
    fields = ("silence", "end_of_tick", "delegation", "end_of_delegation", "injection", "end_of_injection")
    return TokenIds(**{name: named[name] for name in fields})


@dataclass
class Example:
    """One episode's sequence. Positions count from 0; arrays of places are int64, in the order of the sequence.

    Attributes:
        length: positions.
        text, ids: places of tokens, and the tokens.
        heard, heard_pcm: places of what is heard, and its samples float32 [n, hop].
        own, own_pcm: places of the model's own voice, and the samples it hears of itself.
        seen, clips: places of video, and the clips uint8 [n, frames, height, width, 3].
        choices, chosen, weights: places whose hidden state chooses a token, the token, and how much it counts.
        noticed, events: places at which something can be known that is heard or seen, and its number in `EVENTS`.
        meant, words: places in a tick of a word of the model's (what chooses, what speaks), and the number of the whole
            word in `MODEL_WORDS`.
        spoken, mel: places whose hidden state speaks, and the mel frames float32 [n, frames_per_position · bins].
    """

    length: int
    text: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    noticed: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    meant: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    spoken: list[int] = field(default_factory=list)
    heard_pcm: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    own_pcm: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    clips: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    mel: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


class Kept:
    """A function of one array that keeps its last results."""

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], most: int = 2048) -> None:
        self._compute, self._most = compute, most
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        key = array.tobytes()
        if key not in self._kept:
            self._kept[key] = self._compute(array)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class OwnVoice:
    """What the model hears of itself: the vocoder over ideal mel frames, run where they are not silence.

    Between words the vocoder's output is that of constant frames, and its memory is shorter than two ticks, so pieces
    of speech are independent; they are kept, because words come again.
    """

    def __init__(self, vocoder: Vocoder, config: InteractionConfig) -> None:
        self.vocoder, self.config = vocoder, config
        speech = config.speech_config
        self._tick = config.tick_samples // speech.hop_length  # frames a tick
        reach = speech.vocoder_layers * (speech.vocoder_kernel - 1) + speech.vocoder_window // speech.hop_length - 1
        self._margin = -(-reach // self._tick)
        self._quiet = np.full((self._tick, speech.n_mel_bins), speech.silence_level, np.float32)
        self._frames, self._pieces = Kept(self._analyse), Kept(self._run)
        self._rest = self._run(np.tile(self._quiet, (self._margin + 1, 1)))

    def mel(self, episode: Episode) -> np.ndarray:
        """The ideal frames of an episode, float32 [ticks, frames a tick, bins]: silence where it does not speak."""
        size = self.config.tick_samples
        mel = np.tile(self._quiet, (episode.ticks, 1, 1))
        for start, stop in runs(episode.speaks):  # with the tick after, into which the last frames look
            mel[start:stop] = self._frames(episode.target_audio[start * size : (stop + 1) * size])[: stop - start]
        return mel

    def samples(self, mel: np.ndarray, speaks: np.ndarray) -> np.ndarray:
        """float32 [ticks · samples a tick] in [-1, 1], as a session hands them out."""
        ticks, margin = len(mel), self._margin
        rest = np.repeat(self._rest[margin:], max(0, ticks - margin), 0)  # the same in every tick from here on
        out = np.concatenate([self._rest[: margin + 1], rest])[:ticks]
        for start, stop in runs(speaks, 2 * margin):  # nearer ones share what the vocoder remembers
            begin, end = max(0, start - margin), min(ticks, stop + margin)
            piece = np.ascontiguousarray(mel[begin:end].reshape(-1, mel.shape[-1]))
            made = self._pieces(piece)
            keep = 0 if begin == 0 else margin
            out[begin + keep : end] = made[keep:]
        return np.clip(out.reshape(-1), -1.0, 1.0)

    def _analyse(self, pcm: np.ndarray) -> np.ndarray:
        """Samples of whole ticks → their frames [ticks, frames a tick, bins]."""
        rate = self.config.audio_config.sample_rate
        return speech_mel(pcm, self.config.speech_config, rate).reshape(-1, *self._quiet.shape)

    @torch.no_grad()
    def _run(self, mel: np.ndarray) -> np.ndarray:
        """mel [frames, bins] → samples [ticks, samples a tick], from rest."""
        device = self.vocoder.get_buffer("window").device
        pcm = synthesise(self.vocoder, torch.from_numpy(mel)[None].to(device))
        return pcm.reshape(-1, self.config.tick_samples).cpu().numpy()


def lay_out(
    episode: Episode, config: InteractionConfig, voice: OwnVoice, limit: int | None = None,
    forgiven: Collection[int] = (),
) -> Example:  # fmt: skip
    """The sequence of an episode, of as many whole ticks as fit `limit` positions; choices of `forgiven` ticks do not
    count."""
    tick, ids, example = config.tick_config, token_ids(config), Example(0)
    patches = config.vision_config.positions
    mel = voice.mel(episode)
    own = voice.samples(mel, episode.speaks).reshape(-1, config.audio_config.hop_length)
    typed: list[int] = []
    seen: list[np.ndarray] = []
    frames: list[np.ndarray] = []
    spoke, at, last_clip, ticks = False, 0, -tick.video_every, 0
    said_words = _words(episode)
    shown: dict[int, int] = {}
    for t in range(episode.ticks):
        injected, tokens = episode.injected_tokens(t, ids), episode.output_tokens(t, ids)
        typed += episode.text[t].encode()
        clip = episode.video.get(t) if t - last_clip >= tick.video_every else None
        read, typed = typed[: tick.text_in], typed[tick.text_in :]
        silent = ids.silence in tokens
        tail = [ids.end_of_tick] if tokens[-1] == ids.end_of_tick else [tokens[-1], ids.end_of_tick]
        said = [*tokens[:-1], *tail]
        size = len(injected) + tick.audio_in + len(read) + len(said) + tick.audio_out + (clip is not None) * patches
        if limit is not None and at + size > limit:
            break
        for token in injected:
            at = _token(example, token, at)
        example.heard += range(at, at + tick.audio_in)
        at += tick.audio_in
        if clip is not None:
            example.seen += range(at, at + patches)
            at, last_clip = at + patches, t
            shown[t] = at - 1
            seen.append(clip)
        for token in read:
            at = _token(example, token, at)
        for n, token in enumerate(said):
            if n < len(tokens):
                example.choices.append(at - 1)
                example.chosen.append(token)
                weight = SPOKEN if not silent else STOPPED if spoke else SILENT
                example.weights.append(0.0 if t in forgiven else weight)
            at = _token(example, token, at)
        places = range(at, at + tick.audio_out)
        if t in said_words:
            example.meant += [*example.choices[len(example.choices) - len(tokens) :], *places]
            example.words += [said_words[t]] * (len(tokens) + len(places))
        example.own += places
        if not silent:
            example.spoken += places
            frames.append(mel[t].reshape(tick.audio_out, -1))
        at += tick.audio_out
        spoke, ticks = not silent, t + 1
    _events(example, episode, config, shown)
    example.length = at
    example.heard_pcm = episode.audio.reshape(-1, own.shape[1])[: ticks * tick.audio_in]
    # The first position of all hears the silence before the session, each other one the samples before it.
    example.own_pcm = np.concatenate([np.zeros_like(own[:1]), own])[: ticks * tick.audio_out]
    example.clips = np.stack(seen) if seen else example.clips
    example.mel = np.concatenate(frames) if frames else np.zeros((0, mel[0].size // tick.audio_out), np.float32)
    return example


def _words(episode: Episode) -> dict[int, int]:
    """tick → number in `MODEL_WORDS` of the word that is written in it; words that are cut short are left out."""
    found: dict[int, int] = {}
    begun, letters = -1, ""
    for t, written in enumerate([*episode.target_text, b" "]):
        if (not written or written.startswith(b" ")) and begun >= 0:
            if letters in MODEL_WORDS:
                found |= dict.fromkeys(range(begun, t), MODEL_WORDS.index(letters))
            begun = -1
        if written.startswith(b" "):
            begun, letters = t, ""
        letters += written.decode("latin-1").strip()
    return found


def _events(example: Example, episode: Episode, config: InteractionConfig, shown: Mapping[int, int]) -> None:
    """Where what is heard and seen can be known: in the position that is heard when it is over and in the next, or in
    the last one of the clip (`shown`: tick → that place)."""
    hop = config.audio_config.hop_length
    for event in episode.events:
        if event.seen:
            places = [shown[t]] if (t := event.sample // config.tick_samples) in shown else []
        else:
            places = example.heard[event.sample // hop : event.sample // hop + 2]
        example.noticed += places
        example.events += [EVENTS.index(event.name)] * len(places)


def _token(example: Example, token: int, at: int) -> int:
    example.text.append(at)
    example.ids.append(token)
    return at + 1


@dataclass
class Batch:
    """Examples side by side, padded at their ends to `length`; places are rows of the flat [batch · length].

    `heard_levels`, `own_levels` int64 [n, bins] are the dMel levels of the positions; the rest is as in `Example`.
    """

    size: int
    length: int
    real: Tensor
    text: Tensor
    ids: Tensor
    heard: Tensor
    heard_levels: Tensor
    own: Tensor
    own_levels: Tensor
    seen: Tensor
    video: Tensor
    choices: Tensor
    chosen: Tensor
    weights: Tensor
    noticed: Tensor
    events: Tensor
    meant: Tensor
    words: Tensor
    spoken: Tensor
    mel: Tensor

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(examples: Sequence[Example], model: InteractionModel) -> Batch:
    """The batch of some examples; levels are computed here, once."""
    size, length = len(examples), max(e.length for e in examples)

    def places(name: str) -> Tensor:
        rows = [np.asarray(getattr(e, name), np.int64) + b * length for b, e in enumerate(examples)]
        return torch.from_numpy(np.concatenate(rows))

    def values(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([v for e in examples for v in getattr(e, name)], dtype=dtype)

    real = torch.zeros(size, length, dtype=torch.bool)
    for b, example in enumerate(examples):
        real[b, : example.length] = True
    clips = [e.clips.reshape(-1, e.clips.shape[3] * 3) for e in examples if e.clips.ndim == 5]
    columns = model.config.vision_config.width * 3
    return Batch(
        size, length, real, places("text"), values("ids", torch.int64),
        places("heard"), levels_of(model, [e.heard_pcm for e in examples]),
        places("own"), levels_of(model, [e.own_pcm for e in examples]),
        places("seen"), torch.from_numpy(np.concatenate([np.zeros((0, columns), np.uint8), *clips])),
        places("choices"), values("chosen", torch.int64), values("weights", torch.float32),
        places("noticed"), values("events", torch.int64), places("meant"), values("words", torch.int64),
        places("spoken"), torch.from_numpy(np.concatenate([e.mel for e in examples])),
    )  # fmt: skip


@torch.no_grad()
def levels_of(model: InteractionModel, streams: Sequence[np.ndarray]) -> Tensor:
    """dMel levels int64[n, bins] of streams of samples [n, hop], each from its beginning; streams in which nothing
    changes from one window to the next (the model's own silence) cost nothing."""
    tower, hop = model.audio_tower, model.config.audio_config.hop_length
    rest = np.zeros((1, hop), np.float32)  # what a stream's first window begins with
    joined = np.concatenate([part for pcm in streams for part in (rest, pcm)])
    same = np.concatenate([[False], (joined[1:] == joined[:-1]).all(1)])
    again = same & np.concatenate([[False], same[:-1]])  # a window of two hops that is the one before
    keep = np.ones(len(joined), bool)
    keep[np.cumsum([0, *(len(pcm) + 1 for pcm in streams[:-1])])] = False
    needed = ~again | np.concatenate([~again[1:], [False]])  # new windows, and the hops that these begin with
    few = torch.from_numpy(joined[needed]).to(tower.get_buffer("window").device)
    levels = tower.levels(few).cpu()[torch.from_numpy(~again[needed])]
    return levels[torch.from_numpy(np.cumsum(~again) - 1)][torch.from_numpy(keep)]


def embed(model: InteractionModel, batch: Batch) -> Tensor:
    """The embedded positions x[batch, length, d]."""
    x = torch.zeros(batch.size * batch.length, model.text_config.hidden_size, device=batch.real.device)
    levels = torch.cat([batch.heard_levels, batch.own_levels])
    sound = embed_levels(model.audio_tower, levels)
    heard, own = sound.split([len(batch.heard), len(batch.own)])
    rows = [model.model.embed_tokens(batch.ids[:, None]), heard, own + model.self_voice]
    where = [batch.text, batch.heard, batch.own]
    if len(batch.seen):
        rows.append(model.vision_tower(batch.video))
        where.append(batch.seen)
    return x.index_copy(0, torch.cat(where), torch.cat(rows)).view(batch.size, batch.length, -1)
