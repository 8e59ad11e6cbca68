"""Sound, pictures and random numbers: dMel levels, patches, overlap-add, noise, sampling."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, draw, run, weight

from tmlc.kernels.triton import media
from tmlc.model_zoo.interaction.features import mel_filters


def keys(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**62), 2**62, (n, 3))


def test_philox_normal(machine):
    sessions = [Session({"key": keys(i, n)}, count=n) for i, n in enumerate((3, 1))]
    for size in (1, 7, 130):
        agree(machine, "philox_normal", sessions, {"size": size}, [Shape("f32", size)], 1e-7, cuts=(1,))


@pytest.mark.parametrize("entries", [3, 130, 300])
def test_sample(machine, entries):
    sessions = []
    for i, n in enumerate((4, 1)):
        values = np.round(draw(i, n, entries) * 2)  # many ties
        heat = np.array([[0.0], [1.0], [0.3], [5.0]], np.float32)[:n]
        sessions.append(Session({"logits": values, "key": keys(i, n), "temperature": heat}, count=n))
    agree(machine, "sample", sessions, {}, [Shape("i64", 1)], 0, cuts=(1,))


@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_head_sample(machine, cap):
    sessions = []
    for i, n in enumerate((4, 1)):
        heat = np.array([[0.0], [1.0], [0.3], [5.0]], np.float32)[:n]
        sessions.append(Session({"x": draw(i, n, 31), "key": keys(i, n), "temperature": heat}, count=n))
    attrs = {"alpha": 0.5, "cap": cap, "entries": 90}
    weights = {"weight": weight(draw(3, 100, 31)), "bias": weight(draw(4, 1, 100))}
    agree(machine, "head_sample", sessions, attrs, [Shape("i64", 1)], 0, weights, cuts=(1,))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32", "f8g128"])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_head_logits(machine, dtype, cap):
    """To the bit what the ops that it stands for give, also with an alpha that is no power of two."""
    alone = [Session({"x": draw(i, n, 160)}, count=n) for i, n in enumerate((4, 1))]
    weights = {"weight": weight(0.1 * draw(3, 100, 160), dtype), "bias": weight(draw(4, 1, 100))}
    attrs = {"alpha": 0.3, "cap": cap, "entries": 90}
    found = run(machine, "head_logits", alone, attrs, [Shape("f32", 90)], weights, pad=3)
    for session, (logits,) in zip(alone, found, strict=True):
        rows = session.inputs["x"]

        def result(op, name, values, columns, attrs, weights=None, count=session.count):
            given = [Session({name: values}, count=count)]
            return run(machine, op, given, attrs, [Shape("f32", columns)], weights)[0][0]

        wanted = result("scale", "x", rows, 160, {"alpha": 0.3})
        wanted = result("linear", "x", wanted, 100, {}, weights)
        if cap:
            wanted = result("softcap", "x", wanted, 100, {"cap": cap})
        assert logits.tobytes() == np.ascontiguousarray(wanted[:, :90]).tobytes()


def test_overlap_add(machine):
    for width, hop in ((24, 8), (20, 8), (8, 8)):
        sessions = [
            Session({"frames": draw(i, n, width)}, {"overlap": draw(i + 9, 1, max(width - hop, 1))}, n)
            for i, n in enumerate((5, 1, 2))
        ]
        if width == hop:
            continue  # nothing stays open, so the program has no state for it
        weights = {"window": weight(draw(3, 1, width))}
        agree(
            machine, "overlap_add_state", sessions, {"hop": hop}, [Shape("f32", hop)], 1e-6, weights, cuts=(1, 3),
            compared=["overlap"], batch=4,
        )  # fmt: skip


@pytest.mark.parametrize(("width", "hop"), [(20, 8), (100, 32), (100, 20)])
def test_overlap_add_of_several_frames_a_position(machine, width, hop):
    """In (100, 32) several programs have what stays open; in (100, 20) a position's frames do not reach over it."""
    sessions = [
        Session({"frames": draw(i, 4 * n, width)}, {"overlap": draw(i + 9, 1, width - hop)}, n)
        for i, n in enumerate((2, 1))
    ]
    agree(
        machine, "overlap_add_state", sessions, {"hop": hop}, [Shape("f32", hop, (4, 0))], 1e-6,
        {"window": weight(draw(3, 1, width))}, rows={"frames": (4, 0)}, cuts=(1,), compared=["overlap"], batch=3, n=3,
    )  # fmt: skip


