"""Session states in device memory, and the counters among them that the host has to know."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from tmlc.errors import CapacityError, ContextFullError, KernelError, SessionError
from tmlc.runtimes.core.slots import SlotMemory, check_count
from tmlc.runtimes.cuda.driver import Driver
from tmlc.runtimes.cuda.plan import PositionInfo, up

LARGEST = 2**53  # a position that none can have


class DeviceSlots(SlotMemory):
    """`count` slots in device memory; a handle is the slot's number.

    Positions are kept twice: where kernels read and move them, and here, so that a call that has no room is refused
    before anything runs. Slots are copied by any thread, and `close` waits for copies that are under way.

    Raises UsageError for a count that no engine has, CapacityError when the device has not the memory.
    """

    def __init__(self, driver: Driver, count: int, slot_bytes: int, counters: Sequence[int]) -> None:
        self.count, self.slot_bytes, self._driver = check_count(count), slot_bytes, driver
        self.pitch = up(max(slot_bytes, 1))
        self.reserved_bytes = self.pitch * count
        driver.activate()
        free, _ = driver.memory()
        if self.reserved_bytes > free:
            raise CapacityError(
                f"{count} sessions take {self.reserved_bytes} bytes of device memory, {free} are free",
                fix="load with fewer sessions, or compile with a shorter context",
            )
        self.address = driver.allocate(self.reserved_bytes)
        self._counters = {offset: number for number, offset in enumerate(sorted(set(counters)))}
        self._positions = np.zeros((count, len(self._counters)), np.int64)
        self._closed = False
        # Not taken by `zero`, which the garbage collector calls anywhere, a copy included.
        self._copying = threading.Lock()

    def handle(self, index: int) -> int:
        return index

    def offset(self, index: int) -> int:
        """Where a slot begins, in bytes from the first one."""
        return index * self.pitch

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Around a copy. Raises SessionError where the memory has been freed."""
        with self._copying:
            if self._closed:
                raise SessionError("the engine is closed", fix="load the package again")
            self._driver.activate()
            yield

    def read(self, index: int) -> bytes:
        out = np.empty(self.slot_bytes, np.uint8)
        with self._open():
            self._driver.to_host(out, self.address + self.offset(index))
            self._driver.synchronize()
        return out.tobytes()

    def write(self, index: int, data: bytes | memoryview) -> None:
        host = np.frombuffer(data, np.uint8)
        with self._open():
            self._driver.to_device(self.address + self.offset(index), host)
            self._driver.synchronize()
        for offset, number in self._counters.items():
            self._positions[index, number] = host[offset : offset + 8].view(np.int64)[0]

    def zero(self, index: int) -> None:
        self._positions[index] = 0
        if self._closed:
            return
        with suppress(KernelError):  # a lost device has lost the slot too; the next call says so
            self._driver.activate()
            self._driver.zero(self.address + self.offset(index), self.pitch)

    def copy(self, source: int, to: int) -> None:
        with self._open():
            self._driver.copy(self.address + self.offset(to), self.address + self.offset(source), self.pitch)
        self._positions[to] = self._positions[source]

    def close(self) -> None:
        """Before the memory is freed: what comes later is refused, or does nothing."""
        with self._copying:
            self._closed = True

    def check(self, index: int, counters: Sequence[PositionInfo], n: int) -> None:
        """Raises KernelError for a slot whose position none can have, ContextFullError where n more have no room."""
        for counter in counters:
            position = int(self._positions[index, self._counters[counter.offset]])
            if not 0 <= position <= LARGEST:
                raise KernelError(
                    f"the slot holds position {position}", fix="restore the session from a sound snapshot"
                )
            if counter.limit and position + n > counter.limit:
                raise ContextFullError(
                    f"context full: {position} + {n} positions do not fit the limit of {counter.limit}",
                    fix="close the session, or compile with the context policy ring_with_sinks",
                )

    def advance(self, index: int, counters: Sequence[PositionInfo], n: int) -> None:
        """Moves the host's counters as the kernels moved theirs."""
        for counter in counters:
            self._positions[index, self._counters[counter.offset]] += n
