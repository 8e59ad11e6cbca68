"""Slots in device memory, and the count of positions of each, which the host keeps."""

from __future__ import annotations

import threading

import numpy as np

from tmlc.errors import CapacityError, KernelError
from tmlc.runtimes.core.slots import SlotMemory, check_count, no_room
from tmlc.runtimes.tensorrt.device import Device
from tmlc.runtimes.tensorrt.plan import ALIGN


class DeviceSlot:
    """One slot: its address on the device, and the count of positions of each method by its offset in the slot.

    The counts are the host's: a call must know them before it runs, to find room in the context and the ends of rings.
    """

    __slots__ = ("address", "counts")

    def __init__(self, address: int, offsets: tuple[int, ...]) -> None:
        self.address, self.counts = address, dict.fromkeys(offsets, 0)


class DeviceSlots(SlotMemory):
    """`count` slots side by side in one piece of device memory."""

    def __init__(
        self, device: Device, count: int, slot_bytes: int, offsets: tuple[int, ...], lock: threading.RLock
    ) -> None:
        self.count, self.slot_bytes = check_count(count), slot_bytes
        self._device, self._offsets, self._lock = device, offsets, lock
        self._closed = False
        step = -(-max(slot_bytes, 1) // ALIGN) * ALIGN
        self.reserved_bytes = step * count
        try:
            self._address = device.allocate(self.reserved_bytes)
        except CapacityError as error:
            raise no_room(count, slot_bytes) from error
        self._slots = [DeviceSlot(self._address + index * step, offsets) for index in range(count)]

    def handle(self, index: int) -> DeviceSlot:
        return self._slots[index]

    def read(self, index: int) -> bytes:
        slot, data = self._slots[index], np.zeros(self.slot_bytes, np.uint8)
        with self._lock:
            self._device.download(data, slot.address)
            self._device.wait()
        for offset, count in slot.counts.items():
            data[offset : offset + 8] = np.frombuffer(np.int64(count).tobytes(), np.uint8)
        return data.tobytes()

    def write(self, index: int, data: bytes | memoryview) -> None:
        slot, array = self._slots[index], np.frombuffer(data, np.uint8).copy()
        with self._lock:
            self._device.upload(slot.address, array)
            self._device.wait()
        for offset in self._offsets:
            slot.counts[offset] = int(array[offset : offset + 8].view(np.int64)[0])

    def zero(self, index: int) -> None:
        slot = self._slots[index]
        slot.counts = dict.fromkeys(self._offsets, 0)
        try:
            with self._lock:
                if self._closed:  # a session that outlives its engine gives its slot back all the same
                    return
                self._device.zero(slot.address, self.slot_bytes)
                self._device.wait()
        except KernelError:
            pass  # the device is lost, and the next call that uses it says so

    def copy(self, source: int, to: int) -> None:
        with self._lock:
            self._device.copy(self._slots[to].address, self._slots[source].address, self.slot_bytes)
            self._device.wait()
        self._slots[to].counts = dict(self._slots[source].counts)

    def close(self) -> None:
        """Gives the memory back."""
        with self._lock:
            self._closed = True
            self._device.free(self._address)
