"""What is heard and seen, named in the middle of the network: a second loss that makes the lower layers listen.

The choices of a conversation say little about the words in it: one answer a turn, and only to some words. Naming each
word where it ends (and each beep, each jump) gives the layers below a lesson every second, as auxiliary recognition
losses do in speech models (Toshniwal et al., "Multitask Learning with Low-Level Auxiliary Tasks for Encoder-Decoder
Based Speech Recognition", 2017).

And what the model says is named from its last layer, the whole word in each of its ticks: "four" and "five" begin with
the same letter and the same sound, and under teacher forcing the ideal voice and letters tell the rest. Speaking freely
it has to know the word from the first tick on.

Both heads are left behind when the training is over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..tasks.episode import EVENTS
from ..tasks.words import MODEL_WORDS
from .sequence import Batch

NOTHING = len(EVENTS)
"""The class of a position in which nothing is over."""
QUIET = 0.1
"""Weight of such a position."""


class Noticing(nn.Module):
    """Linear layers over RMS-normalised hidden states: to `EVENTS` and "nothing", and to `MODEL_WORDS`."""

    weight = 0.3

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.names = nn.Parameter(torch.randn(len(EVENTS) + 1, size, generator=generator) * size**-0.5)
        self.words = nn.Parameter(torch.randn(len(MODEL_WORDS), size, generator=generator) * size**-0.5)

    def loss(self, states: Tensor, batch: Batch) -> tuple[Tensor, float, float]:
        """Weighted cross-entropy over what is heard and seen; the same as a number; share of events that are named
        right. `states` [batch · length, size] are of a layer in the middle."""
        wanted = torch.full((len(states),), NOTHING, device=states.device)
        wanted[batch.noticed] = batch.events
        places = torch.cat([batch.heard, batch.noticed[~torch.isin(batch.noticed, batch.heard)]])
        wanted = wanted[places]
        logits = nnf.rms_norm(states[places], states.shape[-1:]) @ self.names.T
        weights = torch.where(wanted == NOTHING, QUIET, 1.0)
        loss = (nnf.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
        right = (logits.detach().argmax(-1) == wanted)[wanted != NOTHING].float()
        return loss, float(loss.detach()), float(right.mean()) if len(right) else float("nan")

    def meant(self, states: Tensor, batch: Batch) -> tuple[Tensor, float, float]:
        """Cross-entropy of the words that the model says; the same as a number; share of them that are right. `states`
        [batch · length, size] are of the last layer."""
        logits = nnf.rms_norm(states[batch.meant], states.shape[-1:]) @ self.words.T
        loss = nnf.cross_entropy(logits, batch.words)
        return loss, float(loss.detach()), float((logits.detach().argmax(-1) == batch.words).float().mean())
