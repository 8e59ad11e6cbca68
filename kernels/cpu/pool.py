"""A persistent pool of threads that plans run on."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence

from tmlc.errors import UsageError
from tmlc.kernels.cpu.library import Library


class Pool:
    """A persistent pool of threads; `threads` counts the caller. May serve several plans.

    Args:
        library: the kernels.
        threads: how many, the caller included.
        cores: the core of each thread, None leaves them to the system. The caller's own (the first) is not
            touched: it belongs to the application.

    Raises:
        UsageError: no such number of threads, or a core that this process may not use.
    """

    def __init__(self, library: Library, threads: int, cores: Sequence[int] | None = None) -> None:
        self.library = library
        self._handle = library._c.tmlc_pool_create(threads)
        if not self._handle:
            raise UsageError(f"cannot make a pool of {threads} threads", where="threads", fix="use 1 to 1024")
        self.threads: int = library._c.tmlc_pool_threads(self._handle)
        self._finalizer = weakref.finalize(self, library._c.tmlc_pool_destroy, self._handle)
        if cores is not None:
            self._pin(cores)

    def _pin(self, cores: Sequence[int]) -> None:
        number = self.library._c.tmlc_pool_pin(self._handle, (ctypes.c_int * len(cores))(*cores), len(cores))
        if number:
            self.close()
            raise UsageError(
                f"cannot pin {self.threads} threads to cores {', '.join(map(str, cores))}: {os.strerror(number)}",
                where="pin",
                fix="give cores that this process may use (taskset -p shows them), or load without pin",
            )

    def close(self) -> None:
        """Ends the threads (also done when the pool is collected)."""
        self._finalizer()
        self._handle = None
