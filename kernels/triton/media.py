"""Sound and pictures: dMel levels, patches in fold order, overlap-add of the vocoder."""

import math
from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered, Scratch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.position import turned_cos_sin
from tmlc.kernels.triton.registry import Call, launch, lowering

#: Threads of a program of `spectrum_kernel`, samples that each of them asks for at a time, and most float64 numbers of
#: its second sum; programs of a frame.
THREADS, ASKED, MOST_NUMBERS, MOST_PROGRAMS = 256, 16, 2048, 128
#: Samples that a program moves at a time.
MOST_SAMPLES = 1024
#: Values of a program of `patchify_kernel`, four a thread: five programs for each multiprocessor of an H200 where an
#: image has 240 x 240 pixels in two frames.
PIXELS = 512


@device
def part_cos_sin(part, WHOLE: tl.constexpr, STEP: tl.constexpr):
    """(cos, sin) of 2π·part/WHOLE; part int32 from 0 to WHOLE - 1, STEP = 2π/WHOLE.

    The quarter turn is found in whole numbers, so nothing is lost, however many turns were taken off before.
    """
    quarter = (part * 4 + WHOLE // 2) // WHOLE
    rest = part * 4 - quarter * WHOLE  # in quarters of a step
    return turned_cos_sin(rest.to(tl.float64) * tl.full(rest.shape, STEP / 4, tl.float64), quarter & 3)


@device
def spectrum_kernel(
    magnitude, pcm, window, tail, slots, n, pcm_stride,
    WIDTH: tl.constexpr, HOP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BACK: tl.constexpr,
    STEP_A: tl.constexpr, STEP: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, RUN: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """float64 |DFT| of one windowed frame of WIDTH = A·B samples, clamped at 1e-5; grid (frames, residues modulo A).

    Sample t = B·q + r, frequency f = a + A·k: Σ_t x_t·w^(t·f) = Σ_r w^(r·f) · Σ_q x_(B·q + r)·w^(B·q·a), w of order
    WIDTH. A program has one a: its inner sums serve all its frequencies. From one q to the q that a thread takes next
    the angle grows by the same step, so RUN angles are one product each, and the first is exact.
    """
    a, i = tl.program_id(1), tl.program_id(0) % n
    row = tl.program_id(0).to(tl.int64)
    held = tail + tl.load(slots + tl.program_id(0) // n) // 4 + i.to(tl.int64) * HOP
    fresh = pcm + (row - BACK) * pcm_stride
    r = tl.arange(0, BLOCK_B)
    step_cos, step_sin = part_cos_sin(BLOCK_A * a % A, A, STEP_A)
    real, imaginary = tl.zeros((BLOCK_A, BLOCK_B), tl.float64), tl.zeros((BLOCK_A, BLOCK_B), tl.float64)
    for start in range(0, A, BLOCK_A * RUN):
        first = start + tl.arange(0, BLOCK_A)
        cos, sin = part_cos_sin(first * a % A, A, STEP_A)
        for j in tl.static_range(RUN):
            q = first + j * BLOCK_A
            t = q[:, None] * B + r[None, :]
            inside = (q < A)[:, None] & (r < B)[None, :]
            # The frame begins BACK rows of new samples before its own, or inside them; rows before row 0 are the tail.
            place = t + (BACK * HOP - (WIDTH - HOP))
            old = i - BACK + place // HOP < 0
            at = tl.where(old, held + t, fresh + (place // HOP) * pcm_stride + place % HOP)
            sample = tl.load(at, mask=inside, other=0.0).to(tl.float64)
            sample = sample * tl.load(window + t, mask=inside, other=0.0).to(tl.float64)
            real += cos[:, None] * sample
            imaginary += sin[:, None] * sample
            cos, sin = cos * step_cos - sin * step_sin, sin * step_cos + cos * step_sin
    u, v = tl.split(tl.sum(tl.join(real, imaginary), 0))
    u, v = u[None, :], v[None, :]
    f = a + A * tl.arange(0, KEPT)
    cos, sin = part_cos_sin(f[:, None] * r[None, :] % WIDTH, WIDTH, STEP)
    x, y = tl.sum(cos * u - sin * v, 1), tl.sum(sin * u + cos * v, 1)  # of the conjugate: its size is the same
    size = tl.sqrt(tl.maximum(x * x + y * y, tl.full((KEPT,), 1e-10, tl.float64)))
    bins = WIDTH // 2 + 1
    tl.store(magnitude + row * bins + f, size, mask=f < bins)


@device
def mel_centre(level, LO: tl.constexpr, HI: tl.constexpr, STEP: tl.constexpr, LEVELS: tl.constexpr):
    """A centre, float32 as float64: counted from the nearer end, as `torch.linspace` does."""
    up = level.to(tl.float64) * STEP + LO
    down = (level - (LEVELS - 1)).to(tl.float64) * STEP + HI
    return tl.where(level < LEVELS // 2, up, down).to(tl.float32).to(tl.float64)


@device
def shift_tail(
    tail, pcm, slots, counts, session, n, per, pcm_stride,
    HOP: tl.constexpr, HELD: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last HELD samples of tail and new samples become the tail.

    A sample moves to a lower place or stays: pieces in ascending order read nothing that an earlier one has written.
    """
    count = tl.load(counts + session) * per
    at = tail + tl.load(slots + session) // 4
    fresh = pcm + (session.to(tl.int64) * n + count - BACK) * pcm_stride
    for start in range(0, HELD, BLOCK):
        r = start + tl.arange(0, BLOCK)
        inside = (r < HELD) & (count > 0)
        place = r + (BACK * HOP - HELD)  # counted from BACK rows before the end of the new samples
        old = count - BACK + place // HOP < 0
        source = tl.where(old, at + count.to(tl.int64) * HOP + r, fresh + (place // HOP) * pcm_stride + place % HOP)
        sample = tl.load(source, mask=inside, other=0.0)
        tl.debug_barrier()  # every thread has read the old samples
        tl.store(at + r, sample, mask=inside)


@device
def mel_level_kernel(
    levels_out, magnitude, filters, pcm, tail, slots, counts, n, per, bands, out_stride, pcm_stride,
    BINS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, STEP: tl.constexpr, LEVELS: tl.constexpr,
    HOP: tl.constexpr, HELD: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The nearest of LEVELS centres of log10(filters · magnitude), and the tail moved on; grid (frames, bands + 1).

    The last program of a session's first frame moves the tail: the spectra, which read it, are complete.
    """
    row = tl.program_id(0).to(tl.int64)
    band = tl.program_id(1)
    if band < bands:
        shares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, BINS, BLOCK):
            f = start + tl.arange(0, BLOCK)
            share = tl.load(filters + band * BINS + f, mask=f < BINS, other=0.0)
            value = tl.load(magnitude + row * BINS + f, mask=f < BINS, other=0.0)
            shares += share.to(tl.float64) * value
        lo, hi = tl.full((), LO, tl.float64), tl.full((), HI, tl.float64)
        value = tl.log(tl.maximum(tl.sum(shares, 0), tl.full((), 1e-10, tl.float64))) * 0.4342944819032518
        value = tl.minimum(tl.maximum(value, lo), hi)
        # The centres are even but for their rounding to float32, so the nearest is this one or beside it.
        level = tl.minimum(((value - lo) * (1.0 / STEP) + 0.5).to(tl.int32), LEVELS - 1)
        here = mel_centre(level, LO, HI, STEP, LEVELS)
        below = (mel_centre(level - 1, LO, HI, STEP, LEVELS) + here) * 0.5
        above = (here + mel_centre(level + 1, LO, HI, STEP, LEVELS)) * 0.5
        level = level + (value > above).to(tl.int32) - (value <= below).to(tl.int32)  # in a tie the lower one
        tl.store(levels_out + row * out_stride + band, level.to(levels_out.dtype.element_ty))
    elif tl.program_id(0) % n == 0:
        shift_tail(tail, pcm, slots, counts, tl.program_id(0) // n, n, per, pcm_stride, HOP, HELD, BACK, BLOCK_R)


@device
def patchify_kernel(
    out, video, count,
    LEAF: tl.constexpr, STRIDE: tl.constexpr, LEAVES: tl.constexpr, UP: tl.constexpr, ACROSS: tl.constexpr,
    PATCH: tl.constexpr, FRAMES: tl.constexpr, HEIGHT: tl.constexpr, LINE: tl.constexpr,
    FOLDS: tl.constexpr, DEPTH: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (video/255 - mean)/std with pixels in nested fold order; grid (blocks of the `count` values of out).

    A program has values that follow each other, of several leaves (rows of out): a thread stores whole 16 bytes. Sizes
    are constants, so that what a value is of takes products and shifts and no division.
    """
    place = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    inside = place < count
    row, col = place // LEAF, place % LEAF
    code, patch, clip = row % LEAVES, row // LEAVES % (UP * ACROSS), row // (LEAVES * UP * ACROSS)
    channel, index = col % 3, col // 3
    # The digits of a place inside a leaf and of a leaf's number, innermost fold first: (t, y, x) of each fold.
    t, y, x = clip * FRAMES, patch // ACROSS * PATCH, patch % ACROSS * PATCH
    t_step, s_step = 1, 1
    for i in tl.static_range(DEPTH):
        digit = index
        if i > 0:
            digit = code % (FOLDS[2 * i] * FOLDS[2 * i + 1] * FOLDS[2 * i + 1])
            code = code // (FOLDS[2 * i] * FOLDS[2 * i + 1] * FOLDS[2 * i + 1])
        x += digit % FOLDS[2 * i + 1] * s_step
        y += digit // FOLDS[2 * i + 1] % FOLDS[2 * i + 1] * s_step
        t += digit // (FOLDS[2 * i + 1] * FOLDS[2 * i + 1]) * t_step
        t_step = t_step * FOLDS[2 * i]
        s_step = s_step * FOLDS[2 * i + 1]
    pixel = tl.load(video + ((t * HEIGHT + y) * LINE + x * 3 + channel), mask=inside, other=0).to(tl.float32)
    mean = tl.where(channel == 0, MEAN[0], tl.where(channel == 1, MEAN[1], MEAN[2]))
    std = tl.where(channel == 0, STD[0], tl.where(channel == 1, STD[1], STD[2]))
    value = tl.div_rn(tl.div_rn(pixel, pixel * 0.0 + 255.0) - mean, std)
    tl.store(out + (place + row * (STRIDE - LEAF)), value, mask=inside)


@device
def overlap_sample(
    frames, window, held, session, n, count, s, inside, frames_stride,
    WIDTH: tl.constexpr, HOP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Sample s of a session: what was open, then its frames, oldest first."""
    total = tl.load(held + s, mask=inside & (s < WIDTH - HOP), other=0.0)
    newest = s // HOP
    for back in tl.static_range(MOST - 1, -1, -1):
        i = newest - back
        place = s - i * HOP
        live = inside & (i >= 0) & (i < count) & (place < WIDTH)
        value = tl.load(frames + (session * n + i) * frames_stride + place, mask=live, other=0.0)
        total += value * tl.load(window + place, mask=live, other=0.0)
    return total


@device
def overlap_add_kernel(
    pcm, frames, window, overlap, slots, counts, n, per, frames_stride, pcm_stride,
    WIDTH: tl.constexpr, HOP: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The samples that are ready, and those that stay open; grid (rows, blocks of a hop and PARTS).

    The last programs of a session's first row have every sample to which open ones are added: none but they reads
    those, so they may replace them.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(0) % n
    session = (tl.program_id(0) // n).to(tl.int64)
    count = tl.load(counts + session) * per
    held = overlap + tl.load(slots + session) // 4
    part = tl.program_id(1) - (HOP + BLOCK - 1) // BLOCK
    if part < 0:
        s = i * HOP + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (s < (i + 1) * HOP) & (s >= WIDTH - HOP) & (i < count)
        value = overlap_sample(frames, window, held, session, n, count, s, inside, frames_stride, WIDTH, HOP, MOST)
        tl.store(pcm + row * pcm_stride + (s - i * HOP), value, mask=inside)
    elif i == 0:
        # What stays open moves to a lower place: ascending pieces read nothing that an earlier one has written. There
        # are several parts only where a position's frames reach over all open samples: the new ones need no old.
        for start in range(part * BLOCK_R, WIDTH - HOP, PARTS * BLOCK_R):
            s = start + tl.arange(0, BLOCK_R)
            inside = (s < WIDTH - HOP) & (count > 0)
            done, later = inside & (s < count * HOP), s + count * HOP
            value = overlap_sample(frames, window, held, session, n, count, s, done, frames_stride, WIDTH, HOP, MOST)
            rest = overlap_sample(
                frames, window, held, session, n, count, later, inside, frames_stride, WIDTH, HOP, MOST
            )
            tl.debug_barrier()  # every thread has read the old samples
            tl.store(pcm + (session * n + s // HOP) * pcm_stride + s % HOP, value, mask=done)
            tl.store(held + s, rest, mask=inside)


def factors(width: int) -> tuple[int, int]:
    """(A, B), A·B = width. Of pairs with up to MOST_PROGRAMS programs a frame, which a GPU runs side by side, the one
    with the fewest float64 operations in a program; where there is none, in all programs together."""

    def second(a: int) -> int:
        return power(width // 2 // a + 1) * power(width // a)

    def cost(a: int) -> tuple[bool, int, int]:
        programs, one = min(a, width // 2 + 1), 10 * a * power(width // a) + 40 * second(a)
        many = programs > MOST_PROGRAMS
        return many, one * programs if many else one, a

    a = min((a for a in range(1, width + 1) if width % a == 0 and second(a) <= MOST_NUMBERS), key=cost)
    return a, width // a


@lowering("dmel_state")
def lower_dmel(call: Call) -> Lowered:
    pcm, window, filters = call.operand("pcm"), call.operand("window"), call.operand("filters")
    tail, out = call.operand("tail"), call.outputs[0]
    width, hop, bands = window.cols * window.rows[1], pcm.cols, filters.rows[1]
    bins, rows, n = width // 2 + 1, call.rows(pcm), call.bucket.session_rows(pcm.rows)
    call.need(width < 1 << 15, f"a window of {width} samples", f"up to {(1 << 15) - 1} are supported")
    call.need(pcm.rows[0] > 0 == pcm.rows[1], f"rows {pcm.rows[0]}n+{pcm.rows[1]} belong to no positions")
    scratch, held = Scratch(), width - hop
    magnitude = scratch.piece("f64", rows * bins)
    shared: dict[str, Any] = {
        "magnitude": magnitude, "pcm": call.pointer(pcm), "tail": call.pointer(tail), "slots": call.slots, "n": n,
        "pcm_stride": pcm.stride,
    }  # fmt: skip
    back, (a, b) = -(-held // hop), factors(width)
    block_b = power(b)
    block_a = min(power(a), max(1, THREADS // block_b))
    fixed: dict[str, Any] = {
        "WIDTH": width, "HOP": hop, "A": a, "B": b, "BACK": back, "STEP_A": 2 * math.pi / a,
        "STEP": 2 * math.pi / width, "BLOCK_A": block_a, "BLOCK_B": block_b, "RUN": min(ASKED, -(-a // block_a)),
        "KEPT": power(width // 2 // a + 1),
    }  # fmt: skip
    values = shared | {"window": call.pointer(window)}
    launches = [launch("spectrum_kernel", (rows, min(a, bins)), values, fixed, THREADS // 32)]
    values = shared | {
        "levels_out": call.pointer(out, ("i32", "i64")), "filters": call.pointer(filters), "counts": call.counts,
        "per": pcm.rows[0], "bands": bands, "out_stride": out.stride,
    }  # fmt: skip
    lo, hi, levels = float(call.attrs["lo"]), float(call.attrs["hi"]), int(call.attrs["levels"])
    fixed = {
        "BINS": bins, "LO": lo, "HI": hi, "STEP": (hi - lo) / (levels - 1), "LEVELS": levels, "HOP": hop, "HELD": held,
        "BACK": back, "BLOCK": min(MOST_SAMPLES, power(bins)), "BLOCK_R": min(MOST_SAMPLES, power(held)),
    }  # fmt: skip
    launches.append(launch("mel_level_kernel", (rows, bands + (held > 0)), values, fixed, 4))
    return scratch.lowered(*launches)


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
    rows, lines = call.rows(out), call.rows(video)
    fits = max(rows * out.stride, lines * video.stride) < 1 << 31
    call.need(fits, f"{lines} lines of {video.cols // 3} pixels", "compile smaller buckets")
    mean, std = (tuple(float(v) for v in call.attrs[name]) for name in ("mean", "std"))
    count, pixels = Aligned(rows * out.cols), call.pointer(video, ("u8",))
    values: dict[str, Any] = {"out": call.pointer(out), "video": pixels, "count": count}
    fixed = {
        "LEAF": out.cols, "STRIDE": out.stride, "LEAVES": leaves, "UP": up, "ACROSS": across, "PATCH": patch,
        "FRAMES": frames, "HEIGHT": height, "LINE": video.stride, "FOLDS": folds, "DEPTH": len(times), "MEAN": mean,
        "STD": std, "BLOCK": PIXELS,
    }  # fmt: skip
    return Lowered((launch("patchify_kernel", (-(-rows * out.cols // PIXELS),), values, fixed, PIXELS // 128),))


@lowering("overlap_add_state")
def lower_overlap_add(call: Call) -> Lowered:
    frames, window, overlap = call.operand("frames"), call.operand("window"), call.operand("overlap")
    out, hop, width = call.outputs[0], int(call.attrs["hop"]), frames.cols
    call.need(frames.rows[0] > 0 == frames.rows[1], f"rows {frames.rows[0]}n+{frames.rows[1]} belong to no positions")
    values: dict[str, Any] = {
        "pcm": call.pointer(out), "frames": call.pointer(frames), "window": call.pointer(window),
        "overlap": call.pointer(overlap), "slots": call.slots, "counts": call.counts,
        "n": call.bucket.session_rows(frames.rows), "per": frames.rows[0],
        "frames_stride": Aligned(frames.stride), "pcm_stride": out.stride,
    }  # fmt: skip
    block, held, apart = min(256, power(hop, 32)), width - hop, frames.rows[0] * hop >= width - hop
    fixed = {
        "WIDTH": width, "HOP": hop, "MOST": -(-width // hop), "BLOCK": block,
        "BLOCK_R": block if apart else min(MOST_SAMPLES, power(held, 32)),
        "PARTS": -(-held // block) if apart else 1,
    }  # fmt: skip
    grid = (call.rows(out), -(-hop // block) + (fixed["PARTS"] if held else 0))
    return Lowered((launch("overlap_add_kernel", grid, values, fixed, 8 if fixed["BLOCK_R"] > 256 else 4),))
