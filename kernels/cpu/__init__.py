"""The CPU kernel library from Python: the variants that run here; plans and thread pools as objects.

The library is built once per instruction set (setup.py); `load_library` takes the best that this machine
can run. Needs numpy only (the library is called through ctypes). Nothing here knows models or packages:
`Plan` takes the words of docs/plan-format.md and runs them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sysconfig
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmlc.errors import ContextFullError, KernelError, PlanError, TargetError, UsageError

ABI = 3
MAGIC = 0x544D4C43504C414E
VERSION = 2

_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
# Variants, best first, and the flags (as /proc/cpuinfo names them) that each needs.
_VARIANTS: dict[str, dict[str, set[str]]] = {
    "x86_64": {"v4": _V4, "v3": _V3, "portable": set()},
    "aarch64": {"neon": {"asimd", "asimddp"}, "portable": set()},
}

_STATUS_CONTEXT_FULL = 2
_STATUS_BAD_CALL = 3
_STATUS_BAD_SLOT = 4


def _machine() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _cpu_flags() -> set[str]:
    """Feature flags as Linux names them; empty where they cannot be read (then only `portable` runs)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()


def _library_file(name: str) -> Path | None:
    here = Path(__file__).parent
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    exact = here / f"_tmlc_cpu_{name}{suffix}"
    if exact.exists():
        return exact
    return next(iter(sorted(here.glob(f"_tmlc_cpu_{name}.*"))), None)


def _known_isas() -> dict[str, set[str]]:
    return _VARIANTS.get(_machine(), {"portable": set()})


def available_isas() -> list[str]:
    """The variants that are built and that this CPU can run, best first."""
    flags = _cpu_flags()
    return [isa for isa, needs in _known_isas().items() if needs <= flags and _library_file(isa) is not None]