def test_more_open_samples_than_a_program_moves_at_a_time(machine):
    sessions = [Session({"frames": draw(1, 2, 1700)}, {"overlap": draw(9, 1, 1200)}, 2)]
    agree(
        machine, "overlap_add_state", sessions, {"hop": 500}, [Shape("f32", 500)], 1e-6,
        {"window": weight(draw(3, 1, 1700))}, cuts=(1,), compared=["overlap"],
    )  # fmt: skip


def hann(width: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)).astype(np.float32)


@pytest.mark.parametrize(
    ("hop", "width", "levels", "pair"), [(130, 320, 4096, (8, 40)), (14, 24, 2, (4, 6)), (12, 12, 3, (12, 1))]
)
def test_dmel(machine, monkeypatch, hop, width, levels, pair):
    """A frame that begins inside a row of its session, one of two rows, and one without a tail. The factors are chosen
    here: those of short windows would have a program for each frequency."""
    monkeypatch.setattr(media, "factors", lambda _: pair)
    bands = 3
    sessions = [Session({"pcm": 0.3 * draw(i, n, hop)}, {"tail": 0.3 * draw(i + 9, 1, width - hop)}, n)
                for i, n in enumerate((2, 1))]  # fmt: skip
    sessions[0].inputs["pcm"][1] = 0  # silence
    weights = {"window": weight(hann(width)[None]), "filters": weight(np.abs(draw(5, bands, width // 2 + 1)))}
    attrs = {"lo": -7.0, "hi": 2.0, "levels": levels}
    agree(
        machine, "dmel_state", sessions, attrs, [Shape("i64", bands)], 0, weights, cuts=(1,),
        compared=["tail"] if width > hop else [], batch=3,
    )  # fmt: skip


def test_a_window_is_cut_into_two_factors():
    """Where there are such: the sums over both together are much shorter than one over the window."""
    assert media.factors(1600) == (100, 16)
    for width in (2, 62, 160, 512, 1202, 2400, 16384, 32766):
        a, b = media.factors(width)
        assert a * b == width
        assert width % 16 or width < 1024 or a + b < width / 3


@pytest.mark.slow
@pytest.mark.parametrize(("hop", "width", "pair"), [(800, 1600, None), (800, 2400, None), (3000, 4160, (64, 65))])
def test_dmel_of_the_published_front_end(machine, monkeypatch, hop, width, pair):
    """And windows whose tail is moved in two pieces, and whose samples are asked for in two turns."""
    if pair:
        monkeypatch.setattr(media, "factors", lambda _: pair)
    sessions = [Session({"pcm": 0.1 * draw(3, 2, hop)}, {"tail": 0.1 * draw(9, 1, width - hop)}, 2)]
    weights = {
        "window": weight(hann(width)[None]), "filters": weight(np.asarray(mel_filters(80, width, 16000), np.float32))
    }  # fmt: skip
    agree(machine, "dmel_state", sessions, {"lo": -7.0, "hi": 2.0, "levels": 16}, [Shape("i64", 80)], 0, weights,
          cuts=(1,), compared=["tail"])  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "height", "width", "folds"),
    [(4, 8, 12, [1, 2, 2, 2]), (6, 6, 12, [2, 3, 1, 2]), (4, 4, 4, [2, 4]), (10, 20, 10, [1, 5, 2, 2])],
)
def test_patchify(machine, patch, height, width, folds):
    """To the bit; clips that are less and more than a program's values."""
    rng, frames = np.random.default_rng(0), 2
    sessions = [
        Session({"video": rng.integers(0, 256, (n * frames * height, width * 3)).astype(np.uint8)}, count=n)
        for n in (2, 1)
    ]
    attrs = {"frames": frames, "height": height, "patch": patch, "folds": folds, "mean": [0.48, 0.45, 0.4],
             "std": [0.26, 0.27, 0.28]}  # fmt: skip
    leaf = folds[0] * folds[1] ** 2 * 3
    count = frames * height * width * 3 // leaf
    agree(
        machine, "patchify", sessions, attrs, [Shape("f32", leaf, (count, 0))], 0,
        rows={"video": (frames * height, 0)}, cuts=(1,),
    )  # fmt: skip


def test_sampling_stays_inside_the_vocabulary_whatever_the_logits(machine):
    values = np.array([[np.nan] * 5, [-np.inf] * 5, [np.inf] * 5], np.float32)
    sessions = [Session({"logits": values, "key": keys(0, 3), "temperature": np.ones((3, 1), np.float32)}, count=3)]
    found = run(machine, "sample", sessions, {}, [Shape("i64", 1)])[0][0]
    assert ((found >= 0) & (found < 5)).all()
