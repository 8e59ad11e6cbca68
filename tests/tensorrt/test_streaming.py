"""Networks of whole models, streamed through the runtime by the evaluator, against the CPU engine in float32."""

import numpy as np
import pytest

import tmlc
from tmlc.errors import ContextFullError
from tmlc.package.reader import open_package
from tmlc.report.package_view import describe_package
from tmlc.report.verify import replay

SHORT = dict(context=96, context_policy="ring_with_sinks", sinks=16, max_append=24)
# Of the largest logit. float16 keeps 11 bits of a product's operands and result, bfloat16 8. Codes are compared with
# the weights that they were made of. A rounding that turns a close choice of experts over moves the logits of some
# positions by much more, which says nothing of the network: there the median over the positions is held to the bound.
TOLERANCE = {"fp32": 3e-6, "fp16": 5e-3}
MEDIAN = {"bf16": 2e-2, "int8": 3e-2, "int4": 0.4}


def stream(engine: tmlc.Engine, reference: tmlc.Engine, seed: int, positions: int = 230) -> np.ndarray:
    """For each position of a random text in random pieces on both engines: the largest difference of its logits, of the
    largest logit of all."""
    rng = np.random.default_rng(seed)
    vocab = engine.model.vocab
    errors: list[float] = []
    largest, done = 0.0, 0
    with engine.session() as session, reference.session() as expected:
        while done < positions:
            ids = rng.integers(0, vocab, min(int(rng.choice([1, 2, 5, 16, 24, 40])), positions - done)).tolist()
            wanted = expected.append(tokens=ids)
            errors += np.abs(session.append(tokens=ids) - wanted).max(1).tolist()
            largest, done = max(largest, float(np.abs(wanted).max())), done + len(ids)
    return np.array(errors) / largest


@pytest.mark.parametrize("name", ["nano", "inkling", "qwen3_moe"])
def test_logits_are_the_cpu_engines_past_ring_wrap_in_any_chunking(checkpoints, stand_in, on_cpu, name: str) -> None:
    reference = on_cpu(checkpoints[name], **SHORT)
    engine, device = stand_in(checkpoints[name], precision="fp16", **SHORT)
    for seed in (1, 2):
        assert stream(engine, reference, seed).max() < TOLERANCE["fp16"]
    runs = [n for method, n in device.runs if method == "decode"]
    assert max(runs) > 16 and len(runs) > 2 * 230 / 40  # calls were cut where a ring ends


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_other_precisions_keep_to_what_they_can(checkpoints, stand_in, on_cpu, precision: str) -> None:
    reference = on_cpu(checkpoints["inkling"], **SHORT)
    engine, _ = stand_in(checkpoints["inkling"], precision=precision, **SHORT)
    errors = stream(engine, reference, 3, 140)
    if precision == "fp32":
        assert errors.max() < TOLERANCE["fp32"]
    else:
        assert TOLERANCE["fp32"] < np.median(errors) < MEDIAN[precision]


@pytest.mark.parametrize("name", [pytest.param("inkling", marks=pytest.mark.slow), "qwen3_moe"])
def test_caches_of_int8_codes_give_the_logits_of_the_cpu_engines_codes(
    checkpoints, stand_in, on_cpu, name: str
) -> None:
    """A number half-way between two codes may go either way, and the CPU engine rounds queries too: the bound is on the
    median. Against float caches it is a hundred times as much."""
    engine, _ = stand_in(checkpoints[name], precision="fp32", kv="int8", **SHORT)
    errors = [stream(engine, on_cpu(checkpoints[name], kv=kv, **SHORT), 3, 140) for kv in ("int8", "fp32")]
    assert np.median(errors[0]) < 2e-4 < 1e-3 < np.median(errors[1]) < 1e-2
    floats, _ = stand_in(checkpoints[name], precision="fp16", **SHORT)
    assert engine.backend.slot_bytes < 0.85 * floats.backend.slot_bytes


