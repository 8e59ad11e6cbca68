"""The two stages of training: the vocoder alone, then everything else with that vocoder.

A stage knows what it trains, draws the batch of a step (keyed by seed and step, so that a run can stop and go on
anywhere), and computes the loss.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..backbone import MoE, unembed
from ..modeling import InteractionModel
from ..tasks import TASKS, SpeechBank
from .late import late
from .noticing import Noticing
from .parallel import Load, hidden_states
from .sequence import Batch, OwnVoice, collate, embed, lay_out, levels_of
from .vocoder import VoiceClips, vocoder_loss

BESIDE = "noticing."
"""How names of tensors begin that are trained and are not the model's."""
HELD_OUT = 6
"""Episodes a task on which the weights are checked."""


@dataclass(frozen=True)
class Settings:
    """Of one stage. `steps` is where its schedule ends; what else there is changes what it learns."""

    seed: int = 0
    steps: int = 3000
    size: int = 8
    rate: float = 2e-3
    warm_up: int = 100
    cool_down: float = 0.25
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    average: float = 0.999

    def rate_at(self, step: int) -> float:
        """Linear warm-up, constant, and over the last `cool_down` of the steps half a cosine to a fiftieth."""
        begin = self.steps * (1.0 - self.cool_down)
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        if step < begin:
            return self.rate
        part = min(1.0, (step - begin) / max(1.0, self.steps - begin))
        return self.rate * (0.02 + 0.98 * 0.5 * (1.0 + float(np.cos(np.pi * part))))


@dataclass(frozen=True)
class Share:
    """One of `of` equal parts of each batch."""

    index: int = 0
    of: int = 1


WHOLE = Share()


class Stage(ABC):
    """What is trained, and on what.

    Attributes:
        name: of the files of its state.
        tensors: name → parameter or buffer, by the names of the model's state_dict.
        share: of each batch that is drawn here; `size` is that of the share.
    """

    name: str

    def __init__(self, model: InteractionModel, settings: Settings, share: Share = WHOLE) -> None:
        self.model, self.settings, self.share = model, settings, share
        self.size = settings.size // share.of
        self.tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if self._trains(n, t)}

    @abstractmethod
    def _trains(self, name: str, tensor: Tensor) -> bool: ...

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step over the share, and what to log of it."""

    def after(self) -> dict[str, float]:
        """What is changed by counting and not by gradients, once a step; what to log of it."""
        return {}

    def check(self) -> dict[str, Any]:
        """How the weights do on what they were not trained on; what to log of it."""
        return {}

    def describe(self) -> dict[str, Any]:
        return asdict(self.settings)

    def rng(self, purpose: str, step: int) -> np.random.Generator:
        """The random numbers of one purpose at one step; those of two purposes, steps or shares are independent."""
        key = zlib.crc32(f"{self.name} {purpose}".encode())
        return np.random.default_rng([self.settings.seed, key, step, self.share.index])


class VocoderStage(Stage):
    """mel frames of the model's voice → its samples."""

    name = "vocoder"

    def __init__(self, model: InteractionModel, settings: Settings, bank: SpeechBank, share: Share = WHOLE) -> None:
        super().__init__(model, settings, share)
        self.clips = VoiceClips(model.config, bank)

    def _trains(self, name: str, tensor: Tensor) -> bool:
        return name.startswith("vocoder.") and isinstance(tensor, nn.Parameter)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        device = self.model.self_voice.device
        mel, pcm, on_grid = (t.to(device) for t in self.clips.batch(self.size, self.rng("pieces", step)))
        return vocoder_loss(self.model.vocoder, mel, pcm, on_grid)


