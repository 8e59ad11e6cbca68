"""Slots in device memory, while another thread closes the engine."""

import threading

import numpy as np
import pytest

from tmlc.errors import SessionError
from tmlc.runtimes.cuda.slots import DeviceSlots

SLOT = 64


class Device:
    """Device memory whose waits last until `done` is set."""

    def __init__(self):
        self.bytes = np.zeros(4 * 256, np.uint8)
        self.log, self.waiting, self.done = [], threading.Event(), threading.Event()
        self.done.set()

    def activate(self):
        self.log.append("activate")

    def memory(self):
        return 1 << 30, 1 << 30

    def allocate(self, nbytes):
        return 0

    def to_host(self, host, address):
        self.log.append("to_host")
        host[:] = self.bytes[address : address + host.nbytes]

    def to_device(self, address, host):
        self.bytes[address : address + host.nbytes] = host

    def copy(self, to, source, nbytes):
        self.bytes[to : to + nbytes] = self.bytes[source : source + nbytes]

    def zero(self, address, nbytes):
        self.log.append("zero")

    def synchronize(self):
        self.waiting.set()
        assert self.done.wait(60)
        self.log.append("synchronize")


def test_closing_waits_for_a_copy_that_is_under_way_and_refuses_later_ones():
    device = Device()
    slots = DeviceSlots(device, 4, SLOT, [0])
    slots.write(1, bytes(range(SLOT)))
    device.done.clear(), device.waiting.clear()
    read = []
    reader = threading.Thread(target=lambda: read.append(slots.read(1)))
    reader.start()
    assert device.waiting.wait(60)
    closer = threading.Thread(target=lambda: (slots.close(), device.log.append("closed")))
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and "closed" not in device.log
    device.done.set()
    reader.join(60), closer.join(60)
    assert read == [bytes(range(SLOT))] and device.log[-2:] == ["synchronize", "closed"]
    for late in (lambda: slots.read(1), lambda: slots.write(1, bytes(SLOT)), lambda: slots.copy(1, 2)):
        with pytest.raises(SessionError, match="engine is closed"):
            late()
    slots.zero(1)
    assert device.log[-1] == "closed", "a slot that is given back late touches nothing"


def test_a_slot_is_given_back_while_another_is_copied():
    """By the garbage collector, on whichever thread and inside whichever call."""
    device = Device()
    slots = DeviceSlots(device, 4, SLOT, [0])
    device.synchronize = lambda: slots.zero(2)
    assert slots.read(1) == bytes(SLOT) and device.log[-1] == "zero"
