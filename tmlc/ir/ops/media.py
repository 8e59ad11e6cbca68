"""Sound and pictures in and out: dMel levels, hMLP patches, and overlap-add; with the streaming forms."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tmlc.ir.ops.registry import exact, matrix, need, op, vector, wide
from tmlc.ir.types import TensorType


def _dmel(pcm: TensorType, window: TensorType, filters: TensorType, lo: float, hi: float, levels: int) -> TensorType:
    n, hop = matrix(pcm, "pcm")
    width = vector(window, "window")
    bands, bins = matrix(filters, "filters")
    need(hop <= width, f"rows of {hop} samples are longer than the window of {width}")
    need(width % 2 == 0 and bins == width // 2 + 1, f"filters must have {width}/2+1 columns, not {bins}")
    need(levels >= 2 and lo < hi, f"{levels} levels between {lo} and {hi}")
    return TensorType("i64", (n, bands))


@op("dmel(Tensor pcm, Tensor window, Tensor filters, float lo, float hi, int levels) -> Tensor", _dmel)
def dmel(pcm: Tensor, window: Tensor, filters: Tensor, lo: float, hi: float, levels: int) -> Tensor:
    """Levels of the log-mel spectrum of the W samples that end at each row; silence before the first."""
    return _levels(pcm, pcm.new_zeros(1, window.shape[-1] - pcm.shape[1]), window, filters, lo, hi, levels)


def _levels(pcm: Tensor, tail: Tensor, window: Tensor, filters: Tensor, lo: float, hi: float, levels: int) -> Tensor:
    """In float64: the nearest float32 centre wants more digits than a float32 transform has."""
    signal = torch.cat([tail.reshape(-1), pcm.reshape(-1)]).double()
    frames = signal.unfold(0, window.shape[-1], pcm.shape[1]) * window.double().reshape(1, -1)
    spectrum = torch.fft.rfft(frames)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = power.clamp(min=1e-10).sqrt() @ filters.double().T
    log_mel = mel.clamp(min=1e-10).log10().clamp(lo, hi)
    centres = torch.linspace(lo, hi, levels, dtype=torch.float64, device=pcm.device).float().double()
    # The nearest centre, the lower one in a tie: the number of midpoints that lie strictly below.
    return torch.bucketize(log_mel, (centres[1:] + centres[:-1]) / 2, right=False)


def _dmel_state(
    pcm: TensorType,
    window: TensorType,
    filters: TensorType,
    tail: TensorType,
    lo: float,
    hi: float,
    levels: int,
) -> TensorType:
    result = _dmel(pcm, window, filters, lo, hi, levels)
    rest = vector(window, "window") - pcm.shape[1]
    need(tail == TensorType("f32", (1, rest)), f"tail must be f32[1, {rest}], not {tail}")
    return result


@op(
    "dmel_state(Tensor pcm, Tensor window, Tensor filters, Tensor(a!) tail, float lo, float hi, int levels) -> Tensor",
    _dmel_state,
    from_pass=True,
)
def dmel_state(pcm: Tensor, window: Tensor, filters: Tensor, tail: Tensor, lo: float, hi: float, levels: int) -> Tensor:
    """dmel that continues after the samples in `tail`, which becomes the last W-hop samples."""
    out = _levels(pcm, tail, window, filters, lo, hi, levels)
    tail.copy_(torch.cat([tail, pcm.reshape(1, -1)], 1)[:, pcm.numel() :])
    return out


def _patchify(
    video: TensorType,
    frames: int,
    height: int,
    patch: int,
    folds: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> TensorType:
    rows, cols = matrix(video, "video", ("u8",))
    times, spaces = folds[0::2], folds[1::2]
    need(len(times) == len(spaces) > 0, f"folds must be pairs t, s: {list(folds)}")
    need(prod(times) == frames and prod(spaces) == patch, f"folds {list(folds)} are not {frames} x {patch}")
    need(len(mean) == len(std) == 3, "mean and std must have three numbers")
    across = exact(exact(cols, 3, "columns of video per pixel"), patch, "width per patch")
    clips = exact(rows, frames * height, "rows of video per clip")
    leaves = prod(t * s * s for t, s in zip(times[1:], spaces[1:], strict=True))
    count = exact(height, patch, "height per patch") * across * leaves
    return TensorType("f32", (clips * count, times[0] * spaces[0] ** 2 * 3))


@op(
    "patchify(Tensor video, int frames, int height, int patch, int[] folds, float[] mean, float[] std) -> Tensor",
    _patchify,
)
def patchify(
    video: Tensor,
    frames: int,
    height: int,
    patch: int,
    folds: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """(v/255 - mean)/std of clips, cut into patches whose pixels are in nested fold order.

    `folds` is t_1, s_1, t_2, s_2, … inner to outer. Rows: clip, patch (row-major), then the folds from the
    outermost to the second, each over (t, y, x). A row is one block of the first fold, in (t, y, x, channel)
    order; so after fold i the next input is a plain reshape.
    """
    times, spaces = (
        list(folds[0::2])[::-1],
        list(folds[1::2])[::-1],
    )  # outermost first, as the digits of an index
    depth = len(times)
    up, across = height // patch, video.shape[1] // 3 // patch
    pixels = video.reshape(-1, *times, up, *spaces, across, *spaces, 3)
    t, y, x = 1, 1 + depth + 1, 1 + depth + 1 + depth + 1
    order = [0, y - 1, x - 1]
    for i in range(depth):
        order += [t + i, y + i, x + i]
    pixels = pixels.permute(*order, x + depth).to(torch.float32)
    mean_row, std_row = (torch.tensor(v, dtype=torch.float32, device=video.device) for v in (mean, std))
    return ((pixels / 255 - mean_row) / std_row).reshape(-1, times[-1] * spaces[-1] ** 2 * 3)


def _overlap_add(frames: TensorType, window: TensorType, hop: int) -> TensorType:
    n, width = matrix(frames, "frames")
    need(vector(window, "window") == width, f"window must have {width} columns, not {window}")
    need(0 < hop <= width, f"hop {hop} must be in 1..{width}")
    return TensorType("f32", (n, hop))


@op("overlap_add(Tensor frames, Tensor window, int hop) -> Tensor", _overlap_add)
def overlap_add(frames: Tensor, window: Tensor, hop: int) -> Tensor:
    """Windowed frames laid hop samples apart and summed; row i of the result is ready once frame i is in."""
    return _lay(frames, window, hop, frames.new_zeros(1, frames.shape[1] - hop))[0]


def _lay(frames: Tensor, window: Tensor, hop: int, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """(pcm[n, hop], the samples still open [1, W-hop]); a sample sums its frames oldest first."""
    n, width = frames.shape
    pieces = -(-width // hop)
    windowed = torch.nn.functional.pad(frames * wide(window.reshape(1, -1), frames), (0, pieces * hop - width))
    parts = windowed.reshape(n, pieces, hop)
    start = torch.nn.functional.pad(overlap.reshape(-1), (0, (n + pieces - 1) * hop - (width - hop)))
    out = start.reshape(n + pieces - 1, hop)
    for j in reversed(range(pieces)):
        out = out + torch.nn.functional.pad(parts[:, j], (0, 0, j, pieces - 1 - j))
    return out[:n], out[n:].reshape(1, -1)[:, : width - hop]


def _overlap_add_state(frames: TensorType, window: TensorType, overlap: TensorType, hop: int) -> TensorType:
    result = _overlap_add(frames, window, hop)
    rest = frames.shape[1] - hop
    need(overlap == TensorType("f32", (1, rest)), f"overlap must be f32[1, {rest}], not {overlap}")
    return result


@op(
    "overlap_add_state(Tensor frames, Tensor window, Tensor(a!) overlap, int hop) -> Tensor",
    _overlap_add_state,
    from_pass=True,
)
def overlap_add_state(frames: Tensor, window: Tensor, overlap: Tensor, hop: int) -> Tensor:
    """overlap_add that begins with the open samples in `overlap` and leaves the new ones there."""
    pcm, rest = _lay(frames, window, hop, overlap)
    overlap.copy_(rest)
    return pcm
