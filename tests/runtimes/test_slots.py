"""Slots that do not lie in host memory: sessions, snapshots, forks and batches reach them through the backend only."""

import gc

import numpy as np
import pytest

from tmlc.errors import CapacityError
from tmlc.runtimes.core.slots import HostSlots, SlotMemory, SlotPool
from tmlc.runtimes.core.tick import TickInput


class FarSlots(SlotMemory):
    """Handles are numbers that mean nothing without the backend; every access is written down."""

    def __init__(self, count, slot_bytes):
        self.count, self.slot_bytes, self.reserved_bytes = count, slot_bytes, count * slot_bytes
        self.host, self.log = HostSlots(count, slot_bytes), []

    def handle(self, index):
        return 1000 + index

    def read(self, index):
        self.log.append(("read", index))
        return self.host.read(index)

    def write(self, index, data):
        self.log.append(("write", index))
        self.host.write(index, data)

    def zero(self, index):
        self.log.append(("zero", index))
        self.host.zero(index)

    def copy(self, source, to):
        self.log.append(("copy", source, to))
        self.host.copy(source, to)


@pytest.fixture
def far(backend):
    """A backend that keeps its slots away from the host."""

    class FarBackend(type(backend)):
        def slots(self, count):
            self.far = FarSlots(count, self.slot_bytes)
            return self.far

        def call(self, method, parts, inputs):
            here = [(n, self.far.host.handle(handle - 1000)) for n, handle in parts]
            return super().call(method, here, inputs)

    return FarBackend()


def ticks(session, count):
    outs = [session.tick(TickInput(np.full(16, 0.1 * k, np.float32), text="é")) for k in range(count)]
    return [(out.tokens, out.text, out.audio.tobytes(), out.stats) for out in outs]


def test_sessions_on_slots_of_a_backend_say_what_they_say_on_host_memory(make_engine, far):
    here, there = make_engine().session(seed=3), make_engine(backend=far).session(seed=3)
    assert ticks(here, 3) == ticks(there, 3)
    twin, again = there.fork(), there.engine.restore(there.snapshot())
    assert far.far.log == [("copy", 0, 1), ("read", 0), ("write", 2)]
    expected = ticks(here, 4)
    assert expected == ticks(there, 4) == ticks(twin, 4) == ticks(again, 4)


def test_a_batch_reaches_each_session_at_its_own_slot(make_engine, far):
    engine, alone = make_engine(backend=far), make_engine().session()
    first, second = engine.session(), engine.session()
    ticks(first, 2), ticks(alone, 2)
    given = TickInput(np.full(16, 0.3, np.float32))
    out = engine.tick_batch([second, first], [given, given])[1]
    assert out.audio.tobytes() == alone.tick(given).audio.tobytes()


def test_a_slot_is_zeroed_by_its_memory_when_it_comes_back(make_engine, far):
    engine = make_engine(backend=far)
    session = engine.session()
    session.tick()
    assert any(far.far.host.read(0))
    del session
    gc.collect()
    assert far.far.log == [("zero", 0)] and not any(far.far.host.read(0)) and engine.capacity().free == 3


def test_a_copy_that_fails_gives_the_slot_back(make_engine, far):
    engine = make_engine(backend=far)
    session = engine.session()

    def fail(source, to):
        raise CapacityError("no", fix="close a session")

    far.far.copy = fail
    with pytest.raises(CapacityError, match="no"):
        session.fork()
    assert engine.capacity().free == 2
    session.tick()


@pytest.mark.parametrize("size", [1, 100])
def test_host_slots_read_write_copy_and_zero_one_slot_only(size):
    memory = HostSlots(3, size)
    pool = SlotPool(memory)
    patterns = [bytes([k + 1]) * size for k in range(3)]
    for index, data in enumerate(patterns):
        memory.write(index, memoryview(data))
    memory.copy(2, 0)
    assert [memory.read(k) for k in range(3)] == [patterns[2], patterns[1], patterns[2]]
    memory.zero(1)
    assert [memory.read(k) for k in range(3)] == [patterns[2], bytes(size), patterns[2]]
    ((address, nbytes),) = memory.host_blocks()
    assert address == pool.handle(0).ctypes.data and nbytes == memory.reserved_bytes
