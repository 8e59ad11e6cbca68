"""The input stems: PCM → dMel positions (audio), frames → hMLP positions (video).

Both are Inkling's (`InklingAudioModel`, `InklingVisionModel` in transformers 5.24), with its parameter names below
`audio_tower.` and `vision_tower.`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tmlc.errors import CheckpointError
from tmlc.ir.ops import functional as F

from .config import AudioConfig, VisionConfig
from .features import audio_constants
from .layers import Linear, RMSNorm, Weight


class AudioTower(nn.Module):
    """pcm[n, hop] → positions [n, d]: 16 levels of 80 mel bins, the sum of one embedding row for each, and a norm."""

    def __init__(self, config: AudioConfig, size: int) -> None:
        super().__init__()
        self.config = config
        table = nn.Module()
        table.embed_audio_tokens = Weight(config.n_mel_bins * config.mel_vocab_size, size)
        self.embed_audio_tokens = table
        self.norm = RMSNorm(size)
        window, filters = audio_constants(config)
        self.register_buffer("window", torch.from_numpy(window))
        self.register_buffer("mel_filters", torch.from_numpy(filters))

    def levels(self, pcm: Tensor) -> Tensor:
        """pcm[n, hop] → levels int64[n, bins]."""
        config = self.config
        return F.dmel(pcm, self.get_buffer("window"), self.get_buffer("mel_filters"),
                      config.dmel_min, config.dmel_max, config.mel_vocab_size)  # fmt: skip

    def embed(self, levels: Tensor) -> Tensor:
        """levels int64[n, bins] → positions [n, d]."""
        table = self.get_parameter("embed_audio_tokens.embed_audio_tokens.weight")
        return self.norm(F.bag_embedding(table, levels, self.config.mel_vocab_size))

    def forward(self, pcm: Tensor) -> Tensor:
        return self.embed(self.levels(pcm))


@dataclass(frozen=True)
class Fold:
    """One layer of the hMLP stem: blocks of t x s x s cells of `inputs / (t·s²)` channels become `outputs` channels."""

    t: int
    s: int
    inputs: int
    outputs: int


def plan_scales(temporal: int, patch: int, layers: int, channels: int) -> list[tuple[int, int, int]]:
    """The (t, s, channels) grid after each layer of the stem; the first entry is the raw pixel.

    Candidates grow by one prime factor at a time, space before time, largest first, with channels rounded up to
    multiples of 64. The layers take those whose sizes lie nearest to an even (logarithmic) progression from one to
    all elements of the patch: each its own nearest when there are enough layers to reuse some, else the assignment
    of least total distance. Distances are float32, as in Inkling, because they decide ties.
    """
    candidates = [(1, 1, channels)]
    s = t = 1
    for factor in reversed(_prime_factors(patch)):
        s *= factor
        candidates.append((1, s, math.ceil(s * s * channels / 64) * 64))
    for factor in reversed(_prime_factors(temporal)):
        t *= factor
        # Inkling's plan has 64 times the elements here where it rounds to 64 above; only stems that fold time in
        # several layers see it, because the last layer's width is the backbone's.
        candidates.append((t, s, s * s * channels * t * 64))
    with torch.device("cpu"):  # a plan is a matter of numbers, also while the model is built on the meta device
        total = torch.log(torch.tensor(patch * patch * temporal * channels))
        ideal = torch.linspace(0, float(total), layers + 1)
        sizes = torch.log(torch.tensor([t * s * s for t, s, _ in candidates]).float())
        cost = (ideal[:, None] - sizes[None, :]).abs()
    if layers >= len(candidates):
        chosen = cost.argmin(dim=1).tolist()
    else:
        chosen = _assign(cost.tolist())
    chosen[0], chosen[-1] = 0, len(candidates) - 1
    return [candidates[index] for index in chosen]


def plan_folds(config: VisionConfig, size: int) -> list[Fold]:
    """The layers of the stem of a configuration, the last one giving `size` channels.

    Raises:
        CheckpointError: the progression of `plan_scales` goes backwards, so no such stem exists.
    """
    scales = plan_scales(
        config.temporal_patch_size, config.patch_size, config.num_hidden_layers, config.num_channels
    )
    folds = []
    for (t0, s0, c0), (t1, s1, c1) in pairwise(scales):
        if t1 % t0 or s1 % s0:
            raise CheckpointError(
                f"no video stem of {config.num_hidden_layers} layers folds patches of {config.patch_size} pixels",
                where="vision_config", fix="use another num_hidden_layers",
            )  # fmt: skip
        t, s = t1 // t0, s1 // s0
        folds.append(Fold(t, s, c0 * t * s * s, c1))
    return [*folds[:-1], Fold(folds[-1].t, folds[-1].s, folds[-1].inputs, size)]


def _prime_factors(number: int) -> list[int]:
    """Prime factors in ascending order."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _assign(cost: list[list[float]]) -> list[int]:
    """A column for each row (no column twice) of least total cost, for at most as many rows as columns.

    Shortest augmenting paths with dual prices (Crouse, "On implementing 2D rectangular assignment algorithms", 2016).
    Distances on a line have many assignments of equal cost, so the order of the search decides: columns are scanned
    from the last to the first, a removed one is replaced by the end of the list, and a free column wins a tie.
    """
    rows, columns = len(cost), len(cost[0])
    row_price, column_price = [0.0] * rows, [0.0] * columns
    column_of, row_of = [-1] * rows, [-1] * columns
    for start in range(rows):
        distance, parent = [math.inf] * columns, [-1] * columns
        waiting = list(range(columns - 1, -1, -1))
        seen_rows, seen_columns = [], []
        row, reached, end = start, 0.0, -1
        while end < 0:
            seen_rows.append(row)
            best, lowest = -1, math.inf
            for place, column in enumerate(waiting):
                through = reached + cost[row][column] - row_price[row] - column_price[column]
                if through < distance[column]:
                    distance[column], parent[column] = through, row
                if distance[column] < lowest or (distance[column] == lowest and row_of[column] < 0):
                    best, lowest = place, distance[column]
            reached, column = lowest, waiting[best]
            waiting[best] = waiting[-1]
            waiting.pop()
            seen_columns.append(column)
            if row_of[column] < 0:
                end = column
            else:
                row = row_of[column]
        row_price[start] += reached
        for other in seen_rows[1:]:
            row_price[other] += reached - distance[column_of[other]]
        for column in seen_columns:
            column_price[column] -= reached - distance[column]
        while end >= 0:
            row = parent[end]
            row_of[end] = row
            column_of[row], end = end, column_of[row]
            if row == start:
                break
    return column_of


