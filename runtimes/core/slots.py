"""The memory of all sessions, reserved once: a slot is one session's states, byte for byte.

Where the bytes lie is the backend's business (`Backend.slots`): host memory is here, a device keeps its own. Taking and
giving back a slot never allocates, so admission cannot fail for want of memory once the engine is loaded.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from tmlc.errors import CapacityError, InputError, UsageError

ALIGNMENT = 64
MAX_SLOTS = 65536

Slot = Any
"""What a backend's own memory calls one slot: `Backend.call` takes it, and nobody else looks inside."""


class SlotMemory(ABC):
    """The bytes of `count` slots of `slot_bytes` each, all zeros at first. Any thread may call it; one slot is never
    used by two calls at once (a session has one owner).

    Attributes:
        reserved_bytes: what all slots take, padding included.
    """

    count: int
    slot_bytes: int
    reserved_bytes: int

    @abstractmethod
    def handle(self, index: int) -> Slot:
        """What stands for slot `index` in the `parts` of `Backend.call`; it stays the same."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """A copy of the slot's bytes."""

    @abstractmethod
    def write(self, index: int, data: bytes | memoryview) -> None:
        """Fills the slot; `data` has `slot_bytes` bytes."""

    @abstractmethod
    def zero(self, index: int) -> None:
        """Fills the slot with zeros. Raises nothing: a slot is given back whatever has happened to its device."""

    @abstractmethod
    def copy(self, source: int, to: int) -> None:
        """Makes slot `to` equal to slot `source`."""

    def host_blocks(self) -> Sequence[tuple[int, int]]:
        """Address and bytes of what lies in pages of this machine, which `lock_memory` keeps there."""
        return ()


class HostSlots(SlotMemory):
    """Slots in host memory, each 64-byte aligned. The handle of a slot is its uint8[slot_bytes].

    The whole memory is written once here, so that no page is first touched inside a tick.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self.count, self.slot_bytes = check_count(count), slot_bytes
        self._pitch = pitch(slot_bytes)
        try:
            raw = np.empty(self._pitch * count + ALIGNMENT, np.uint8)
            raw.fill(0)
        except (MemoryError, ValueError, OverflowError) as error:
            raise no_room(count, slot_bytes) from error
        start = -raw.ctypes.data % ALIGNMENT
        self._memory = raw[start : start + self._pitch * count]
        self.reserved_bytes = self._memory.nbytes

    def handle(self, index: int) -> np.ndarray:
        start = index * self._pitch
        return self._memory[start : start + self.slot_bytes]

    def read(self, index: int) -> bytes:
        return self.handle(index).tobytes()

    def write(self, index: int, data: bytes | memoryview) -> None:
        self.handle(index)[:] = np.frombuffer(data, np.uint8)

    def zero(self, index: int) -> None:
        self.handle(index).fill(0)

    def copy(self, source: int, to: int) -> None:
        self.handle(to)[:] = self.handle(source)

    def host_blocks(self) -> Sequence[tuple[int, int]]:
        return [(int(self._memory.ctypes.data), self._memory.nbytes)]


def check_count(count: int) -> int:
    """`count`, when an engine may have so many slots. Raises UsageError."""
    if not isinstance(count, int) or not 1 <= count <= MAX_SLOTS:
        raise UsageError(
            f"sessions must be 1 to {MAX_SLOTS}, not {count!r}",
            where="sessions",
            fix="give how many conversations may be open at once, such as 4",
        )
    return count


def pitch(slot_bytes: int) -> int:
    """Bytes from one slot to the next."""
    return -(-max(slot_bytes, 1) // ALIGNMENT) * ALIGNMENT


def no_room(count: int, slot_bytes: int) -> CapacityError:
    """The error of a memory that cannot be reserved."""
    return CapacityError(
        f"cannot reserve {count} sessions of {slot_bytes} bytes",
        fix="load with fewer sessions, or compile with a shorter context",
    )


def odd_slot(slot_bytes: int, given: int) -> InputError:
    """The error of a call with host memory that is no slot."""
    return InputError(
        f"a slot of this package has {slot_bytes} bytes, not {given}", fix="give what the engine's slots.handle() gives"
    )


def all_taken(count: int) -> CapacityError:
    """The error of an engine whose sessions are all open."""
    return CapacityError(
        f"all {count} sessions of this engine are in use",
        fix="close a session, or load the engine with a larger `sessions`",
    )


class SlotPool:
    """Which slots of a memory are taken. Thread-safe. A slot is all zeros when it is taken.

    Attributes:
        memory: where the slots lie.
    """

    def __init__(self, memory: SlotMemory) -> None:
        self.memory = memory
        # Re-entrant: the garbage collector gives an abandoned session's slot back, on any thread.
        self._lock = threading.RLock()
        self._free = list(range(memory.count - 1, -1, -1))
        self._taken = [False] * memory.count

    @property
    def count(self) -> int:
        """Slots in all."""
        return self.memory.count

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

    def take(self) -> int:
        """The index of a zeroed slot, now owned by the caller. Raises CapacityError when none is free."""
        with self._lock:
            if not self._free:
                raise all_taken(self.count)
            index = self._free.pop()
            self._taken[index] = True
            return index

    def handle(self, index: int) -> Slot:
        """What `Backend.call` takes for slot `index`."""
        return self.memory.handle(index)

    def give_back(self, index: int) -> None:
        """Zeroes a slot and makes it free again; giving back a free slot does nothing."""
        with self._lock:
            if not self._taken[index]:
                return
            self.memory.zero(index)
            self._taken[index] = False
            self._free.append(index)
