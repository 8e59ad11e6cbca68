"""The memory of all sessions, reserved once: a slot is one session's states, byte for byte.

Taking and giving back a slot never allocates, so admission cannot fail for want of memory once the engine
is loaded.
"""

from __future__ import annotations

import threading

import numpy as np

from tmlc.errors import CapacityError, UsageError

ALIGNMENT = 64
MAX_SLOTS = 65536


class SlotPool:
    """`count` slots of `slot_bytes` bytes, each 64-byte aligned and all zeros when taken.

    Thread-safe. The whole memory is written once here, so that no page is first touched inside a tick.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        if not 1 <= count <= MAX_SLOTS:
            raise UsageError(f"sessions must be 1 to {MAX_SLOTS}, not {count}")
        self.count, self.slot_bytes = count, slot_bytes
        self._pitch = -(-max(slot_bytes, 1) // ALIGNMENT) * ALIGNMENT
        try:
            raw = np.empty(self._pitch * count + ALIGNMENT, np.uint8)
            raw.fill(0)
        except (MemoryError, ValueError, OverflowError) as error:
            raise CapacityError(
                f"cannot reserve {count} sessions of {slot_bytes} bytes",
                fix="load with fewer sessions, or compile with a shorter context",
            ) from error
        start = -raw.ctypes.data % ALIGNMENT
        self._memory = raw[start : start + self._pitch * count]
        # Re-entrant: the garbage collector gives an abandoned session's slot back, on any thread.
        self._lock = threading.RLock()
        self._free = list(range(count - 1, -1, -1))
        self._taken = [False] * count

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all slots together, padding included."""
        return self._memory.nbytes

    @property
    def address(self) -> int:
        """Where the first slot lies."""
        return int(self._memory.ctypes.data)

    def take(self) -> int:
        """The index of a zeroed slot, now owned by the caller. Raises CapacityError when none is free."""
        with self._lock:
            if not self._free:
                raise CapacityError(
                    f"all {self.count} sessions of this engine are in use",
                    fix="close a session, or load the engine with a larger `sessions`",
                )
            index = self._free.pop()
            self._taken[index] = True
            return index

    def view(self, index: int) -> np.ndarray:
        """The bytes of slot `index`, uint8[slot_bytes]."""
        start = index * self._pitch
        return self._memory[start : start + self.slot_bytes]

    def give_back(self, index: int) -> None:
        """Zeroes a slot and makes it free again; giving back a free slot does nothing."""
        with self._lock:
            if not self._taken[index]:
                return
            self.view(index).fill(0)
            self._taken[index] = False
            self._free.append(index)
