"""A plan in the words of docs/plan-format.md as an object that runs."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tmlc.errors import ContextFullError, KernelError, PlanError, UsageError
from tmlc.kernels.cpu.library import Library
from tmlc.kernels.cpu.pool import Pool

MAGIC = 0x544D4C43504C414E
VERSION = 2

_STATUS_CONTEXT_FULL = 2
_STATUS_BAD_CALL = 3
_STATUS_BAD_SLOT = 4
_FIX_METHOD = "give the number of a method in the plan's list of methods, from 0"


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
            raise UsageError("the plan is closed", fix="make a new Plan of the same words and weights")
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
            place = f"method {method}" + (f", {where}" if where else "")
            raise UsageError(what, where=place, fix="nothing was changed: call again, with what Plan.run_batch takes")
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
                fix = "make it with np.zeros(plan.slot_bytes, np.uint8)"
                raise UsageError("a slot is a writable flat uint8 array", where="slot", fix=fix)
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
            raise UsageError(f"the plan has no method {method}", fix=_FIX_METHOD)
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
            raise UsageError(f"the plan has no method {method}", fix=_FIX_METHOD)
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
                f"where the method has {self.counts[0]} and {self.counts[1]}",
                fix="give an array for each of them, in the order of the plan",
            )
        for k, array in enumerate(inputs):
            if array is self._inputs[k]:
                continue
            if not array.flags.c_contiguous:
                raise UsageError(f"input {k} is not C-contiguous", fix="give np.ascontiguousarray of it")
            self._in[k], self._in_bytes[k], self._inputs[k] = array.ctypes.data, array.nbytes, array
        for k, array in enumerate(outputs):
            if array is self._outputs[k]:
                continue
            if not array.flags.c_contiguous or not array.flags.writeable:
                raise UsageError(f"output {k} is not C-contiguous and writable", fix="give one as np.empty makes it")
            self._out[k], self._out_bytes[k], self._outputs[k] = array.ctypes.data, array.nbytes, array
