"""Sound and pictures: dMel levels, patches in fold order, overlap-add of the vocoder."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.position import cos_sin
from tmlc.kernels.triton.registry import Call, launch, lowering

MOST_OVERLAP = 8192


@device
def spectrum_kernel(
    magnitude, pcm, window, tail, slots, n, width, hop, pcm_stride, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr
):
    """float64 |DFT| of one windowed frame, clamped at 1e-5; grid (frames, blocks of frequencies).

    The angle of sample t at frequency f is 2π·(f·t mod W)/W: whole numbers, so it loses nothing at high frequencies.
    """
    row = tl.program_id(0).to(tl.int64)
    session, i = row // n, row % n
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    held = tail + tl.load(slots + session) // 4
    real, imaginary = tl.zeros((BLOCK_F,), tl.float64), tl.zeros((BLOCK_F,), tl.float64)
    before = width - hop  # samples of the tail
    for start in range(0, width, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        source = i * hop + t - before  # place among the session's new samples
        inside = t < width
        old = tl.load(held + source + before, mask=inside & (source < 0), other=0.0)
        fresh_row = session * n + source // hop
        new = tl.load(pcm + fresh_row * pcm_stride + source % hop, mask=inside & (source >= 0), other=0.0)
        sample = tl.where(source < 0, old, new).to(tl.float64)
        sample = sample * tl.load(window + t, mask=inside, other=0.0).to(tl.float64)
        turn = (f[:, None] * t[None, :]) % width
        cos, sin = cos_sin(turn.to(tl.float64) * (6.283185307179586 / width.to(tl.float64)))
        real += tl.sum(cos * sample[None, :], 1)
        imaginary += tl.sum(sin * sample[None, :], 1)
    power_ = real * real + imaginary * imaginary
    bins = width // 2 + 1
    tl.store(magnitude + row * bins + f, tl.sqrt(tl.maximum(power_, 1e-10)), mask=f < bins)


@device
def mel_level_kernel(
    levels_out, magnitude, filters, bins, bands, out_stride,
    LO: tl.constexpr, HI: tl.constexpr, LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The nearest of LEVELS centres of log10(filters · magnitude); grid (frames, blocks of bands)."""
    row = tl.program_id(0).to(tl.int64)
    band = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mel = tl.zeros((BLOCK_B,), tl.float64)
    for start in range(0, bins, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        inside = f < bins
        share = tl.load(filters + band[:, None] * bins + f[None, :], mask=(band < bands)[:, None] & inside[None, :],
                        other=0.0)  # fmt: skip
        value = tl.load(magnitude + row * bins + f, mask=inside, other=0.0)
        mel += tl.sum(share.to(tl.float64) * value[None, :], 1)
    lo = tl.full((BLOCK_B,), LO, tl.float64)
    hi = tl.full((BLOCK_B,), HI, tl.float64)
    value = tl.log(tl.maximum(mel, 1e-10)) * 0.4342944819032518
    value = tl.minimum(tl.maximum(value, lo), hi)
    level = tl.zeros((BLOCK_B,), tl.int32)
    below = lo.to(tl.float32).to(tl.float64)
    for i in range(1, LEVELS):
        centre = (lo + (hi - lo) * i / (LEVELS - 1)).to(tl.float32).to(tl.float64)
        level += (value > (below + centre) * 0.5).to(tl.int32)  # in a tie the lower one
        below = centre
    tl.store(levels_out + row * out_stride + band, level.to(levels_out.dtype.element_ty), mask=band < bands)


@device
def shift_tail_kernel(tail, pcm, slots, counts, n, per, hop, held, pcm_stride, BLOCK: tl.constexpr):
    """The last `held` samples of tail and new samples become the tail; one program a session."""
    session = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + session) * per
    if count == 0:
        return
    at = tail + tl.load(slots + session) // 4
    r = tl.arange(0, BLOCK)
    source = count * hop - held + r
    inside = r < held
    old = tl.load(at + source + held, mask=inside & (source < 0), other=0.0)
    row = session * n + source // hop
    new = tl.load(pcm + row * pcm_stride + source % hop, mask=inside & (source >= 0), other=0.0)
    tl.debug_barrier()  # every thread has read the old samples
    tl.store(at + r, tl.where(source < 0, old, new), mask=inside)


