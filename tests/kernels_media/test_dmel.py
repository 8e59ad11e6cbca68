"""dmel: mel levels of a stream of samples, against float64 and against transformers' feature extractor."""

import numpy as np
import pytest

from tmlc.errors import PlanError

RATE, HOP, WINDOW, BINS, LEVELS, LO, HI = 16000, 800, 1600, 80, 16, -7.0, 2.0


def hann(size: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)[None]


def random_filters(rng: np.random.Generator, bins: int, size: int) -> np.ndarray:
    """Bands that overlap, with zeros elsewhere, of about the size of Slaney's."""
    filters = rng.random((bins, size)).astype(np.float32) * 0.02
    return filters * (np.abs(np.linspace(0, 1, size)[None] - np.linspace(0, 1, bins)[:, None]) < 0.2)


def speech(seconds: float, seed: int, floor_db: float = -60.0) -> np.ndarray:
    """Voiced and unvoiced stretches and pauses, over a noise floor: float32, whole hops."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE) // HOP * HOP
    t = np.arange(count) / RATE
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * t + seed) + 10 * np.sin(2 * np.pi * 5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voiced = sum(np.sin(k * phase + rng.random()) / k**1.2 for k in range(1, 30))
    envelope = np.clip(np.sin(2 * np.pi * 1.7 * t + seed), 0, 1) ** 0.5
    hiss = rng.standard_normal(count) * np.clip(np.sin(2 * np.pi * 0.9 * t + 2 * seed), 0, 1) ** 4 * 0.3
    signal = 0.25 * (envelope * voiced + hiss)
    return (signal + 10 ** (floor_db / 20) * rng.standard_normal(count)).astype(np.float32)


def log_mel(
    pcm: np.ndarray, hop: int, window: np.ndarray, filters: np.ndarray, tail: np.ndarray
) -> np.ndarray:
    """float64 log10 mel of every hop of pcm, as docs/plan-format.md states it."""
    size = window.shape[1]
    signal = np.concatenate([tail, pcm]).astype(np.float64)
    frames = np.stack([signal[at : at + size] for at in range(0, len(pcm), hop)])
    power = np.abs(np.fft.rfft(frames * window.astype(np.float64))) ** 2
    mel = np.sqrt(np.maximum(power, 1e-10)) @ filters.astype(np.float64).T
    return np.log10(np.maximum(mel, 1e-10))


def nearest(values: np.ndarray, lo: float = LO, hi: float = HI, levels: int = LEVELS) -> np.ndarray:
    centres = np.linspace(lo, hi, levels).astype(np.float32).astype(np.float64)
    return np.abs(np.clip(values, lo, hi)[..., None] - centres).argmin(-1).astype(np.int32)


def dmel_of(one_op, operand, window, filters, hop, levels=LEVELS, lo=LO, hi=HI, **options):
    size = window.shape[1]
    return one_op(
        "dmel",
        operand.out("i32", 1, filters.shape[0]),
        operand.arg("f32", 1, hop),
        operand.weight(window),
        operand.weight(filters),
        operand.state(size - hop),
        i=[levels],
        f=[lo, hi],
        **options,
    )


def stream(op, pcm: np.ndarray, hop: int, chunks: list[int]) -> np.ndarray:
    """Feeds pcm in calls of the given numbers of hops (repeated), from an empty tail."""
    op.slot[:] = 0
    rows, at, parts, turn = pcm.reshape(-1, hop), 0, [], 0
    while at < len(rows):
        n = min(chunks[turn % len(chunks)], len(rows) - at)
        parts.append(op(n, rows[at : at + n]))
        at, turn = at + n, turn + 1
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("size", "hop"),
    [
        (1600, 800),
        (1600, 400),
        (2, 1),
        (3, 1),
        (7, 3),
        (16, 5),
        (60, 7),
        (97, 40),
        (194, 193),
        (441, 147),
        (1001, 13),
    ],
)
def test_levels_equal_the_float64_reference_for_any_window_length(
    one_op, operand, size: int, hop: int
) -> None:
    rng = np.random.default_rng(size + hop)
    window, filters = hann(size) + np.float32(0.01), random_filters(rng, 11, size // 2 + 1)
    loudness = 10.0 ** rng.uniform(-6, 1, 24).repeat(hop)
    pcm = (rng.standard_normal(24 * hop) * loudness).astype(np.float32)
    values = log_mel(pcm, hop, window, filters, np.zeros(size - hop))
    got = stream(dmel_of(one_op, operand, window, filters, hop), pcm, hop, [24])
    assert np.array_equal(got, nearest(values))


def test_many_levels_show_the_error_of_the_transform(one_op, operand) -> None:
    rng = np.random.default_rng(5)
    window, filters = hann(WINDOW), random_filters(rng, BINS, WINDOW // 2 + 1)
    pcm = speech(1.0, 3)
    values = log_mel(pcm, HOP, window, filters, np.zeros(WINDOW - HOP))
    op = dmel_of(one_op, operand, window, filters, HOP, levels=65536)
    got = stream(op, pcm, HOP, [5])
    step = (HI - LO) / 65535
    assert np.abs(LO + got * step - values).max() <= 0.5001 * step


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunking_and_threads_never_change_a_level_or_the_tail(one_op, operand, threads: int) -> None:
    rng = np.random.default_rng(6)
    hop, size = 40, 230  # a tail of several hops
    window, filters = hann(size), random_filters(rng, 9, size // 2 + 1)
    pcm = rng.standard_normal(40 * hop).astype(np.float32)
    whole = dmel_of(one_op, operand, window, filters, hop, levels=4096)
    expected = stream(whole, pcm, hop, [40])
    pieces = dmel_of(one_op, operand, window, filters, hop, levels=4096, threads=threads)
    for chunks in ([1], [2, 1], [4, 7], [17], [1, 39]):
        assert np.array_equal(stream(pieces, pcm, hop, chunks), expected)
        assert np.array_equal(pieces.slot[: (size - hop) * 4].view(np.float32), pcm[-(size - hop) :])


def test_levels_are_the_nearest_centre_and_the_lower_of_two(one_op, operand) -> None:
    """One bin of a rectangular window of two: |x0 + x1| sets the value exactly, in decades."""
    window, filters = np.ones((1, 2), np.float32), np.array([[1.0, 0.0]], np.float32)
    pcm = np.array([[10.0**e] for e in (-9, -2, -1, 0, 1, 2, 9)], np.float32)

    def levels_of(levels: int, lo: float, hi: float) -> list[int]:
        op = dmel_of(one_op, operand, window, filters, 1, levels=levels, lo=lo, hi=hi)
        result = []
        for row in pcm:
            op.slot[:] = 0
            result.append(int(op(1, row[None])[0, 0]))
        return result

    assert levels_of(5, -2.0, 2.0) == [0, 0, 1, 2, 3, 4, 4]
    assert levels_of(2, -1.0, 1.0) == [0, 0, 0, 0, 1, 1, 1]  # the value 0 is a tie
    assert levels_of(1, -2.0, 2.0) == [0] * 7
    assert max(levels_of(65536, 0.0, 1e-6)) <= 65535  # centres closer than float32 can tell


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_samples_that_are_no_numbers_give_levels_in_range_and_pass(one_op, operand, bad: float) -> None:
    rng = np.random.default_rng(7)
    window, filters = hann(20), random_filters(rng, 4, 11)
    op = dmel_of(one_op, operand, window, filters, 10)
    pcm = rng.standard_normal((6, 10)).astype(np.float32)
    clean = stream(op, pcm, 10, [6])
    pcm[2, 4] = bad
    got = stream(op, pcm, 10, [2])
    assert got.min() >= 0
    assert got.max() < LEVELS
    assert np.array_equal(got[[0, 1, 4, 5]], clean[[0, 1, 4, 5]])


@pytest.fixture(scope="module")
def extractor():
    transformers = pytest.importorskip("transformers", reason="needs transformers with Inkling")
    return transformers.InklingFeatureExtractor()


class TestAgainstTransformers:
    """InklingFeatureExtractor and the processor's nearest-centre step.

    The extractor transforms in float32, whose rounding noise is about 1e-7 of the loudest bin. On sound with
    a noise floor every band is far above that noise and all levels agree. On a pure synthetic tone the bands
    beside the tone hold nothing but that noise, so torch and any other transform disagree there; float64
    decides (below).
    """

    @staticmethod
    def levels(extractor, pcm: np.ndarray) -> np.ndarray:
        from types import SimpleNamespace

        import torch
        from transformers import InklingProcessor

        features = extractor(pcm, sampling_rate=RATE, return_tensors="pt")["input_features"]
        centres = torch.linspace(LO, HI, LEVELS, dtype=torch.float64).to(torch.float32)
        numbers = SimpleNamespace(bin_centers=centres, dmel_min_value=LO, dmel_max_value=HI)
        return InklingProcessor._extract_dmel_bins(numbers, features)[0].numpy()

    @pytest.mark.parametrize("seed", range(4))
    def test_speech_has_the_same_levels_in_any_chunking(self, one_op, operand, extractor, seed: int) -> None:
        pcm = speech(6.0, seed)
        expected = self.levels(extractor, pcm)
        op = dmel_of(
            one_op, operand, extractor.window.numpy()[None], extractor.mel_filters.numpy(), HOP, threads=2
        )
        for chunks in ([4], [1], [3, 64, 1, 7]):
            assert np.array_equal(stream(op, pcm, HOP, chunks), expected)

    def test_noise_and_silence_have_the_same_levels(self, one_op, operand, extractor) -> None:
        rng = np.random.default_rng(11)
        op = dmel_of(one_op, operand, extractor.window.numpy()[None], extractor.mel_filters.numpy(), HOP)
        noise = rng.standard_normal(40 * HOP).astype(np.float32)
        for pcm in (np.zeros(8 * HOP, np.float32), noise * 0.1, noise * 1e-3):
            assert np.array_equal(stream(op, pcm, HOP, [4]), self.levels(extractor, pcm))

    def test_on_a_pure_tone_ours_is_the_float64_answer(self, one_op, operand, extractor) -> None:
        pcm = (0.8 * np.sin(2 * np.pi * 437.3 * np.arange(20 * HOP) / RATE)).astype(np.float32)
        window, filters = extractor.window.numpy()[None], extractor.mel_filters.numpy()
        got = stream(dmel_of(one_op, operand, window, filters, HOP), pcm, HOP, [4])
        assert np.array_equal(got, nearest(log_mel(pcm, HOP, window, filters, np.zeros(WINDOW - HOP))))
        theirs = self.levels(extractor, pcm)
        assert np.abs(got - theirs).max() <= 1
        assert (got != theirs).mean() < 0.02


GOOD = {"hop": 40, "size": 100, "bins": 6, "levels": [16], "f": [-7.0, 2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": [2.0, -7.0]}, "bounds"),
        ({"f": [float("nan"), 2.0]}, "bounds"),
        ({"f": [-7.0, float("inf")]}, "bounds"),
        ({"f": [-7.0]}, "takes"),
        ({"levels": [0]}, "levels"),
        ({"levels": [65537]}, "levels"),
        ({"levels": []}, "takes"),
        ({"hop": 100, "tail": 60}, "hop"),
        ({"tail": 59}, "tail"),
        ({"filters": 50}, "filters"),
        ({"out": "f32"}, "i32"),
        ({"rows": 2}, "row"),
        ({"size": 16386, "tail": 60}, "16384"),
        ({"tail_space": "weight"}, "slot"),
    ],
)
def test_a_malformed_call_is_refused_with_the_reason(one_op, operand, change: dict, message: str) -> None:
    g = GOOD | change
    tail = operand.state(g.get("tail", g["size"] - g["hop"]))
    if "tail_space" in g:
        tail = operand.weight(np.zeros((1, tail.cols), np.float32))
    with pytest.raises(PlanError, match=message):
        one_op(
            "dmel",
            operand.out(g.get("out", "i32"), g.get("rows", 1), g["bins"]),
            operand.arg("f32", 1, g["hop"]),
            operand.weight(np.zeros((1, g["size"]))),
            operand.weight(np.zeros((g["bins"], g.get("filters", g["size"] // 2 + 1)))),
            tail,
            i=g["levels"],
            f=g["f"],
        )