def test_golden_calls_of_every_method_replay(checkpoints, stand_in) -> None:
    engine, _ = stand_in(checkpoints["nano"], precision="fp16", **SHORT)
    path = stand_in.path(checkpoints["nano"], precision="fp16", **SHORT)
    view = replay(engine, path, lambda *_: None)
    assert view["passed"] and {row["method"] for row in view["methods"]} == set(engine.model.backend.methods)


def hold(engine: tmlc.Engine, ticks: list[tmlc.TickInput], **session) -> list[tmlc.TickOutput]:
    with engine.session(**session) as talk:
        return [talk.tick(tick) for tick in ticks]


def conversation(ticks: int) -> list[tmlc.TickInput]:
    """Bursts of noise, clips now and then, a sentence."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(ticks):
        level = float(rng.choice([1e-3, 0.05, 0.3]))
        audio = (rng.standard_normal(3200) * level).astype(np.float32)
        made.append(tmlc.TickInput(audio=audio, text="what is this?" if index == 2 else None))
    return made


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_conversation_is_the_cpu_engines_word_for_word(checkpoints, stand_in, on_cpu, temperature: float) -> None:
    """In float32, where nothing but the order of sums differs, tokens and sound must be the same."""
    reference = on_cpu(checkpoints["nano"], **SHORT)
    engine, _ = stand_in(checkpoints["nano"], precision="fp32", **SHORT)
    ticks = conversation(9)
    expected = hold(reference, ticks, seed=11, temperature=temperature)
    found = hold(engine, ticks, seed=11, temperature=temperature)
    assert [out.tokens for out in found] == [out.tokens for out in expected]
    assert any(out.tokens for out in found)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.audio, other.audio, atol=1e-4)


def test_sessions_do_not_bleed_and_go_on_from_snapshots(checkpoints, stand_in) -> None:
    engine, _ = stand_in(checkpoints["inkling"], precision="fp16", **SHORT)
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, engine.model.vocab, 60).tolist() for _ in range(2)]
    with engine.session() as alone:
        first = alone.append(tokens=texts[0])
        rest = alone.append(tokens=texts[1])
    with engine.session() as one, engine.session() as two:
        two.append(tokens=texts[1])
        assert np.array_equal(one.append(tokens=texts[0]), first)
        two.append(tokens=texts[1])
        blob = one.snapshot()
    with engine.restore(blob) as again, again.fork() as twin:
        assert np.array_equal(again.append(tokens=texts[1]), rest)
        assert np.array_equal(twin.append(tokens=texts[1]), rest)


def test_a_full_context_is_refused_before_anything_changes(checkpoints, stand_in) -> None:
    engine, device = stand_in(checkpoints["inkling"], precision="fp16", context=64, context_policy="end", max_append=24)
    with engine.session() as session:
        session.append(tokens=[1] * 60)
        before = len(device.runs)
        with pytest.raises(ContextFullError, match="5 new positions after 60 pass the context of 64"):
            session.append(tokens=[1] * 5)
        assert [run for run in device.runs[before:] if run[0] == "decode"] == []


def test_the_package_says_what_it_was_built_with(checkpoints, stand_in, library) -> None:
    manifest = stand_in(checkpoints["inkling"], precision="fp16", **SHORT)[0].manifest
    assert manifest.producer["tensorrt_rtx"] == library.version and manifest.producer["architecture"] == "sm89"
    assert set(manifest.targets) == {"tensorrt:sm89"} and "tensorrt.plan.v1" in manifest.required_features
    assert manifest.files["engines/tensorrt/plan.json"].sha256
    with open_package(stand_in.path(checkpoints["inkling"], precision="fp16", **SHORT)) as package:
        counts = describe_package(package)["op_counts"]["tensorrt:sm89"]
    assert counts["decode"]["attention_input"] == 3 and counts["decode"]["kv_cache_update"] == 6
