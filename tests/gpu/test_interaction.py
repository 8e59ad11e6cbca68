"""Whole ticks on a device in host memory: the real sessions, snapshots, forks and batches, over the cuda runtime."""

import numpy as np
import pytest

import tmlc
from tmlc.errors import ContextFullError, DeviceError, KernelError, SessionError
from tmlc.package.reader import open_package

TOLERANCE = 2e-4  # of samples and hidden states in float32: the order of sums


@pytest.fixture(scope="module")
def engines(tiny, lab, machine):
    mark = machine.mark()
    with tmlc.load(tiny.cpu, threads=1, sessions=4) as cpu, lab.load(tiny.gpu, machine, 4) as gpu:
        yield cpu, gpu
    machine.release(mark)


def given(index: int) -> tmlc.TickInput:
    draw = np.random.default_rng(index)
    video = draw.integers(0, 256, (2, 8, 16, 3), np.uint8) if index % 2 == 0 else None
    return tmlc.TickInput((0.1 * draw.standard_normal(320)).astype(np.float32), video, text="hi" if index else None)


@pytest.mark.parametrize(
    ("index", "stages"),
    [(1, set()), pytest.param(2, {"embed_audio", "embed_video", "embed_text", "decode"}, marks=pytest.mark.slow)],
)
def test_ticks_are_those_of_the_cpu_engine(engines, index, stages):
    """Sound and text in, text and speech out, in graphs of chains; with a clip, the input method by method."""
    cpu, gpu = engines
    with cpu.session(seed=4) as here, gpu.session(seed=4) as there:
        want, have = here.tick(given(index)), there.tick(given(index))
        assert have.tokens == want.tokens and have.stats == want.stats
        assert np.abs(have.audio - want.audio).max() <= TOLERANCE
        assert np.abs(want.audio).max() > 1e-3, "an engine that says nothing proves nothing"
        assert len(have.tokens) == 2 and not have.stats["silent"]
        assert set(have.timings) >= stages | {"tick.write", "tick.answer"}


@pytest.mark.slow
def test_a_batch_of_sessions_says_what_each_says_alone(engines):
    _, gpu = engines
    alone = []
    for seed in (1, 2):
        with gpu.session(seed=seed) as session:
            alone.append((session.tick(given(seed)), gpu.slots.memory.read(session.index)))
    sessions = [gpu.session(seed=seed) for seed in (1, 2)]
    together = gpu.tick_batch(sessions, [given(1), given(2)])
    for session, out, (want, slot) in zip(sessions, together, alone, strict=True):
        assert out.tokens == want.tokens and out.audio.tobytes() == want.audio.tobytes()
        assert gpu.slots.memory.read(session.index) == slot
        session.close()


def test_snapshots_and_forks_go_on_bit_for_bit(engines):
    _, gpu = engines
    with gpu.session(seed=9) as session:
        session.append(tokens=[1, 2, 3], logits="none")
        blob, twin = session.snapshot(), session.fork()
        again = gpu.restore(blob)
        logits = [s.append(tokens=[5, 6]).tobytes() for s in (session, twin, again)]
        assert logits[0] == logits[1] == logits[2]
        assert twin.positions == again.positions == 5
        twin.close(), again.close()
    assert gpu.capacity().free == 4 and not any(gpu.slots.memory.read(0))


def test_an_id_that_no_table_has_is_refused_before_anything_runs(engines):
    _, gpu = engines
    with gpu.session() as session:
        bad = np.array([[100000]], np.int32)
        with pytest.raises(KernelError, match="outside 0"):
            gpu.backend.call("embed_text", [(1, gpu.slots.handle(session.index))], [bad])
        assert session.append(tokens=[1]).shape == (1, 272)


def test_a_device_error_poisons_the_sessions_and_a_lost_device_ends_cleanly(tiny, lab, machine):
    mark = machine.mark()
    with lab.load(tiny.gpu, machine, 3) as gpu:
        device = gpu.backend.driver
        bad, other = gpu.session(), gpu.session()
        device.fault = KernelError("the launch was refused", fix="load the package again")
        with pytest.raises(KernelError, match="refused"):
            bad.append(tokens=[1], logits="none")
        assert bad.state == "poisoned" and other.append(tokens=[1], logits="none").size == 0
        device.fault = DeviceError("an illegal address", fix="load the package again")
        with pytest.raises(DeviceError, match="illegal address"):
            other.append(tokens=[1], logits="none")
        assert other.state == "poisoned"
        fresh = gpu.session()
        with pytest.raises(DeviceError, match=r"device is lost.*\n  restart the process"):
            fresh.append(tokens=[1])
        for session in (bad, other, fresh):
            session.close()
        assert gpu.capacity().free == 3
    assert device.closed
    gpu.close()
    with pytest.raises(SessionError, match="closed"):
        gpu.session()
    machine.release(mark)


@pytest.mark.slow
def test_a_full_context_closes_the_session_and_no_other(tiny, lab, machine, tmp_path):
    lab.compile(tiny.checkpoint, tmp_path / "end.tmlc", context=16, context_policy="end")
    mark = machine.mark()
    with lab.load(tmp_path / "end.tmlc", machine, 3) as gpu:
        full, other = gpu.session(), gpu.session()
        full.append(tokens=[1] * 14, logits="none")
        twin = gpu.restore(full.snapshot())
        for session in (full, twin):
            with pytest.raises(ContextFullError, match=r"14 \+ 3 positions"):
                session.append(tokens=[1] * 3, logits="none")
            assert session.state == "closed"
        other.append(tokens=[1] * 3, logits="none")
        again = gpu.session()  # in a slot that was full
        again.append(tokens=[1] * 16, logits="none")
        with pytest.raises(ContextFullError):
            again.append(tokens=[1], logits="none")
    machine.release(mark)


@pytest.mark.slow
def test_golden_calls_replay_as_verify_does(engines, tiny):
    from tmlc.report.verify import replay

    _, gpu = engines
    view = replay(gpu, tiny.gpu, lambda *_: None)
    assert view["passed"], view["methods"]
    with open_package(tiny.gpu) as opened:
        assert {row["method"] for row in view["methods"]} == {method.name for method in opened.manifest.methods}


@pytest.mark.parametrize(("silent", "expected"), [(False, 23), (True, 7)])
def test_a_tick_makes_as_many_calls_as_the_document_says(tiny, silent, expected):
    """docs/triton.md, "Chains", method by method: two tokens and speech, or silence; the choice is given here."""
    with tmlc.load(tiny.cpu, threads=1) as engine, engine.session() as session:
        call, calls = engine.backend.call, []
        token = engine.manifest.tick.silence_token_id if silent else 5

        def counted(method, parts, inputs):
            calls.append(method)
            made = call(method, parts, inputs)
            return [np.full((1, 1), token, np.int32)] if method == "next_token" else made

        engine.backend.call = counted
        out = session.tick(tmlc.TickInput())
        assert (out.tokens, out.stats["silent"]) == (([token], 1) if silent else ([token] * 2, 0))
        assert len(calls) == expected
