"""Sound and pictures: log-mel levels by a transform that is a product, patches by one gather, overlap-add."""

from __future__ import annotations

import numpy as np

from tmlc.emit.tensorrt.graph import Tensor
from tmlc.emit.tensorrt.network import Call, Lower


def _dmel(c: Call) -> Tensor:
    g, pcm = c.g, c.x("pcm")
    hop, window = int(pcm.shape[1]), c.numpy("window").reshape(-1)
    filters = c.numpy("filters")
    width, kept = window.size, window.size - hop
    pieces = -(-kept // hop)  # rows of hop samples that the tail fills
    tail = c.state("tail", "f32", (1, kept))
    front = pieces * hop - kept
    begin = g.concat([g.floats(np.zeros((1, front))), tail], 1) if front else tail
    signal = g.concat([g.reshape(begin, (pieces, hop)), pcm], 0) if pieces else pcm
    size = g.shape(pcm)
    rows = [g.window(signal, (j, 0), size) for j in range(pieces + 1)]
    frames = g.concat(rows, 1) if pieces else pcm
    if front:
        frames = g.columns(frames, 1, front, width)
    if pieces:
        rest = g.reshape(g.window(signal, g.mul(size, g.sizes([1, 0])), (pieces, hop)), (1, pieces * hop))
        c.keep("tail", g.columns(rest, 1, front, kept) if front else rest, "f32")
    angle = 2 * np.pi * np.outer(np.arange(width), np.arange(width // 2 + 1) % width) / width
    parts = []
    for kind, wave in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
        base = (window[:, None].astype(np.float64) * wave).astype(np.float32)
        made = g.once((kind, c.weight_name("window")), lambda base=base: g.floats(base))
        part = g.matmul(frames, made)
        parts.append(g.mul(part, part))
    power = g.add(*parts)
    magnitude = g.unary("SQRT", g.maximum(power, g.number(1e-10, power)))
    mel = g.matmul(magnitude, g.floats(filters.T))
    log = g.times(g.unary("LOG", g.maximum(mel, g.number(1e-10, mel))), 1 / np.log(10.0))
    lo, hi, levels = float(c.args["lo"]), float(c.args["hi"]), int(c.args["levels"])
    log = g.activation("CLIP", log, lo, hi)
    centres = np.linspace(lo, hi, levels).astype(np.float32).astype(np.float64)
    middles = ((centres[1:] + centres[:-1]) / 2).reshape(1, 1, -1)
    above = g.greater(g.reshape(log, (-1, filters.shape[0], 1)), g.floats(middles))
    return g.reshape(g.reduce("SUM", g.cast(above, "i32"), 2), (-1, filters.shape[0]))


def _patchify(c: Call) -> Tensor:
    g, video = c.g, c.x("video")
    frames, height, patch = (int(c.args[name]) for name in ("frames", "height", "patch"))
    folds = [int(v) for v in c.args["folds"]]
    width = int(video.shape[1])
    order = _leaf_order(frames, height, width // 3, patch, folds)
    leaf = folds[0] * folds[1] ** 2 * 3
    clips = g.reshape(g.cast(video, "f32"), (-1, frames * height * width))
    pixels = g.reshape(g.gather(clips, g.integers(order), 1), (-1, leaf))
    mean, std = (np.tile(np.asarray(c.args[name], np.float32), leaf // 3)[None] for name in ("mean", "std"))
    return g.div(g.sub(g.div(pixels, g.number(255.0, pixels)), g.floats(mean)), g.floats(std))


def _leaf_order(frames: int, height: int, across: int, patch: int, folds: list[int]) -> np.ndarray:
    """Which number of a clip stands where in the leaves (docs/plan-format.md, "patchify order")."""
    times, spaces = folds[0::2][::-1], folds[1::2][::-1]  # outermost first
    depth, up, wide = len(times), height // patch, across // patch
    index = np.arange(frames * height * across * 3).reshape(*times, up, *spaces, wide, *spaces, 3)
    y, x = depth, 2 * depth + 1
    order = [y, x]
    for i in range(depth):
        order += [i, y + 1 + i, x + 1 + i]
    return index.transpose(*order, x + depth + 1).reshape(-1)


def _overlap_add(c: Call) -> Tensor:
    g, frames, hop = c.g, c.x("frames"), int(c.args["hop"])
    width = int(frames.shape[1])
    pieces, kept = -(-width // hop), width - hop
    windowed = g.mul(frames, c.floats("window", (1, width)))
    if pieces == 1:
        return windowed
    size = g.add(g.mul(g.shape(frames), g.sizes([1, 0])), g.sizes([pieces - 1, hop]))
    start = g.columns(c.state("overlap", "f32", (1, kept)), 1, 0, (pieces - 1) * hop)
    out = g.window(g.reshape(start, (pieces - 1, hop)), (0, 0), size)
    for j in reversed(range(pieces)):  # a sample sums its frames oldest first
        part = g.columns(windowed, 1, j * hop, hop)
        out = g.add(out, g.window(part, (-j, 0), size))
    rows = g.mul(g.shape(frames), g.sizes([1, 0]))
    rest = g.reshape(g.window(out, rows, (pieces - 1, hop)), (1, (pieces - 1) * hop))
    c.keep("overlap", g.columns(rest, 1, 0, kept), "f32")
    return g.window(out, (0, 0), g.add(rows, g.sizes([0, hop])))


LOWERINGS: dict[str, Lower] = {
    "dmel_state": _dmel,
    "patchify": _patchify,
    "overlap_add_state": _overlap_add,
}