@device
def patchify_kernel(
    out, video, frames, height, across, up, rows_in_clip, leaves, leaf, video_stride, out_stride,
    FOLDS: tl.constexpr, DEPTH: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (video/255 - mean)/std with pixels in nested fold order; grid (rows of out, blocks of a leaf)."""
    row = tl.program_id(0).to(tl.int64)
    clip, rest = row // rows_in_clip, row % rows_in_clip
    patch, code = rest // leaves, rest % leaves
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < leaf
    channel, index = col % 3, col // 3
    # The digits of a leaf's number and of a place inside it, innermost fold first: (t, y, x) of each fold.
    t, y, x = index * 0, index * 0, index * 0
    t_step, s_step = 1, 1
    for i in tl.static_range(DEPTH):
        if i == 0:
            digit = index
        else:
            digit = index * 0 + (code % (FOLDS[2 * i] * FOLDS[2 * i + 1] * FOLDS[2 * i + 1])).to(tl.int32)
            code = code // (FOLDS[2 * i] * FOLDS[2 * i + 1] * FOLDS[2 * i + 1])
        x += digit % FOLDS[2 * i + 1] * s_step
        y += digit // FOLDS[2 * i + 1] % FOLDS[2 * i + 1] * s_step
        t += digit // (FOLDS[2 * i + 1] * FOLDS[2 * i + 1]) * t_step
        t_step = t_step * FOLDS[2 * i]
        s_step = s_step * FOLDS[2 * i + 1]
    y += (patch // across).to(tl.int32) * PATCH
    x += (patch % across).to(tl.int32) * PATCH
    line = (clip * frames + t) * height + y
    pixel = tl.load(video + line * video_stride + x * 3 + channel, mask=inside, other=0).to(tl.float32)
    mean = tl.where(channel == 0, MEAN[0], tl.where(channel == 1, MEAN[1], MEAN[2]))
    std = tl.where(channel == 0, STD[0], tl.where(channel == 1, STD[1], STD[2]))
    value = tl.div_rn(tl.div_rn(pixel, pixel * 0.0 + 255.0) - mean, std)
    tl.store(out + row * out_stride + col, value, mask=inside)


@device
def overlap_sample(
    frames, window, overlap, session, n, count, s, inside, width, hop, frames_stride, MOST: tl.constexpr
):
    """Sample s of a session: what was open, then its frames, oldest first."""
    total = tl.load(overlap + s, mask=inside & (s < width - hop), other=0.0)
    newest = s // hop
    for back in range(MOST - 1, -1, -1):
        i = newest - back
        place = s - i * hop
        live = inside & (i >= 0) & (i < count) & (place < width)
        value = tl.load(frames + (session * n + i) * frames_stride + place, mask=live, other=0.0)
        total += value * tl.load(window + place, mask=live, other=0.0)
    return total


@device
def overlap_add_kernel(
    pcm, frames, window, overlap, slots, counts, n, per, width, hop, frames_stride, pcm_stride,
    MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The samples that are ready; grid (rows, blocks of a hop)."""
    row = tl.program_id(0).to(tl.int64)
    session, i = row // n, (row % n).to(tl.int32)
    count = tl.load(counts + session) * per
    if i >= count:
        return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = overlap + tl.load(slots + session) // 4
    value = overlap_sample(
        frames, window, held, session, n, count, i * hop + col, col < hop, width, hop, frames_stride, MOST
    )
    tl.store(pcm + row * pcm_stride + col, value, mask=col < hop)


@device
def overlap_rest_kernel(
    frames, window, overlap, slots, counts, n, per, width, hop, frames_stride, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    """The samples that stay open; one program a session."""
    session = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + session) * per
    if count == 0:
        return
    held = overlap + tl.load(slots + session) // 4
    r = tl.arange(0, BLOCK)
    inside = r < width - hop
    value = overlap_sample(
        frames, window, held, session, n, count, count * hop + r, inside, width, hop, frames_stride, MOST
    )
    tl.debug_barrier()  # every thread has read the old samples
    tl.store(held + r, value, mask=inside)


@lowering("dmel_state")
def lower_dmel(call: Call) -> Lowered:
    pcm, window, filters = call.operand("pcm"), call.operand("window"), call.operand("filters")
    tail, out = call.operand("tail"), call.outputs[0]
    width, hop, bands = window.cols * window.rows[1], pcm.cols, filters.rows[1]
    bins, rows, n = width // 2 + 1, call.rows(pcm), call.bucket.session_rows(pcm.rows)
    call.need(width - hop <= MOST_OVERLAP, f"a tail of {width - hop} samples", f"up to {MOST_OVERLAP} are supported")
    call.need(width < 1 << 15, f"a window of {width} samples")
    call.need(pcm.rows[0] > 0 == pcm.rows[1], f"rows {pcm.rows[0]}n+{pcm.rows[1]} belong to no positions")
    magnitude = Pointer("scratch", "", 0, "f64", rows * bins * 8)
    shared: dict[str, Any] = {
        "pcm": call.pointer(pcm), "tail": call.pointer(tail), "slots": call.slots, "n": n, "hop": hop,
        "pcm_stride": pcm.stride,
    }  # fmt: skip
    block_f = 16
    values = shared | {"magnitude": magnitude, "window": call.pointer(window), "width": width}
    launches = [launch("spectrum_kernel", (rows, -(-bins // block_f)), values, {"BLOCK_F": block_f, "BLOCK_T": 128}, 4)]
    values = {
        "levels_out": call.pointer(out, ("i32", "i64")), "magnitude": magnitude, "filters": call.pointer(filters),
        "bins": bins, "bands": bands, "out_stride": out.stride,
    }  # fmt: skip
    fixed = {
        "LO": float(call.attrs["lo"]), "HI": float(call.attrs["hi"]), "LEVELS": int(call.attrs["levels"]),
        "BLOCK_B": 16, "BLOCK_F": 128,
    }  # fmt: skip
    launches.append(launch("mel_level_kernel", (rows, -(-bands // 16)), values, fixed, 4))
    if width > hop:
        block = power(width - hop)
        values = shared | {"counts": call.counts, "held": width - hop, "per": pcm.rows[0]}
        launches.append(launch("shift_tail_kernel", (call.bucket.batch,), values, {"BLOCK": block}, 4))
    return Lowered(tuple(launches), magnitude.nbytes)


@lowering("patchify")
def lower_patchify(call: Call) -> Lowered:
    video, out = call.operand("video"), call.outputs[0]
    frames, height, patch = (int(call.attrs[name]) for name in ("frames", "height", "patch"))
    folds = tuple(int(size) for size in call.attrs["folds"])
    times, spaces = folds[0::2], folds[1::2]
    leaves = 1
    for t, s in zip(times[1:], spaces[1:], strict=True):
        leaves *= t * s * s
    up, across = height // patch, video.cols // 3 // patch
    block = min(1024, power(out.cols, 32))
    values: dict[str, Any] = {
        "out": call.pointer(out), "video": call.pointer(video, ("u8",)), "frames": frames, "height": height,
        "across": across, "up": up, "rows_in_clip": up * across * leaves, "leaves": leaves, "leaf": out.cols,
        "video_stride": video.stride, "out_stride": out.stride,
    }  # fmt: skip
    mean, std = (tuple(float(v) for v in call.attrs[name]) for name in ("mean", "std"))
    fixed = {"FOLDS": folds, "DEPTH": len(times), "MEAN": mean, "STD": std, "PATCH": patch, "BLOCK": block}
    grid = (call.rows(out), -(-out.cols // block))
    return Lowered((launch("patchify_kernel", grid, values, fixed, 4 if block > 256 else 1),))


@lowering("overlap_add_state")
def lower_overlap_add(call: Call) -> Lowered:
    frames, window, overlap = call.operand("frames"), call.operand("window"), call.operand("overlap")
    out, hop, width = call.outputs[0], int(call.attrs["hop"]), frames.cols
    call.need(width - hop <= MOST_OVERLAP, f"an overlap of {width - hop} samples")
    call.need(frames.rows[0] > 0 == frames.rows[1], f"rows {frames.rows[0]}n+{frames.rows[1]} belong to no positions")
    shared: dict[str, Any] = {
        "frames": call.pointer(frames), "window": call.pointer(window), "overlap": call.pointer(overlap),
        "slots": call.slots, "counts": call.counts, "n": call.bucket.session_rows(frames.rows),
        "per": frames.rows[0], "width": width, "hop": hop,
        "frames_stride": Aligned(frames.stride),
    }  # fmt: skip
    most, block = -(-width // hop), min(1024, power(hop, 32))
    values = shared | {"pcm": call.pointer(out), "pcm_stride": out.stride}
    grid = (call.rows(out), -(-hop // block))
    launches = [launch("overlap_add_kernel", grid, values, {"MOST": most, "BLOCK": block}, 4)]
    if width > hop:
        rest = {"MOST": most, "BLOCK": power(width - hop, 32)}
        launches.append(launch("overlap_rest_kernel", (call.bucket.batch,), shared, rest, 4))
    return Lowered(tuple(launches))
