"""With portable bits, whole conversations are the same on every variant of the kernels, in every precision."""

import numpy as np
import pytest

import tmlc
from tmlc.kernels.cpu import available_isas
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint

TICKS, PRECISIONS = 12, ("fp32", "bf16", "int8", "int4")
# Logits of one variant against another's without portable bits, relative to the largest. Sums are rounded differently;
# what is rounded again behind them (activations to bf16 or bytes, caches) can then go the other way by a whole step.
# Measured over 4 to 8 conversations of 48 tokens: 3.4e-7, 1.1e-3, 2.5e-3 and 4.0e-3; over one of 300 up to 2.3e-2
# with int8.
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-2, "int8": 3e-2, "int4": 3e-2}


@pytest.fixture(scope="module", params=PRECISIONS)
def package(request, tmp_path_factory):
    """(precision, package) of the nano model."""
    folder = tmp_path_factory.mktemp("portable")
    create_checkpoint(InteractionConfig.from_preset("nano"), seed=0, out_dir=folder / "nano")
    path = folder / "nano.tmlc"
    tmlc.compile(folder / "nano", path, precision=request.param)
    return request.param, path


def inputs(ticks):
    """Noise, and a sentence that is typed in tick 3."""
    rng = np.random.default_rng(1)
    made = []
    for index in range(ticks):
        audio = (0.1 * rng.standard_normal(3200)).astype(np.float32)
        made.append(tmlc.TickInput(audio=audio, text="what do you hear?" if index == 3 else None))
    return made


def play(package, isa, portable_bits, threads=1):
    """Everything that a conversation shows: tokens, samples, and the state it leaves behind."""
    with tmlc.load(package, threads=threads, isa=isa, portable_bits=portable_bits) as engine:
        session = engine.session(seed=5, temperature=0.8)
        outputs = [session.tick(item) for item in inputs(TICKS)]
        assert any(out.audio is not None and out.audio.any() for out in outputs)
        return [(out.tokens, out.text, out.audio.tobytes()) for out in outputs], session.snapshot()


def test_every_variant_plays_the_same_conversation(package):
    _, path = package
    want = play(path, available_isas()[0], True)
    for isa in available_isas()[1:]:
        assert play(path, isa, True, threads=2) == want, isa


def logits(package, isa, portable_bits):
    with tmlc.load(package, threads=1, isa=isa, portable_bits=portable_bits) as engine:
        rng = np.random.default_rng(2)
        return engine.session().append(tokens=rng.integers(0, 200, 48).tolist())


def test_without_it_variants_stay_within_the_tolerance(package):
    precision, path = package
    want = logits(path, available_isas()[0], True)
    for isa in available_isas():
        got = logits(path, isa, False)
        assert np.abs(got - want).max() <= TOLERANCE[precision] * np.abs(want).max(), isa
