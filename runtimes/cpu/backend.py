"""Runs a package's CPU plan: one kernel library, one thread pool, one plan, and output buffers made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmlc.kernels.cpu import Plan, Pool, load_library
from tmlc.package.reader import Package
from tmlc.runtimes.core.backend import Backend, MethodSpec, check_inputs, no_outputs
from tmlc.runtimes.core.kernels import KernelCall, KernelTimer, Touched
from tmlc.runtimes.core.placement import Placement
from tmlc.runtimes.core.slots import odd_slot
from tmlc.runtimes.cpu.plan import plan_words

TARGET = "cpu"


class CpuBackend(Backend):
    """A plan, ready to run.

    Args:
        package: an open package with a CPU target; it must stay open as long as the backend.
        threads: size of the kernel thread pool, the caller included.
        isa: instruction-set variant, None for the best that this machine has.
        placement: where the threads and the memory go.
        portable_bits: outputs have the same bits on every machine.
    """

    def __init__(
        self,
        package: Package,
        threads: int,
        isa: str | None = None,
        placement: Placement | None = None,
        portable_bits: bool = False,
    ) -> None:
        placed = placement or Placement()
        self.cores = placed.cores(threads)
        library = load_library(isa, portable_bits)
        info = package.manifest.targets[TARGET]
        plan = package.json(info.plan)
        words = plan_words(plan, package.tensors, library.ops)
        self.target = TARGET
        self.isa, self.threads = library.isa, threads
        self.slot_bytes = words.slot_bytes
        self.methods: dict[str, MethodSpec] = {spec.name: spec for spec in words.methods}
        self._index = {spec.name: i for i, spec in enumerate(words.methods)}
        self._code = _code(plan)
        self._weights = placed.weights(package.weights)
        try:
            self._outputs = {spec.name: [out.allocate(spec.max_n) for out in spec.outputs] for spec in words.methods}
        except (MemoryError, ValueError) as error:
            raise no_outputs("plan") from error
        self._views: dict[tuple[str, int], list[np.ndarray]] = {}
        self._plan = Plan(library, words.words, self._weights, threads, portable_bits)
        self._pool = Pool(library, threads, self.cores)
        reasons = ((name, self._plan.unbatched(index)) for name, index in self._index.items())
        self.unbatched = next((f"{name}: {why}" for name, why in reasons if why is not None), "")
        self._lock(placed)

    def call(
        self, method: str, parts: Sequence[tuple[int, np.ndarray]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        spec, n = self.methods[method], sum(n for n, _ in parts)
        check_inputs(spec, n, inputs)
        for _, slot in parts:
            if slot.nbytes != self.slot_bytes:
                raise odd_slot(self.slot_bytes, slot.nbytes)
        outputs = self._views.get((method, n))
        if outputs is None:
            buffers = zip(self._outputs[method], spec.outputs, strict=True)
            outputs = self._views[method, n] = [buffer[: out.rows(n)] for buffer, out in buffers]
        self._plan.run_batch(self._pool, self._index[method], parts, inputs, outputs)
        return outputs

    def _lock(self, placement: Placement) -> None:
        placement.lock(self._weights.ctypes.data, self._weights.nbytes, "weights")
        for address, nbytes in self._plan.blocks:
            placement.lock(address, nbytes, "arena and scratch")
        for arrays in self._outputs.values():
            for array in arrays:
                placement.lock(array.ctypes.data, array.nbytes, "output buffers")

    def kernel_timer(self) -> KernelTimer:
        """Times of every call of the plan, by the processor's cycle counter where it has a steady one."""
        return _Timer(self._plan, self._index, self._code)

    def memory(self) -> dict[str, int]:
        outputs = sum(array.nbytes for arrays in self._outputs.values() for array in arrays)
        return {
            "weights": self._weights.nbytes,
            "arena": self._plan.arena_bytes,
            "scratch": self._plan.scratch_bytes,
            "outputs": outputs,
        }

    def close(self) -> None:
        self._plan.close()
        self._pool.close()
        self._views.clear()
        self._weights = np.empty(0, np.uint8)


Code = list[tuple[str, tuple[str, ...]]]
"""Each call of a method: its operation, and the names of the weights that it reads."""


def _code(plan: Any) -> dict[str, Code]:
    """The calls of a plan that `plan_words` has accepted, by method."""
    names = [tensor.get("name") for tensor in plan["tensors"]]
    return {
        method["name"]: [(call["op"], tuple(names[t] for t in call["t"] if names[t])) for call in method["code"]]
        for method in plan["methods"]
    }


class _Timer(KernelTimer):
    """The plan's own counters, added up."""

    def __init__(self, plan: Plan, index: dict[str, int], code: dict[str, Code]) -> None:
        self._plan, self._index, self._code = plan, index, code
        # Of undisturbed runs and of disturbed ones: runs and rows; ns, experts, keys and row_keys of each call.
        self._runs = {name: np.zeros((2, 2), np.int64) for name in index}
        self._sums = {name: np.zeros((2, 4, len(code[name]))) for name in index}

    def start(self) -> None:
        self._plan.profile(True)

    def stop(self, disturbed: bool) -> bool:
        for name, index in self._index.items():
            timed = self._plan.timed(index)
            self._runs[name][int(disturbed)] += (timed.runs, timed.rows)
            self._sums[name][int(disturbed)] += (timed.ns, timed.experts, timed.keys, timed.row_keys)
        self._plan.profile(False)
        return True

    def calls(self, disturbed: bool) -> list[KernelCall]:
        found = []
        for method in self._index:
            ns, experts, keys, row_keys = self._sums[method][: 1 + disturbed].sum(0)
            runs, rows = map(int, self._runs[method][: 1 + disturbed].sum(0))
            for k, (op, weights) in enumerate(self._code[method] if runs else ()):
                touched = Touched(int(experts[k]), int(keys[k]), int(row_keys[k]))
                name = weights[0] if weights else ""
                found.append(
                    KernelCall(method, k, op, name, runs, rows, float(ns[k]), touched, weights=weights)
                )
        return found


def open_backend(
    package: Package,
    target: str,
    threads: int,
    isa: str | None = None,
    placement: Placement | None = None,
    portable_bits: bool = False,
) -> CpuBackend:
    """The CPU engine of `package`. Raises PlanError, PackageError, TargetError, UsageError or CapacityError."""
    assert target == TARGET, target
    return CpuBackend(package, threads, isa, placement, portable_bits)
