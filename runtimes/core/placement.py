"""Where an engine's threads and memory are put: cores to tie workers to, pages to lock, large pages for weights."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tmlc.errors import CapacityError, UsageError


@dataclass(frozen=True, slots=True)
class Placement:
    """How a load uses the machine; nothing here changes an output.

    Attributes:
        pin: tie each worker thread to a core of its own.
        lock_memory: keep every page that a tick uses in memory.
        huge_pages: copy the weights into memory of large pages.
    """

    pin: bool = False
    lock_memory: bool = False
    huge_pages: bool = False

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

    def weights(self, mapped: np.ndarray) -> np.ndarray:
        """The weights where kernels shall read them: `mapped` itself (uint8, flat), or with `huge_pages` a copy of it.

        Raises:
            UsageError: this system has no large pages that a program may ask for.
            CapacityError: there is not the memory for a copy.
        """
        return copy_to_huge_pages(mapped) if self.huge_pages and mapped.nbytes else mapped

    def lock(self, address: int, nbytes: int, what: str) -> None:
        """Locks memory where `lock_memory` asks for it.

        Raises:
            CapacityError: the system refuses, with what to do.
        """
        if self.lock_memory and nbytes:
            lock_pages(address, nbytes, what)


def refuse_cpu_options(target: str, isa: str | None, portable_bits: bool, placement: Placement | None) -> None:
    """For runtimes that drive a device: there is nothing on the host for these options of a load to act on.

    Raises:
        UsageError: `isa`, `portable_bits`, or anything of a placement is asked for; names the first.
    """
    asked = {"isa": isa is not None, "portable_bits": portable_bits} | asdict(placement or Placement())
    for what in (name for name, given in asked.items() if given):
        raise UsageError(
            f"{what} is for the target cpu, not for {target}", where=what, fix=f"leave {what} out, or load target cpu"
        )


HUGE_PAGE = 2 << 20
"""Bytes; the copy begins at a multiple, which a page of that size needs."""


def copy_to_huge_pages(data: np.ndarray) -> np.ndarray:
    """A copy of flat uint8 `data` in private memory for which large pages were asked (madvise). Where the system cannot
    find enough of them it takes ordinary ones for the rest. The memory goes when the array does."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raise UsageError("this system has no large pages to ask for", where="huge_pages", fix="load without huge_pages")
    try:
        memory = mmap.mmap(-1, data.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, OverflowError, ValueError) as error:
        raise CapacityError(
            f"this machine has not the memory for a copy of {data.nbytes} bytes of weights",
            where="huge_pages",
            fix="load without huge_pages",
        ) from error
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    copy = whole[start : start + data.nbytes]
    copy[:] = data
    return copy


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
    raise CapacityError(
        f"cannot lock {nbytes} bytes of {what}: {os.strerror(number)}",
        where="lock_memory",
        fix="load without lock_memory",
    )


def _limit() -> str:
    """What the system allows, in words for an error."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    except (ImportError, AttributeError, OSError):
        return ""
    return "" if soft == resource.RLIM_INFINITY else f"; it may lock {soft} bytes in all"
