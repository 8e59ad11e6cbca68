"""Runs a package's TensorRT engines over slots in device memory.

One session after the other: an engine's states are bindings, so a run is one session's. Every session gets the bits
that it would get alone, since no run ever holds rows of two.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmlc.errors import ContextFullError, InputError, KernelError, PackageError, UsageError
from tmlc.package.reader import Package
from tmlc.runtimes.core.backend import Backend, MethodSpec, check_inputs
from tmlc.runtimes.core.kernels import KernelTimer
from tmlc.runtimes.core.placement import Placement, refuse_cpu_options
from tmlc.runtimes.core.slots import Slot, SlotMemory
from tmlc.runtimes.tensorrt.device import Device, LoadedEngine, open_device
from tmlc.runtimes.tensorrt.kernel_cache import KernelFile
from tmlc.runtimes.tensorrt.kernel_times import TensorRTTimer
from tmlc.runtimes.tensorrt.plan import ALIGN, END, ROWS, Binding, MethodPlan, Plan, read_plan
from tmlc.runtimes.tensorrt.random import gumbel, normal
from tmlc.runtimes.tensorrt.slots import DeviceSlot, DeviceSlots

RTX = "tensorrt_rtx"  # the library that compiles kernels when its engines are loaded
NO_POSITION = 2**31 - 2  # positions are int32 in an engine
ONE_PART = "give each session one part, with all of its positions"
HOST = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "u8": np.uint8}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the bindings of a run with n positions lie: the same in the host's buffer and in the device's.

    Attributes:
        given, taken: what the host sends and gets, with offsets; noise comes last of what is sent.
        quiet, sent: bytes to send without the noise, and with it.
        end: bytes in all.
    """

    given: tuple[tuple[Binding, int], ...]
    taken: tuple[tuple[Binding, int], ...]
    quiet: int
    sent: int
    end: int


class _Method:
    """One method ready to run: its engine, and the layout of its bindings for each number of positions."""

    def __init__(self, plan: MethodPlan, engine: LoadedEngine) -> None:
        self.plan, self.engine = plan, engine
        self._layouts: dict[int, _Layout] = {}
        self.buffer_bytes = self.layout(plan.most).end
        self.device_bytes = self.buffer_bytes + _up(plan.rewritten[1])

    def layout(self, n: int) -> _Layout:
        if n not in self._layouts:
            at, quiet = 0, -1
            given: list[tuple[Binding, int]] = []
            taken: list[tuple[Binding, int]] = []
            sent = [b for b in self.plan.bindings if b.kind in ("input", "position")]
            for binding in (*sent, *(b for b in self.plan.bindings if b.kind == "noise")):
                if binding.kind == "noise" and quiet < 0:
                    quiet = at
                given.append((binding, at))
                at += _up(binding.nbytes(n))
            end = at
            for binding in self.plan.bindings:
                if binding.kind == "output":
                    taken.append((binding, at))
                    at += _up(binding.nbytes(n))
            quiet = end if quiet < 0 else quiet
            self._layouts[n] = _Layout(tuple(given), tuple(taken), quiet, end, at)
        return self._layouts[n]


