"""Lowers dMel levels, video patches and overlap-add."""

from __future__ import annotations

import numpy as np

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.graph import INT_MAX


def dmel_state(c: Call) -> str:
    """In float64, as the reference. A level is the number of midpoints between centres below the value, and it is
    counted before the logarithm is taken: one power of ten for each midpoint instead of a logarithm for each value."""
    g, state = c.g, c.args["tail"]
    hop, width = c.cols("pcm"), c.cols("window")
    rest = width - hop
    samples = g.reshape(c.x("pcm"), 1, -1)
    if rest:
        samples = g.concat([c.states.read(state), samples], 1)
        c.states.write(state, g.slice(samples, -rest, INT_MAX, 1, c.states.next_name(state)))
    start = g.unsqueeze(g.op("Mul", c.upto(c.rows("pcm")), g.constant(hop, "i64")), 1)
    index = g.op("Add", start, g.constant(np.arange(width)[None], "i64"))
    frames = g.cast(g.op("Gather", g.reshape(samples, -1), index, axis=0), "f64")
    windowed = g.op("Mul", frames, g.cast(c.row("window"), "f64"))
    spectrum = g.op("DFT", g.unsqueeze(windowed, 2), None, g.constant(1, "i64"), onesided=1)
    power = g.op("ReduceSumSquare", spectrum, g.ints(2), keepdims=0)
    least = g.constant(1e-10, "f64")
    size = g.op("Sqrt", g.op("Max", power, least))
    filters = g.transpose(g.cast(c.matrix("filters"), "f64"), 1, 0)
    mel = g.unsqueeze(g.op("Max", g.op("MatMul", size, filters), least), 2)
    centres = np.linspace(c.args["lo"], c.args["hi"], c.args["levels"]).astype(np.float32).astype(np.float64)
    limits = g.constant(10.0 ** ((centres[1:] + centres[:-1]) / 2), "f64")
    return g.sum(g.cast(g.op("Greater", mel, limits), "i64"), 2)


def patchify(c: Call) -> str:
    g, folds = c.g, c.args["folds"]
    times, spaces = list(folds[0::2])[::-1], list(folds[1::2])[::-1]
    depth, patch = len(times), c.args["patch"]
    up, across = c.args["height"] // patch, c.cols("video") // 3 // patch
    pixels = g.reshape(c.x("video"), -1, *times, up, *spaces, across, *spaces, 3)
    t, y, x = 1, 1 + depth + 1, 1 + depth + 1 + depth + 1
    order = [0, y - 1, x - 1]
    for i in range(depth):
        order += [t + i, y + i, x + i]
    wide = g.cast(g.transpose(pixels, *order, x + depth), "f32")
    scaled = g.op("Sub", g.op("Div", wide, g.f32(255.0)), g.constant(c.args["mean"], "f32"))
    even = g.op("Div", scaled, g.constant(c.args["std"], "f32"))
    return g.reshape(even, -1, times[-1] * spaces[-1] ** 2 * 3)


def overlap_add_state(c: Call) -> str:
    """Frames laid hop samples apart, oldest first, on the samples that earlier calls left open."""
    g, state, hop = c.g, c.args["overlap"], c.args["hop"]
    width = c.cols("frames")
    if width == hop:
        raise c.fail("frames that do not overlap keep no state", "Use frames longer than the hop.")
    pieces = -(-width // hop)
    windowed = g.op("Mul", c.x("frames"), c.row("window"))
    if pieces * hop != width:
        windowed = g.op("Pad", windowed, g.ints(0, 0, 0, pieces * hop - width))
    parts = g.reshape(windowed, 0, pieces, hop)
    left = c.states.read(state)
    if (pieces - 1) * hop != width - hop:
        left = g.op("Pad", left, g.ints(0, 0, 0, (pieces - 1) * hop - (width - hop)))
    quiet = g.op("Expand", g.f32(0.0), g.concat([c.rows("frames"), g.ints(hop)], 0))
    out = g.concat([g.reshape(left, pieces - 1, hop), quiet], 0)
    for j in reversed(range(pieces)):
        piece = g.squeeze(g.slice(parts, j, j + 1, 1), 1)
        out = g.op("Add", out, g.op("Pad", piece, g.ints(j, 0, pieces - 1 - j, 0)))
    rest = g.reshape(g.slice(out, c.rows("frames"), INT_MAX, 0), 1, (pieces - 1) * hop)
    c.states.write(state, g.slice(rest, 0, width - hop, 1, c.states.next_name(state)))
    return g.slice(out, g.ints(0), c.rows("frames"), 0)