class VisionLayer(nn.Module):
    """One fold of the stem: linear, and (except in the last layer) RMSNorm and GELU. Rows come in already folded."""

    def __init__(self, fold: Fold, last: bool) -> None:
        super().__init__()
        self.projection = Linear(fold.inputs, fold.outputs)
        self.layer_norm = None if last else RMSNorm(fold.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        return x if self.layer_norm is None else F.gelu(self.layer_norm(x))


class VisionTower(nn.Module):
    """video uint8[n·T·H, W·3] (clips of T frames, RGB) → positions [n·P, d], one for each patch.

    `patchify` orders the pixels so that every fold is a plain reshape: the stem is linear layers and nothing else.
    """

    def __init__(self, config: VisionConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.folds = plan_folds(config, size)
        last = len(self.folds) - 1
        self.encoder_layers = nn.ModuleList([VisionLayer(fold, i == last) for i, fold in enumerate(self.folds)])
        self.final_norm = RMSNorm(size)

    def forward(self, video: Tensor) -> Tensor:
        config = self.config
        sizes = [number for fold in self.folds for number in (fold.t, fold.s)]
        x = F.patchify(video, config.temporal_patch_size, config.height, config.patch_size, sizes,
                       config.image_mean, config.image_std)  # fmt: skip
        for fold, layer in zip(self.folds, self.encoder_layers, strict=True):
            x = layer(F.reshape(x, fold.inputs))
        return self.final_norm(x)
