"""Where an engine's threads and memory are put: cores to tie workers to, pages to lock."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any

from tmlc.errors import CapacityError, UsageError


@dataclass(frozen=True, slots=True)
class Placement:
    """How a load uses the machine; nothing here changes an output.

    Attributes:
        pin: tie each worker thread to a core of its own.
        lock_memory: keep every page that a tick uses in memory.
    """

    pin: bool = False
    lock_memory: bool = False

    def cores(self, threads: int) -> tuple[int, ...] | None:
        """The core of each thread when pinned: the first `threads` that this process may use.

        Raises:
            UsageError: there are fewer, or this system cannot pin.
        """
        if not self.pin:
            return None
        if not hasattr(os, "sched_getaffinity"):
            raise UsageError("this system cannot pin threads to cores", where="pin", fix="load without pin")
        allowed = sorted(os.sched_getaffinity(0))
        if threads > len(allowed):
            raise UsageError(
                f"{threads} threads cannot be pinned to {len(allowed)} cores",
                where="pin",
                fix=f"use at most {len(allowed)} threads, or let this process use more cores (taskset, cpuset)",
            )
        return tuple(allowed[:threads])

    def lock(self, address: int, nbytes: int, what: str) -> None:
        """Locks memory where `lock_memory` asks for it.

        Raises:
            CapacityError: the system refuses, with what to do.
        """
        if self.lock_memory and nbytes:
            lock_pages(address, nbytes, what)


def lock_pages(address: int, nbytes: int, what: str) -> None:
    """mlock(2) on the pages that hold `nbytes` bytes at `address`; `what` names them in the error."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mlock"):
        raise CapacityError("this system cannot lock memory", where="lock_memory", fix="load without lock_memory")
    libc.mlock.argtypes, libc.mlock.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
    if libc.mlock(address, nbytes) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        raise CapacityError(
            f"the system does not let this process lock {nbytes} bytes of {what}{_limit()}",
            where="lock_memory",
            fix="raise the limit (ulimit -l; LimitMEMLOCK= of a service; --ulimit memlock=-1 of a container), give "
            "the process CAP_IPC_LOCK, or load without lock_memory",
        )
    raise CapacityError(f"cannot lock {nbytes} bytes of {what}: {os.strerror(number)}", where="lock_memory")


def _limit() -> str:
    """What the system allows, in words for an error."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    except (ImportError, AttributeError, OSError):
        return ""
    return "" if soft == resource.RLIM_INFINITY else f"; it may lock {soft} bytes in all"