class Library:
    """One loaded variant of the kernel library.

    Attributes:
        isa: the variant's name (`v4`, `v3`, `neon`, `portable`).
        fused: its multiply-add rounds once, so plans may run with portable bits.
        ops: opcode of each operation, by name.
        path: the shared library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        if loaded.tmlc_abi() != ABI:
            raise TargetError(
                f"the kernel library has interface {loaded.tmlc_abi()}, this tmlc needs {ABI}",
                where=str(path),
                fix="build it again: pip install --force-reinstall tmlc",
            )
        self._c = _declare(loaded)
        self.isa: str = self._c.tmlc_isa().decode()
        self.fused = bool(self._c.tmlc_fused())
        self.ops: dict[str, int] = {
            self._c.tmlc_op_name(k).decode(): k for k in range(self._c.tmlc_op_count())
        }


def load_library(isa: str | None = None, portable_bits: bool = False) -> Library:
    """Loads a variant of the kernel library (each once per process).

    Args:
        isa: a variant; None takes `TMLC_CPU_ISA` from the environment, else the best that runs here.
        portable_bits: the library must be able to run plans with portable bits: where the variant has no fused
            multiply-add (`portable` on x86), its twin that emulates one is taken.

    Raises:
        TargetError: the variant is unknown, not built, or this CPU cannot run it.
    """
    wanted = isa or os.environ.get("TMLC_CPU_ISA") or None
    available = available_isas()
    if not available:
        raise TargetError(
            f"no CPU kernel library is built for {_machine()}",
            fix="install a C++17 compiler and run: pip install --force-reinstall tmlc",
        )
    if wanted is not None and wanted not in available:
        known = wanted in _known_isas()
        built = known and _library_file(wanted) is not None
        why = (
            "this CPU cannot run it" if built else "it is not built" if known else "there is no such variant"
        )
        raise TargetError(
            f"instruction set {wanted!r}: {why}",
            where="isa" if isa else "TMLC_CPU_ISA",
            fix=f"use one of: {', '.join(available)}",
        )
    library = _load(wanted or available[0])
    return library if library.fused or not portable_bits else _load(f"{library.isa}_exact")


@functools.cache
def _load(name: str) -> Library:
    path = _library_file(name)
    if path is None:
        raise TargetError(
            f"the kernel library {name!r} is not built", fix="run: pip install --force-reinstall tmlc"
        )
    return Library(path)


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


class MemoryReader:
    """Measures how fast a pool's threads read memory that no cache holds.

    Args:
        pool: whose threads read.
        megabytes: how much is reserved and read each time; several times the last cache.
    """

    def __init__(self, pool: Pool, megabytes: int = 512) -> None:
        self._pool = pool
        room = np.zeros((megabytes << 20) + 64, np.uint8)
        self._data = room[-room.ctypes.data % 64 :][: megabytes << 20]
        self._data[:] = 1  # every page is there, and none is the kernel's one page of zeros

    def bandwidth(self) -> float:
        """Bytes per second of one pass over the memory."""
        c, data = self._pool.library._c, self._data
        started = time.perf_counter()
        total = c.tmlc_read_memory(self._pool._handle, data.ctypes.data, data.nbytes)
        seconds = time.perf_counter() - started
        if total != data.nbytes // 8 * 0x0101010101010101 % 2**64:
            raise KernelError("the memory that was read is not what was written", fix="the machine's memory is faulty")
        return data.nbytes / seconds


PRODUCTS = ("f32", "bf16", "int8")
"""How weights are multiplied; 4-bit ones as int8."""


def multiply_rate(pool: Pool, product: str) -> float:
    """Multiply-adds per second of a pool's threads when nothing has to be fetched: the instruction roofline.

    Args:
        product: of `PRODUCTS`, with the instruction that the pool's library has for it.
    """
    units, rounds = 8 * pool.threads, 1 << 16
    started = time.perf_counter()
    done = pool.library._c.tmlc_multiply_adds(pool._handle, PRODUCTS.index(product), units, rounds)
    return float(done) / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Timed:
    """What each operation of a method took and touched: arrays [operations], sums over all runs.

    Attributes:
        runs, rows: of the method, and the positions of all of them.
        ns: float64 nanoseconds.
        experts: int64, different experts of a `moe`, counted in each run.
        keys, row_keys: int64, cached positions that any row of an `attention` saw, and that each row saw, added up.
    """

    runs: int
    rows: int
    ns: np.ndarray
    experts: np.ndarray
    keys: np.ndarray
    row_keys: np.ndarray


class Plan:
    """A validated plan with its arena and scratch memory. One run at a time.

    Args:
        library: the kernels.
        words: int64, the flat form of docs/plan-format.md.
        weights: uint8, used in place (kept alive here); 64-byte aligned for speed, 8-byte aligned at least.
        threads: the largest pool that will run it.
        portable_bits: outputs have the same bits on every machine (docs/plan-format.md, "Determinism").

    Raises:
        PlanError: the plan is malformed or would touch memory that is not its own.
        UsageError: portable bits from a library that cannot give them.
    """

    def __init__(
        self, library: Library, words: np.ndarray, weights: np.ndarray, threads: int, portable_bits: bool = False
    ) -> None:
        if portable_bits and not library.fused:
            raise UsageError(
                f"kernel variant {library.isa!r} has no fused multiply-add, so its bits are its own",
                where="portable_bits",
                fix="take the library of load_library(isa, portable_bits=True)",
            )
        if words.dtype != np.int64 or words.ndim != 1 or not words.flags.c_contiguous:
            raise PlanError("the words of a plan are a flat int64 array", fix="compile the package again")
        if weights.dtype != np.uint8 or weights.ndim != 1 or not weights.flags.c_contiguous:
            raise PlanError("the weights of a plan are a flat uint8 array", fix="compile the package again")
        self.library, self._weights, self._c = library, weights, library._c
        error = ctypes.create_string_buffer(512)
        self._handle = self._c.tmlc_plan_create(
            words.ctypes.data, words.size, weights.ctypes.data, weights.size, threads, error, len(error)
        )
        if not self._handle:
            raise PlanError(
                f"the CPU plan is refused: {error.value.decode(errors='replace')}",
                fix="compile the package again with this version of tmlc",
            )
        self._finalizer = weakref.finalize(self, self._c.tmlc_plan_destroy, self._handle)
        self._c.tmlc_plan_portable_bits(self._handle, int(portable_bits))
        self._error = error
        self.arena_bytes: int = self._c.tmlc_plan_arena_bytes(self._handle)
        self.slot_bytes: int = self._c.tmlc_plan_slot_bytes(self._handle)
        self.scratch_bytes: int = self._c.tmlc_plan_scratch_bytes(self._handle)
        self.blocks: tuple[tuple[int, int], ...] = (  # address and bytes of the arena and the scratch
            (self._c.tmlc_plan_arena(self._handle) or 0, self.arena_bytes),
            (self._c.tmlc_plan_scratch(self._handle) or 0, self.scratch_bytes),
        )
        self._calls: dict[int, _Arguments] = {}
        self._parts = (_Part * 8)()
        self._last_slot: np.ndarray | None = None  # of the last call, where that had one part
        self._part_at_fault = (ctypes.c_int64 * 1)()
        self._busy = threading.Lock()

    def run(
        self,
        pool: Pool | None,
        method: int,
        n: int,
        slot: np.ndarray,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
    ) -> None:
        """Runs one method on n positions of one session: `run_batch` with one part."""
        self.run_batch(pool, method, [(n, slot)], inputs, outputs)

    def run_batch(
        self,
        pool: Pool | None,
        method: int,
        parts: Sequence[tuple[int, np.ndarray]],
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
    ) -> None:
        """Runs one method on the positions of several sessions; outputs are written in place.

        Args:
            pool: None runs on the caller alone (the results are the same).
            method: number of the method in the plan; where `unbatched` gives a reason it takes one part.
            parts: for each session its new positions, at least 1 and together at most the method's max_n, and its slot:
                uint8 (at least `slot_bytes`, 8-byte aligned), changed in place. No slot is given twice.
            inputs, outputs: C-contiguous arrays, at least as large as the plan says for all positions together, the
                rows of the first part first.

        Raises:
            ContextFullError: the bounded context of session `error.part` has no room; nothing was changed.
            KernelError: where `error.part` is not None, that session's slot is damaged and nothing was changed;
                otherwise an index was out of range, and none of the slots must be used any more.
            UsageError: wrong positions, sizes or arrays; nothing was changed.
        """
        if self._handle is None:
            raise UsageError("the plan is closed")
        if not self._busy.acquire(blocking=False):
            raise UsageError("the plan is running already", fix="give each thread its own Plan")
        try:
            slot_bytes = self._fill_parts(parts)
            call = self._calls.get(method) or self._arguments(method)
            call.fill(inputs, outputs)
            status = self._c.tmlc_plan_run(
                self._handle,
                pool._handle if pool is not None else None,
                method,
                self._parts,
                len(parts),
                slot_bytes,
                *call.pointers,
                self._part_at_fault,
                self._error,
                len(self._error),
            )
            part = int(self._part_at_fault[0])
            what = self._error.value.decode(errors="replace") if status else ""
        finally:
            self._busy.release()
        if status == 0:
            return
        where = f"session {part} of {len(parts)}" if part >= 0 and len(parts) > 1 else ""
        if status == _STATUS_CONTEXT_FULL:
            full = ContextFullError(
                what, where=where, fix="close the session, or compile with the context policy ring_with_sinks"
            )
            full.part = part
            raise full
        if status == _STATUS_BAD_CALL:
            raise UsageError(what, where=f"method {method}" + (f", {where}" if where else ""))
        failed = KernelError(what, where=where, fix="the session is poisoned; check the package with tmlc verify")
        failed.part = part if status == _STATUS_BAD_SLOT else None
        raise failed

    def _fill_parts(self, parts: Sequence[tuple[int, np.ndarray]]) -> int:
        """Writes the parts where the library reads them; returns the bytes that every slot has."""
        if len(parts) > len(self._parts):
            self._parts = (_Part * (2 * len(parts)))()
        if len(parts) == 1 and parts[0][1] is self._last_slot:  # still in place, and checked
            self._parts[0].n = parts[0][0]
            return parts[0][1].nbytes
        self._last_slot = None
        slot_bytes = 2**62
        for k, (n, slot) in enumerate(parts):
            if slot.dtype != np.uint8 or not slot.flags.c_contiguous or not slot.flags.writeable:
                raise UsageError("a slot is a writable flat uint8 array", where="slot")
            self._parts[k].n, self._parts[k].slot = n, slot.ctypes.data
            slot_bytes = min(slot_bytes, slot.nbytes)
        if len(parts) == 1:
            self._last_slot = slot
        return slot_bytes

    def unbatched(self, method: int) -> str | None:
        """Why a method takes only one session in a call; None where it takes several."""
        why = self._c.tmlc_plan_unbatched(self._handle, method)
        return None if why is None else str(why.decode())

    def profile(self, on: bool) -> None:
        """Starts (from zero) or stops measuring the operations."""
        self._c.tmlc_plan_profile(self._handle, int(on))

    def timed(self, method: int) -> Timed:
        """What the operations of a method took and touched since `profile(True)`.

        Raises UsageError when there is no such method.
        """
        count = self._c.tmlc_plan_times(self._handle, method, None, None, 0, None)
        if count < 0:
            raise UsageError(f"the plan has no method {method}")
        ns, touched, runs = np.zeros(count), np.zeros((count, 3), np.int64), np.zeros(2, np.int64)
        self._c.tmlc_plan_times(
            self._handle, method, ns.ctypes.data, touched.ctypes.data, count, runs.ctypes.data
        )
        return Timed(int(runs[0]), int(runs[1]), ns, *touched.T)

    def close(self) -> None:
        """Frees the arena (also done when the plan is collected)."""
        self._finalizer()
        self._handle = None
        self._last_slot = None
        self._calls.clear()

    def _arguments(self, method: int) -> _Arguments:
        n_inputs = self._c.tmlc_plan_inputs(self._handle, method)
        if n_inputs < 0:
            raise UsageError(f"the plan has no method {method}")
        call = _Arguments(n_inputs, self._c.tmlc_plan_outputs(self._handle, method))
        self._calls[method] = call
        return call


class _Part(ctypes.Structure):
    """`tmlc::Part` of kernels/cpu/src/plan.h."""

    _fields_ = (("n", ctypes.c_int64), ("slot", ctypes.c_void_p))


class _Arguments:
    """The C arrays of one method's arguments, made once and filled for every call. An array that the call before
    brought too is there already: asking numpy for its address takes longer than all else here."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        def arrays(count: int) -> tuple[ctypes.Array, ctypes.Array]:
            return (ctypes.c_void_p * max(count, 1))(), (ctypes.c_int64 * max(count, 1))()

        self.counts = (n_inputs, n_outputs)
        (self._in, self._in_bytes), (self._out, self._out_bytes) = arrays(n_inputs), arrays(n_outputs)
        self.pointers = (self._in, self._in_bytes, self._out, self._out_bytes)
        # As filled in, and kept: another array could take the place of one that is gone.
        self._inputs: list[np.ndarray | None] = [None] * n_inputs
        self._outputs: list[np.ndarray | None] = [None] * n_outputs

    def fill(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        if (len(inputs), len(outputs)) != self.counts:
            raise UsageError(
                f"{len(inputs)} inputs and {len(outputs)} outputs, "
                f"where the method has {self.counts[0]} and {self.counts[1]}"
            )
        for k, array in enumerate(inputs):
            if array is self._inputs[k]:
                continue
            if not array.flags.c_contiguous:
                raise UsageError(f"input {k} is not C-contiguous")
            self._in[k], self._in_bytes[k], self._inputs[k] = array.ctypes.data, array.nbytes, array
        for k, array in enumerate(outputs):
            if array is self._outputs[k]:
                continue
            if not array.flags.c_contiguous or not array.flags.writeable:
                raise UsageError(f"output {k} is not C-contiguous and writable")
            self._out[k], self._out_bytes[k], self._outputs[k] = array.ctypes.data, array.nbytes, array


def _declare(c: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    text = ctypes.c_char_p
    signatures = {
        "tmlc_abi": (i32, []),
        "tmlc_isa": (text, []),
        "tmlc_fused": (i32, []),
        "tmlc_op_count": (i32, []),
        "tmlc_op_name": (text, [i32]),
        "tmlc_pool_create": (ptr, [i32]),
        "tmlc_pool_threads": (i32, [ptr]),
        "tmlc_pool_pin": (i32, [ptr, ptr, i32]),
        "tmlc_pool_destroy": (None, [ptr]),
        "tmlc_plan_create": (ptr, [ptr, i64, ptr, i64, i32, ptr, i64]),
        "tmlc_plan_portable_bits": (None, [ptr, i32]),
        "tmlc_plan_arena_bytes": (i64, [ptr]),
        "tmlc_plan_slot_bytes": (i64, [ptr]),
        "tmlc_plan_scratch_bytes": (i64, [ptr]),
        "tmlc_plan_arena": (ptr, [ptr]),
        "tmlc_plan_scratch": (ptr, [ptr]),
        "tmlc_plan_inputs": (i32, [ptr, i32]),
        "tmlc_plan_outputs": (i32, [ptr, i32]),
        "tmlc_plan_run": (i32, [ptr, ptr, i32, ptr, i64, i64, ptr, ptr, ptr, ptr, ptr, ptr, i64]),
        "tmlc_plan_unbatched": (text, [ptr, i32]),
        "tmlc_plan_profile": (None, [ptr, i32]),
        "tmlc_plan_times": (i32, [ptr, i32, ptr, ptr, i64, ptr]),
        "tmlc_plan_destroy": (None, [ptr]),
        "tmlc_read_memory": (ctypes.c_uint64, [ptr, ptr, i64]),
        "tmlc_multiply_adds": (i64, [ptr, i32, i64, i64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    return c
