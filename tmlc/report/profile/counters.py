"""Instructions that a step executes, where the processor and the system count them: `perf_event_open` on Linux.

Every thread of this process gets a counter of its own, so those of the kernels' pool are in; what other threads do
meanwhile is, too. A thread that waits in a loop executes instructions: with more than one kernel thread the count
depends on how long they waited for each other.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import Any

import numpy as np

HARDWARE, INSTRUCTIONS = 0, 1
"""Type and number of the event, of `linux/perf_event.h`."""
NUMBERS = {"x86_64": 298, "aarch64": 241}
"""Of the system call `perf_event_open`."""
ATTRIBUTES, FLAGS_AT, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 112, 40, 1 << 5, 1 << 6
TASKS = Path("/proc/self/task")


class Counter:
    """Events of all threads that this process has now.

    Raises:
        OSError: the processor or the system does not count them; the message says which.
    """

    def __init__(self, kind: int = HARDWARE, event: int = INSTRUCTIONS) -> None:
        if platform.system() != "Linux" or platform.machine() not in NUMBERS:
            raise OSError(f"instructions are not counted on {platform.system()} {platform.machine()}")
        call = ctypes.CDLL(None, use_errno=True).syscall
        number = NUMBERS[platform.machine()]
        attributes = bytearray(ATTRIBUTES)
        struct.pack_into("IIQ", attributes, 0, kind, ATTRIBUTES, event)
        struct.pack_into("Q", attributes, FLAGS_AT, EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR)
        buffer = (ctypes.c_char * ATTRIBUTES).from_buffer(attributes)
        self._files: list[int] = []
        for thread in sorted(int(task.name) for task in TASKS.iterdir()):
            file = call(number, buffer, thread, -1, -1, 0)
            if file < 0:
                self.close()
                raise OSError(f"perf_event_open: {os.strerror(ctypes.get_errno()).lower()}{_hint(ctypes.get_errno())}")
            self._files.append(file)

    def read(self) -> int:
        """Events so far, of all threads."""
        return sum(struct.unpack("Q", os.read(file, 8))[0] for file in self._files)

    def close(self) -> None:
        """Frees the counters; twice does nothing."""
        while self._files:
            os.close(self._files.pop())


def _hint(error: int) -> str:
    if error in (1, 13):
        return "; kernel.perf_event_paranoid forbids it"
    return "; this processor, or this virtual machine, has no such counter" if error in (2, 19, 95) else ""


def instructions(per_tick: list[int]) -> dict[str, Any]:
    """The record `instructions` of a profile; `per_tick` from the first tick on, which counts in nothing."""
    values = np.asarray(per_tick[1:], np.float64)
    low, middle, high = np.percentile(values, (5, 50, 95), method="higher")
    return {
        "per_tick_p50": int(middle),
        "per_tick_p5": int(low),
        "per_tick_p95": int(high),
        "per_tick_total": int(values.sum()),
    }