class TensorRTBackend(Backend):
    """A package's engines on one GPU.

    Args:
        package: an open package with a TensorRT target.
        target: its name there ("tensorrt:sm89").
        device: the GPU; None opens that of this machine.
        kernel_cache: a folder in which kernels that are compiled while the package is loaded are kept for the next
            load; None keeps none.
    """

    unbatched = ""

    def __init__(
        self, package: Package, target: str, device: Device | None = None, kernel_cache: Path | None = None
    ) -> None:
        info = package.manifest.targets[target]
        states = {state.name: state for state in package.manifest.states}
        plan = read_plan(package.json(info.plan), states)
        self.target, self.threads, self.cores = target, 1, None
        self.slot_bytes = plan.slot_bytes
        self.methods: dict[str, MethodSpec] = {name: method.spec for name, method in plan.methods.items()}
        self._offsets = tuple(sorted({m.position for m in plan.methods.values() if m.position >= 0}))
        self._lock = threading.RLock()
        self._slots: DeviceSlots | None = None
        self._held: list[int] = []
        self._known: bytes | None = None
        self._loaded: dict[str, _Method] = {}
        if kernel_cache is not None and plan.library != RTX:
            what = f"engines of {plan.library} hold their kernels, and none are compiled when they are loaded"
            raise UsageError(what, where="kernel_cache", fix="load without kernel_cache")
        self._kernels: KernelFile | None = None
        self._device = device if device is not None else open_device(plan)
        try:
            if kernel_cache is not None:
                gpu = (self._device.name, self._device.architecture)
                self._kernels = KernelFile(kernel_cache, package.digest, *gpu, plan.library, plan.version)
            self._load(package, plan)
        except BaseException:
            self.close()
            raise
        self.isa = self._device.architecture

    def _load(self, package: Package, plan: Plan) -> None:
        for name, method in plan.methods.items():
            engine = self._device.load(package.read(method.engine), name)
            self._loaded[name] = _Method(method, engine)
            check_engine(method, engine)
        ready = self._loaded.values()
        self._scratch_bytes = max((m.engine.scratch_bytes for m in ready), default=0)
        scratch = self._allocate(self._scratch_bytes)
        self._buffer = self._allocate(max((m.device_bytes for m in ready), default=0))
        self._host = self._device.host_buffer(max((m.buffer_bytes for m in ready), default=0))
        self._outputs = {m.plan.spec.name: [o.allocate(m.plan.spec.max_n) for o in m.plan.spec.outputs] for m in ready}
        if self._kernels is not None:
            self._known = self._kernels.read()
            self._device.keep_kernels(self._known)
        for entry in ready:
            entry.engine.prepare(scratch)

    def _allocate(self, nbytes: int) -> int:
        address = self._device.allocate(max(nbytes, ALIGN))
        self._held.append(address)
        return address

    def slots(self, count: int) -> SlotMemory:
        self._slots = DeviceSlots(self._device, count, self.slot_bytes, self._offsets, self._lock)
        self._warm(self._slots)
        if self._kernels is not None:
            kept = self._device.kernels()
            if kept != self._known:
                self._kernels.write(kept)
            self._known = None
        return self._slots

    def _warm(self, slots: DeviceSlots) -> None:
        """Runs every profile of every engine once, on a slot that nobody has yet: what TensorRT compiles or captures
        when it first runs, it does now and not in a tick."""
        for entry in self._loaded.values():
            spec = entry.plan.spec
            for _, _, most in entry.plan.profiles:
                n = entry.plan.pieces(0, most)[0]
                inputs = [argument.allocate(n) for argument in spec.inputs]
                self._run(entry, slots.handle(0), 0, 0, n, inputs, self._outputs[spec.name])
        slots.zero(0)

    def call(
        self, method: str, parts: Sequence[tuple[int, Slot]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        entry = self._loaded[method]
        total = sum(n for n, _ in parts)
        check_inputs(entry.plan.spec, total, inputs)
        self._check(entry.plan, parts, inputs)
        outputs = [o[: s.rows(total)] for o, s in zip(self._outputs[method], entry.plan.spec.outputs, strict=True)]
        at = 0
        with self._lock:
            for n, slot in parts:
                position = slot.counts[entry.plan.position] if entry.plan.position >= 0 else 0
                for size in entry.plan.pieces(position, n):
                    self._run(entry, slot, position, at, size, inputs, outputs)
                    position, at = position + size, at + size
                if entry.plan.position >= 0:
                    slot.counts[entry.plan.position] = position
        return outputs

    def _check(self, plan: MethodPlan, parts: Sequence[tuple[int, DeviceSlot]], inputs: Sequence[np.ndarray]) -> None:
        """Refuses what a run would not survive, before anything is changed."""
        if len({id(slot) for _, slot in parts}) != len(parts):
            raise InputError("a slot is given twice", fix=ONE_PART)
        starts = np.cumsum([0, *(n for n, _ in parts)])
        for index, (n, slot) in enumerate(parts):
            if n < 1:
                raise InputError("a part has no positions", fix=ONE_PART)
            if plan.position >= 0:
                position = slot.counts[plan.position]
                if not 0 <= position <= NO_POSITION - n:
                    what = f"the slot holds position {position}, which none can have"
                    raise _of_part(KernelError(what, fix="restore the session from a sound snapshot"), index)
                if plan.context and position + n > plan.context:
                    what = f"{n} new positions after {position} pass the context of {plan.context}"
                    fix = "close the session, or compile with a larger context or the policy ring_with_sinks"
                    raise _of_part(ContextFullError(what, fix=fix), index)
            for array, spec, limit in zip(inputs, plan.spec.inputs, plan.limits, strict=True):
                rows = array[spec.rows(int(starts[index])) if spec.a else 0 : spec.rows(int(starts[index + 1]))]
                if limit and rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < limit:
                    what = f"{plan.spec.name} got an index outside 0..{limit - 1}"
                    raise _of_part(KernelError(what, fix="give ids of the vocabulary"), index)

    def _run(
        self, entry: _Method, slot: DeviceSlot, position: int, at: int, n: int,
        inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray],
    ) -> None:  # fmt: skip
        """One run of n positions: rows `at` to `at + n` of the call."""
        plan, device, base, layout = entry.plan, self._device, self._buffer, entry.layout(n)
        silent = True
        for binding, offset in layout.given:
            array = _host_array(plan, binding, position, at, n, inputs)
            if array is not None:
                silent = silent and binding.kind != "noise"
                self._host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        if sent := layout.quiet if silent else layout.sent:
            device.upload(base, self._host[:sent])
        addresses = {b.name: base + offset for b, offset in (*layout.given, *layout.taken)}
        begin, size = plan.rewritten
        fresh = base + entry.buffer_bytes
        for b in plan.bindings:
            if b.kind == "state" or (b.kind == "next" and b.cache):
                addresses[b.name] = slot.address + b.offset
            elif b.kind == "next":
                addresses[b.name] = fresh + b.offset - begin
        shapes = {b.name: b.at(n) for b in plan.bindings if b.kind not in ("output", "next")}
        entry.engine.run(plan.profile(n), addresses, shapes)
        if size:
            device.copy(slot.address + begin, fresh, size)
        if layout.taken:
            device.download(self._host[layout.sent : layout.end], base + layout.sent)
        device.wait()
        for binding, offset in layout.taken:
            spec = plan.spec.outputs[binding.index]
            first = spec.a * at
            rows = self._host[offset : offset + binding.nbytes(n)].view(HOST[spec.dtype])
            outputs[binding.index][first : first + spec.rows(n)] = rows.reshape(-1, spec.cols)

    def kernel_timer(self) -> KernelTimer:
        """Times of every layer, as TensorRT reports them."""
        return TensorRTTimer({name: entry.engine for name, entry in self._loaded.items()})

    def memory(self) -> dict[str, int]:
        return {
            "weights": sum(m.engine.code_bytes for m in self._loaded.values()),
            "arena": sum(m.device_bytes for m in self._loaded.values()),
            "scratch": self._scratch_bytes,
            "outputs": sum(array.nbytes for arrays in self._outputs.values() for array in arrays),
        }

    def close(self) -> None:
        for entry in self._loaded.values():
            entry.engine.close()
        self._loaded.clear()
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        for address in self._held:
            self._device.free(address)
        self._held.clear()
        self._device.close()


def _up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _of_part(error: KernelError | ContextFullError, part: int) -> KernelError | ContextFullError:
    error.part = part
    return error


def _host_array(
    plan: MethodPlan, binding: Binding, position: int, at: int, n: int, inputs: Sequence[np.ndarray]
) -> np.ndarray | None:
    """What the host sends for one binding of a run; None where nothing reads it."""
    if binding.name == ROWS:
        return np.arange(position, position + n, dtype=np.int32)
    if binding.name == END:
        return np.array([position + n - 1], np.int32)
    if binding.kind == "noise":
        cols = binding.shape[1][1]
        if binding.temperature >= 0 and not inputs[binding.temperature][at : at + n].any():
            return None  # no row uses them
        make = normal if binding.op == "normal" else gumbel
        return make(inputs[binding.key][at : at + n], cols)
    spec = plan.spec.inputs[binding.index]
    if not spec.a:
        return inputs[binding.index]
    return np.ascontiguousarray(inputs[binding.index][spec.a * at : spec.a * (at + n) + spec.b])


def check_engine(plan: MethodPlan, engine: LoadedEngine) -> None:
    """Raises PackageError unless the engine's own bindings are the plan's, and its profiles take what the plan says."""
    where = f"engine of {plan.spec.name}"
    fix = "Compile the checkpoint again with this version of tmlc."
    if set(engine.bindings) != {b.name for b in plan.bindings}:
        odd = min(set(engine.bindings) ^ {b.name for b in plan.bindings})
        raise PackageError(f"binding {odd[:80]} is in the engine or in the plan, not in both", where=where, fix=fix)
    caches = {b.offset: b.name for b in plan.bindings if b.kind == "state" and b.cache}
    for b in plan.bindings:
        own = engine.bindings[b.name]
        shape = tuple(-1 if a else c for a, c in b.shape)
        if (own.dtype, own.shape, own.output) != (b.dtype, shape, b.kind in ("output", "next")):
            what = f"binding {b.name} is {own.dtype}{list(own.shape)} in the engine, {b.dtype}{list(shape)} in the plan"
            raise PackageError(what, where=where, fix=fix)
        if b.kind == "next" and b.cache and own.aliases != caches.get(b.offset):
            raise PackageError(f"binding {b.name} is not written where it is read", where=where, fix=fix)
    if engine.profiles != len(plan.profiles):
        what = f"the engine has {engine.profiles} profiles, the plan {len(plan.profiles)}"
        raise PackageError(what, where=where, fix=fix)
    for number, (least, _, most) in enumerate(plan.profiles):
        for b in plan.bindings:
            if b.kind in ("output", "next") or not any(a for a, _ in b.shape):
                continue
            low, high = engine.bounds(b.name, number)
            if any(v > w for v, w in zip(low, b.at(least), strict=True)) or any(
                v < w for v, w in zip(high, b.at(most), strict=True)
            ):
                what = f"profile {number} takes {b.name} from {list(low)} to {list(high)}"
                raise PackageError(f"{what}, too little for {least} to {most} positions", where=where, fix=fix)


def open_backend(
    package: Package,
    target: str,
    threads: int,
    isa: str | None = None,
    placement: Placement | None = None,
    portable_bits: bool = False,
    kernel_cache: Path | None = None,
) -> TensorRTBackend:
    """The TensorRT engines of `package` on this machine's GPU. There are no threads to count.

    Raises:
        UsageError: `isa`, `portable_bits` or a placement is asked for, which are the CPU's affair; or the folder of
            `kernel_cache` cannot be used.
        TargetError: the library, the driver or the GPU is missing or another one.
        PackageError: the plan or an engine is refused.
        CapacityError: too little device memory.
    """
    refuse_cpu_options(target, isa, portable_bits, placement)
    return TensorRTBackend(package, target, kernel_cache=kernel_cache)
