"""Sound, pictures and random numbers: dMel levels, patches, overlap-add, noise, sampling."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, draw, run, weight

from tmlc.model_zoo.interaction.features import mel_filters


def keys(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**62), 2**62, (n, 3))


def test_philox_normal(machine):
    sessions = [Session({"key": keys(i, n)}, count=n) for i, n in enumerate((3, 1))]
    for size in (1, 7, 130):
        agree(machine, "philox_normal", sessions, {"size": size}, [Shape("f32", size)], 1e-7, cuts=(1,))


@pytest.mark.parametrize("entries", [3, 1030, 2500])
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


def test_overlap_add_of_several_frames_a_position(machine):
    sessions = [
        Session({"frames": draw(i, 4 * n, 20)}, {"overlap": draw(i + 9, 1, 12)}, n) for i, n in enumerate((3, 1))
    ]
    agree(
        machine, "overlap_add_state", sessions, {"hop": 8}, [Shape("f32", 8, (4, 0))], 1e-6,
        {"window": weight(draw(3, 1, 20))}, rows={"frames": (4, 0)}, cuts=(1,), compared=["overlap"], batch=3, n=4,
    )  # fmt: skip


def test_dmel(machine):
    hop, width, bands = 40, 80, 6
    sessions = [Session({"pcm": 0.3 * draw(i, n, hop)}, {"tail": 0.3 * draw(i + 9, 1, width - hop)}, n)
                for i, n in enumerate((3, 1))]  # fmt: skip
    sessions[0].inputs["pcm"][1] = 0  # silence
    window = np.hanning(width + 1)[:-1].astype(np.float32)
    filters = np.abs(draw(5, bands, width // 2 + 1))
    weights = {"window": weight(window[None]), "filters": weight(filters)}
    attrs = {"lo": -7.0, "hi": 2.0, "levels": 16}
    agree(
        machine, "dmel_state", sessions, attrs, [Shape("i64", bands)], 0, weights, cuts=(1,), compared=["tail"], batch=3
    )


@pytest.mark.slow
def test_dmel_of_the_published_front_end(machine):
    hop, width = 800, 1600
    sessions = [Session({"pcm": 0.1 * draw(3, 2, hop)}, {"tail": 0.1 * draw(9, 1, width - hop)}, 2)]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)).astype(np.float32)
    filters = np.asarray(mel_filters(80, width, 16000), np.float32)
    weights = {"window": weight(window[None]), "filters": weight(filters)}
    agree(machine, "dmel_state", sessions, {"lo": -7.0, "hi": 2.0, "levels": 16}, [Shape("i64", 80)], 0, weights,
          cuts=(1,), compared=["tail"])  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "height", "width", "folds"), [(4, 8, 12, [1, 2, 2, 2]), (6, 6, 12, [2, 3, 1, 2]), (4, 4, 4, [2, 4])]
)
def test_patchify(machine, patch, height, width, folds):
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
        machine, "patchify", sessions, attrs, [Shape("f32", leaf, (count, 0))], 1e-6,
        rows={"video": (frames * height, 0)}, cuts=(1,),
    )  # fmt: skip


def test_sampling_stays_inside_the_vocabulary_whatever_the_logits(machine):
    values = np.array([[np.nan] * 5, [-np.inf] * 5, [np.inf] * 5], np.float32)
    sessions = [Session({"logits": values, "key": keys(0, 3), "temperature": np.ones((3, 1), np.float32)}, count=3)]
    found = run(machine, "sample", sessions, {}, [Shape("i64", 1)])[0][0]
    assert ((found >= 0) & (found < 5)).all()