@dataclass(frozen=True)
class Mixture:
    """Which episodes a batch is drawn from, and how its inputs are disturbed.

    Attributes:
        tasks: names, each as likely as the others.
        limit: positions that an episode is cut to, in whole ticks.
        group: steps whose episodes are drawn together and sorted by length, so that little is padded.
        jitter: greatest part of the dMel levels of an episode that is moved by one, up or down: the model's own voice
            is then never quite what it was, as it won't be when it speaks freely.
        late: part of the runs of speech that begin a tick later than they should (`late.py`).
        deaf: part of the ticks in which the model hears nothing of itself. It must know from the conversation what it
            is saying: in training its own voice tells it, but while it learns to speak, that voice says anything.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    limit: int = 1000
    group: int = 8
    jitter: float = 0.15
    late: float = 0.15
    deaf: float = 0.2


class ModelStage(Stage):
    """Stems, backbone, text head and flow head, on whole episodes under teacher forcing.

    The loss is the weighted cross-entropy of every choice of the text head plus one of `speech_weights` times the
    flow-matching loss wherever the model speaks. The router's correction bias is moved towards even loads by counting
    (Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024). Beside it `Noticing`
    names what is heard and seen, from below the upper half of the layers; it is no part of the model.
    """

    name = "model"
    speech_weights = (0.1, 0.5)
    listens = 3000  # steps with the first weight: what to say is learned before how it sounds
    balance_rate = 1e-3

    def __init__(
        self, model: InteractionModel, settings: Settings, bank: SpeechBank, mixture: Mixture, share: Share = WHOLE
    ) -> None:
        super().__init__(model, settings, share)
        self.bank, self.mixture = bank, mixture
        self.voice = OwnVoice(model.vocoder, model.config)
        self.noticing = Noticing(model.text_config.hidden_size, settings.seed).to(model.self_voice.device)
        self.tensors |= {BESIDE + n: p for n, p in self.noticing.named_parameters()}
        self._load = Load()
        self._routers = [m.gate for m in model.modules() if isinstance(m, MoE)]
        self._group: tuple[int, list[list[int]], list[Any]] = (-1, [], [])
        hop = model.config.audio_config.hop_length
        self._silence = levels_of(model, [np.zeros((1, hop), np.float32)])
        self._held_out: dict[str, list[Batch]] = {}

    def _trains(self, name: str, tensor: Tensor) -> bool:
        return not name.startswith("vocoder.") and (isinstance(tensor, nn.Parameter) or "correction_bias" in name)

    def describe(self) -> dict[str, Any]:
        weights = {"speech_weights": self.speech_weights, "listens": self.listens}
        return {**super().describe(), "mixture": asdict(self.mixture), **weights}

    def batch(self, step: int) -> Batch:
        """The batch of a step: the same whenever it is asked for."""
        group, place = divmod(step, self.mixture.group)
        if self._group[0] != group:
            rng = self.rng("episodes", group)
            drawn = [(str(rng.choice(self.mixture.tasks)), int(rng.integers(1 << 31)))
                     for _ in range(self.mixture.group * self.size)]  # fmt: skip
            episodes = (TASKS[task].episode(seed, "train", self.bank) for task, seed in drawn)
            moved = (late(episode, self.mixture.late, rng) for episode in episodes)
            made = [lay_out(e, self.model.config, self.voice, self.mixture.limit, ticks) for e, ticks in moved]
            order = np.argsort([e.length for e in made], kind="stable").reshape(self.mixture.group, -1)
            self._group = (group, order[rng.permutation(self.mixture.group)].tolist(), made)
        _, order_, made = self._group
        batch = collate([made[i] for i in order_[place]], self.model)
        self._disturb(batch, self.rng("levels", step))
        return batch.to(self.model.self_voice.device)

    def _disturb(self, batch: Batch, rng: np.random.Generator) -> None:
        top = self.model.config.audio_config.mel_vocab_size - 1
        for levels, places in ((batch.heard_levels, batch.heard), (batch.own_levels, batch.own)):
            part = rng.uniform(0.0, self.mixture.jitter, batch.size)[places.numpy() // batch.length, None]
            moved = np.where(rng.random(levels.shape) < part, rng.integers(0, 2, levels.shape) * 2 - 1, 0)
            levels += torch.from_numpy(moved)
            levels.clamp_(0, top)
        ticks = len(batch.own) // self.model.config.tick_config.audio_out
        deaf = np.repeat(rng.random(ticks) < self.mixture.deaf, self.model.config.tick_config.audio_out)
        batch.own_levels[torch.from_numpy(deaf)] = self._silence

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch, self._load = self.batch(step), Load()
        seed = int(self.rng("flow", step).integers(1 << 62))
        weight = self.speech_weights[step >= self.listens]
        return model_loss(self.model, self.noticing, batch, weight, seed, self._load)

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        worst = 0.0
        for router, counts in zip(self._routers, self._load.counts, strict=True):
            even = counts.float().mean()
            router.get_buffer("e_score_correction_bias").add_(self.balance_rate * torch.sign(even - counts))
            worst = max(worst, float(counts.max() / even))
        return {"busiest_expert": worst}


    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Loss and shares as `model_loss` tells them over `HELD_OUT` episodes a task in the voices of tests, and the
        shares of words that are chosen right a task."""
        if not self._held_out:
            for task in self.mixture.tasks:
                episodes = (TASKS[task].episode(seed, "test", self.bank) for seed in range(HELD_OUT))
                made = [lay_out(e, self.model.config, self.voice, self.mixture.limit) for e in episodes]
                device = self.model.self_voice.device
                self._held_out[task] = [collate([example], self.model).to(device) for example in made]
        each: dict[str, dict[str, float]] = {}
        for task, batches in self._held_out.items():
            told = [model_loss(self.model, self.noticing, b, 0.0, n)[1] for n, b in enumerate(batches)]
            each[task] = means(told)
        return {**means(list(each.values())), "tasks": {task: told["spoken_right"] for task, told in each.items()}}


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the rows that have it; NaN is none."""
    names = {name for row in rows for name in row}
    known = {name: [row[name] for row in rows if row.get(name, np.nan) == row.get(name)] for name in sorted(names)}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def model_loss(
    model: InteractionModel, noticing: Noticing, batch: Batch, speech_weight: float, seed: int, load: Load | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The loss of `ModelStage`, and its parts: cross-entropy of choices, share of them that are right (of <silence>
    and of the rest), loss and share of what is noticed, flow loss. `seed` is of the flow's noise and times."""
    outputs: list[Tensor] = []
    hidden = hidden_states(model.model, embed(model, batch), load, batch.real, outputs).flatten(0, 1)
    logits = unembed(hidden[batch.choices], model.lm_head.weight, model.text_config)
    each = nnf.cross_entropy(logits, batch.chosen, reduction="none")
    text = (each * batch.weights).sum() / batch.weights.sum()
    right = logits.detach().argmax(-1) == batch.chosen
    silent = batch.chosen == model.config.tick_config.silence_token_id
    parts = {"text": float(text.detach())}
    parts |= {"silent_right": _share(right, silent), "spoken_right": _share(right, ~silent)}
    named, parts["noticed"], parts["noticed_right"] = noticing.loss(outputs[len(outputs) // 2 - 1].flatten(0, 1), batch)
    loss = text + noticing.weight * named
    if len(batch.meant):
        meant, parts["meant"], parts["meant_right"] = noticing.meant(hidden, batch)
        loss = loss + noticing.weight * meant
    if len(batch.spoken):
        generator = torch.Generator(device=hidden.device).manual_seed(seed)
        flow = model.speech.loss(hidden[batch.spoken], batch.mel, generator)
        loss = loss + speech_weight * flow
        parts["flow"] = float(flow.detach())
    return loss, {**parts, "positions": float(batch.real.sum())}


def _share(right: Tensor, of: Tensor) -> float:
    return float(right[of].float().mean()) if bool(of.any()) else float("nan")
