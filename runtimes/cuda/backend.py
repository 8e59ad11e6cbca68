"""Runs a package's Triton engine: weights, arena and slots in device memory, a CUDA graph for each bucket.

A call packs its inputs into one page-locked buffer, replays the graph of its bucket (one copy in, the kernels, one copy
out) and unpacks. All memory is reserved, all machine code loaded and all graphs captured before the first call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tmlc.errors import (
    CapacityError,
    ContextFullError,
    DeviceError,
    InputError,
    KernelError,
    PackageError,
    TargetError,
)
from tmlc.kernels.triton.architectures import ARCHITECTURES, compile_for, running
from tmlc.package.reader import Package
from tmlc.runtimes.core.backend import DTYPES, Backend, MethodSpec, TensorSpec, check_inputs
from tmlc.runtimes.core.kernels import KernelTimer
from tmlc.runtimes.core.placement import Placement, refuse_cpu_options
from tmlc.runtimes.core.slots import Slot, SlotMemory
from tmlc.runtimes.cuda.chains import Chain, Link
from tmlc.runtimes.cuda.driver import RESTART, Address, Driver, KernelLaunch
from tmlc.runtimes.cuda.kernel_times import CudaTimer, Key
from tmlc.runtimes.cuda.plan import (
    FIX,
    BucketInfo,
    LaunchInfo,
    MethodPlan,
    Plan,
    PointerArg,
    architectures,
    code_name,
    read_plan,
    up,
)
from tmlc.runtimes.cuda.schedule import Piece, schedule
from tmlc.runtimes.cuda.slots import DeviceSlots
from tmlc.runtimes.cuda.ticks import FEATURE, CudaChains, read_chains

OVERLAP = "triton.overlap.v1"  # kernels wait for each other by themselves, from sm90 on
_OLDER = "compile with an assembler of its CUDA: docs/triton.md, “Versions of Triton”"
UPLOAD = 64 << 20  # bytes of weights that one copy carries


def choose_architecture(held: Sequence[int], device: int, name: str) -> int:
    """Which of a package's architectures a device runs.

    Raises TargetError, with what the package has and what to compile for, when there is none.
    """
    fits = running(device, held)
    if not fits:
        there = ", ".join(f"sm{sm}" for sm in held) or "nothing"
        raise TargetError(
            f"the package has machine code for {there}; {name} is sm{device}",
            where="target triton",
            fix=compile_for(device),
        )
    return fits[-1]


class CudaBackend(Backend):
    """A Triton engine on one device.

    Args:
        package: an open package; it may be closed once the backend is made.
        target: the engine's name in the package.
        driver: the device; closed with the backend, and when making it fails.

    Attributes:
        plan, driver: the checked plan, and the device.

    Raises (when made):
        PlanError, PackageError: the plan is malformed, names a weight or machine code that is not there.
        TargetError: no machine code for this device, or its driver is too old for it.
        CapacityError: the device has not the memory; says how much was asked for and is free.
    """

    def __init__(self, package: Package, target: str, driver: Driver) -> None:
        self.driver, self._lost = driver, ""
        self._memory: DeviceSlots | None = None
        self.chains: CudaChains | None = None
        try:
            self._open(package, target)
        except BaseException:
            driver.close()
            raise

    def _open(self, package: Package, target: str) -> None:
        driver, info = self.driver, self.driver.info
        driver.activate()
        plan_file = package.json(package.manifest.targets[target].plan)
        sm = choose_architecture(architectures(plan_file), info.architecture, info.name)
        code_file = package.json(code_name(sm))
        self.plan: Plan = read_plan(plan_file, code_file, sm, package.tensors)
        if info.driver < self.plan.driver:
            there, needed = _version(info.driver), _version(self.plan.driver)
            raise TargetError(
                f"the NVIDIA driver supports CUDA {there}, the engine needs {needed}",
                where=info.name,
                fix="update the driver" + (f", or {_OLDER}" if ARCHITECTURES[sm].driver <= info.driver else ""),
            )
        self.target, self.isa, self.threads = target, f"sm{sm}", 1
        self._overlap = OVERLAP in package.manifest.required_features and sm >= 90
        self.slot_bytes = self.plan.slot_bytes
        self.methods: dict[str, MethodSpec] = {name: m.spec for name, m in self.plan.methods.items()}
        if FEATURE in package.manifest.required_features:
            layout = package.manifest.tick
            self.chains = CudaChains(self, read_chains(self.plan, code_file, layout), layout)
        self._functions = [self._load(package, variant) for variant in self.plan.variants]
        self._reserve(package)

    def _load(self, package: Package, variant: Any) -> Any:
        if variant.file not in package.names():
            raise PackageError(
                f"the engine's kernel {variant.name} is missing",
                where=variant.file,
                fix="compile the checkpoint again; kernels are never compiled while serving",
            )
        cubin = package.read(variant.file)
        if hashlib.sha256(cubin).hexdigest() != variant.sha256:
            raise PackageError("the machine code is not what the plan lists", where=variant.file, fix=FIX)
        return self.driver.load(cubin, variant.entry, variant.shared)

    def _reserve(self, package: Package) -> None:
        """Device memory for everything but the slots, the weights in it, and the buffers on the host."""
        plan, driver = self.plan, self.driver
        sizes = {
            "weight": package.weights.nbytes, "arena": plan.arena_bytes, "scratch": plan.scratch_bytes,
            "in": max(plan.in_bytes, self._widest("input")), "out": max(plan.out_bytes, self._widest("output")),
            "between": self._widest("between"),
        }  # fmt: skip
        needed, (free, total) = sum(up(size) for size in sizes.values()), driver.memory()
        if needed > free:
            raise CapacityError(
                f"the engine needs {needed} bytes of device memory, {free} of {total} are free",
                where=driver.info.name,
                fix="free the device, or compile with lower precision or smaller buckets",
            )
        self._base = {name: driver.allocate(max(size, 1)) for name, size in sizes.items()}
        self._sizes = sizes
        self._tensors = [package.tensors[name].offset for name in plan.weights]
        for at in range(0, package.weights.nbytes, UPLOAD):
            driver.to_device(self._base["weight"] + at, package.weights[at : at + UPLOAD])
        driver.synchronize()
        self._in, self._out = (driver.host_buffer(max(sizes[name], 1)) for name in ("in", "out"))
        self._results = {
            name: [out.allocate(method.spec.max_n) for out in method.spec.outputs]
            for name, method in plan.methods.items()
        }
        self._graphs: dict[Key, Any] = {}
        self._ticks: dict[str, Any] = {}
        self._marked: dict[Key, Any] = {}  # in their place while kernels are timed
        self._note: Callable[[Key, int], None] | None = None

    def _widest(self, space: str) -> int:
        """Bytes of a space of the chains."""
        return max((chain.nbytes[space] for chain in self.chains.glue), default=0) if self.chains else 0

    def slots(self, count: int) -> SlotMemory:
        """Reserves the states in device memory, and captures the graphs of every bucket and chain (they hold its
        address)."""
        counters = [p.offset for method in self.plan.methods.values() for p in method.positions]
        self._memory = DeviceSlots(self.driver, count, self.slot_bytes, counters)
        for name, method in self.plan.methods.items():
            for bucket in method.buckets:
                work = self.work(bucket)
                self._graphs[name, bucket.batch, bucket.n] = self.driver.capture(work)
        for chain in self.chains.glue if self.chains is not None else ():
            self._ticks[chain.key] = self.driver.capture(self.chain_work(chain))
        return self._memory

    def rehearse(self, method: str, bucket: BucketInfo, seed: int = 0) -> None:
        """Puts a full call of random rows in place, the same for a seed, of the first slots (one again and again where
        there are fewer than the bucket takes), so that kernels and graphs can be run for measuring. Rows that are the
        same would choose the same experts. What the slots hold is lost."""
        memory, plan, draw = self._memory, self.plan.methods[method], np.random.default_rng(seed)
        assert memory is not None
        self.driver.synchronize()  # a graph that is under way copies from the buffer
        self._in[: bucket.in_bytes] = 0
        self._in[: 8 * bucket.batch].view(np.int64)[:] = [memory.offset(k % memory.count) for k in range(bucket.batch)]
        self._in[bucket.counts : bucket.counts + 4 * bucket.batch].view(np.int32)[:] = bucket.n
        for spec, at, below in zip(plan.spec.inputs, bucket.inputs, plan.id_limits, strict=True):
            rows = self._argument(self._in, at, bucket, spec)
            rows[:] = _made_up(spec, below, rows.shape, draw)
        self.driver.to_device(self._base["in"], self._in[: bucket.in_bytes])
        self.driver.synchronize()

    def replay(self, method: str, bucket: BucketInfo) -> None:
        """Starts a bucket's graph on what its buffers hold, as `call` does; for measuring."""
        self.driver.replay(self._graphs[method, bucket.batch, bucket.n])

    def replay_chain(self, chain: Chain) -> None:
        """The same of a chain's graph."""
        self.driver.replay(self._ticks[chain.key])

    def work(self, bucket: BucketInfo, mark: Callable[[], None] | None = None) -> Callable[[], None]:
        """What one call of a bucket asks of the driver: a copy in, the kernels, a copy out. `mark` is called before the
        first kernel and behind each."""
        return self._work(self.launches(bucket), bucket.in_bytes, bucket.out_bytes, mark)

    def chain_work(self, chain: Chain) -> Callable[[], None]:
        """The same of a chain."""
        return self._work(self.chain_launches(chain), chain.nbytes["input"], chain.nbytes["output"])

    def _work(
        self,
        launches: Sequence[KernelLaunch],
        in_bytes: int,
        out_bytes: int,
        mark: Callable[[], None] | None = None,
    ) -> Callable[[], None]:
        arriving, leaving = self._in[:in_bytes], self._out[:out_bytes]

        def run() -> None:
            self.driver.to_device(self._base["in"], arriving)
            if mark is not None:
                mark()
            for launch in launches:
                self.driver.launch(launch)
                if mark is not None:
                    mark()
            if leaving.size:
                self.driver.to_host(leaving, self._base["out"])

        return run

    def kernel_timer(self) -> KernelTimer:
        """Times of every launch, by events in the graphs of methods: ticks run method by method meanwhile. All slots
        must be reserved."""

        def use(graphs: dict[Key, Any] | None, note: Callable[[Key, int], None] | None) -> None:
            self._marked, self._note = graphs or {}, note
            if self.chains is not None:
                self.chains.ready = note is None

        return CudaTimer(self, use)

    def launches(self, bucket: BucketInfo) -> list[KernelLaunch]:
        """The bucket's launches, bound to this device's addresses."""
        inputs = [self._base["in"] + at for at in bucket.inputs]
        outputs = [self._base["out"] + at for at in bucket.outputs]
        return self._bound(bucket.launches, inputs, outputs, self._base["in"] + bucket.counts)

    def chain_launches(self, chain: Chain) -> list[KernelLaunch]:
        """The launches of a chain: its methods over the places where they meet, and what moves rows between them."""
        assert self.chains is not None
        base = {"input": self._base["in"], "between": self._base["between"], "output": self._base["out"]}
        bound, glue = [], iter(self.chains.glue[chain])
        for link in chain.links:
            if isinstance(link, Link):
                found = self.plan.methods[link.method].buckets
                bucket = next(b for b in found if (b.batch, b.n) == (chain.batch, link.n))
                inputs = [base[space] + at for space, at in link.inputs]
                out = base[link.output[0]] + link.output[1]
                bound += self._bound(bucket.launches, inputs, [out], base["input"] + link.counts)
            else:
                bound += self._bound([next(glue)], [base["input"]], [base["output"]], base["input"])
        return bound

    def _bound(
        self, launches: Sequence[LaunchInfo], inputs: Sequence[int], outputs: Sequence[int], counts: int
    ) -> list[KernelLaunch]:
        """Launches with the addresses of a call's inputs, outputs and counts; slots begin every upload."""
        assert self._memory is not None
        pool = self._memory.address
        base = {
            "arena": lambda which: self._base["arena"],
            "scratch": lambda which: self._base["scratch"],
            "between": lambda which: self._base["between"],
            "state": lambda which: pool,
            "weight": lambda which: self._base["weight"] + self._tensors[which],
            "input": lambda which: inputs[which],
            "output": lambda which: outputs[which],
            "slots": lambda which: self._base["in"],
            "counts": lambda which: counts,
        }
        bound = []
        for launch in launches:
            variant = self.plan.variants[launch.variant]
            args = tuple(
                Address(base[arg.space](arg.which) + arg.offset, arg.space, arg.nbytes)
                if isinstance(arg, PointerArg)
                else arg
                for arg in launch.args
            )
            bound.append(KernelLaunch(
                self._functions[launch.variant], variant.name, launch.grid, 32 * variant.num_warps, variant.shared,
                variant.signature, args, variant.hidden_params, self._overlap,
            ))  # fmt: skip
        return bound

    # Chains: what `CudaChains` asks.

    @property
    def staging(self) -> tuple[np.ndarray, np.ndarray]:
        """The page-locked buffers that graphs copy from and to."""
        return self._in, self._out

    def offset(self, slot: Slot) -> int:
        """Where a slot begins in the pool."""
        assert self._memory is not None
        return self._memory.offset(slot)

    def run_chain(self, key: str, slots: Sequence[Slot], needs: Sequence[Mapping[str, int]]) -> None:
        """Replays a chain's graph over what is staged, waits for it, and moves the counters of its sessions.

        Raises DeviceError, KernelError as `call` does.
        """
        assert self._memory is not None
        self._replay(self._ticks[key])
        for slot, need in zip(slots, needs, strict=True):
            for method, n in need.items():
                self._memory.advance(slot, self.plan.methods[method].positions, n)

    def _replay(self, graph: Any) -> None:
        try:
            self.driver.activate()
            self.driver.replay(graph)
            self.driver.synchronize()
        except DeviceError as error:
            self._lost = error.what
            raise

    def call(
        self, method: str, parts: Sequence[tuple[int, Slot]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        plan, memory = self.plan.methods[method], self._memory
        total = sum(n for n, _ in parts)
        check_inputs(plan.spec, total, inputs)
        self._check(plan, parts, inputs)
        assert memory is not None
        starts = np.cumsum([0, *(n for n, _ in parts)])
        results = self._results[method]
        for bucket, pieces in schedule([n for n, _ in parts], plan.buckets):
            self._pack(plan, bucket, pieces, parts, starts, inputs)
            key = method, bucket.batch, bucket.n
            self._replay(self._marked.get(key) or self._graphs[key])
            if self._note is not None:
                self._note(key, sum(piece[2] for piece in pieces))
            self._unpack(plan, bucket, pieces, starts, results)
        for n, slot in parts:
            memory.advance(slot, plan.positions, n)
        return [array[: spec.rows(total)] for array, spec in zip(results, plan.spec.outputs, strict=True)]

    def _check(self, plan: MethodPlan, parts: Sequence[tuple[int, Slot]], inputs: Sequence[np.ndarray]) -> None:
        """Refuses a call before anything runs."""
        self.admit([slot for _, slot in parts], [{plan.spec.name: n} for n, _ in parts])
        for number, array in enumerate(inputs):
            self.check_ids(plan.spec.name, number, array)

    def admit(self, slots: Sequence[Slot], needs: Sequence[Mapping[str, int]]) -> None:
        """Refuses sessions, each with its new positions of some methods, before anything runs.

        Raises DeviceError when the device is lost, InputError for a session that comes twice or brings nothing,
        ContextFullError and KernelError with `part` for one that has no room or is damaged.
        """
        if self._lost:
            raise DeviceError(f"the device is lost: {self._lost}", fix=RESTART)
        memory = self._memory
        assert memory is not None
        if len(set(slots)) != len(slots) or any(n < 1 for need in needs for n in need.values()):
            raise InputError(
                "a call takes each session once, with at least one position",
                fix="give each session one part, with all of its positions",
            )
        for number, (slot, need) in enumerate(zip(slots, needs, strict=True)):
            try:
                for method, n in need.items():
                    memory.check(slot, self.plan.methods[method].positions, n)
            except (ContextFullError, KernelError) as error:
                error.part = number
                raise

    def check_ids(self, method: str, number: int, ids: np.ndarray) -> None:
        """Raises KernelError where an argument of a method holds an id that its table does not have."""
        below = self.plan.methods[method].id_limits[number]
        if below and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < below:
            raise KernelError(f"{method}: an id is outside 0..{below - 1}", fix="give ids of the vocabulary")

    def _pack(
        self,
        plan: MethodPlan,
        bucket: BucketInfo,
        pieces: Sequence[Piece],
        parts: Sequence[tuple[int, Slot]],
        starts: np.ndarray,
        inputs: Sequence[np.ndarray],
    ) -> None:
        """Slots, counts and inputs of one run, where the graph's copy reads them."""
        assert self._memory is not None
        slots = self._in[: 8 * bucket.batch].view(np.int64)
        counts = self._in[bucket.counts : bucket.counts + 4 * bucket.batch].view(np.int32)
        slots[len(pieces) :], counts[len(pieces) :] = 0, 0
        for row, (part, _, n) in enumerate(pieces):
            slots[row], counts[row] = self._memory.offset(parts[part][1]), n
        for array, spec, at in zip(inputs, plan.spec.inputs, bucket.inputs, strict=True):
            padded = self._argument(self._in, at, bucket, spec)
            for row, (part, first, n) in enumerate(pieces):
                begin = (starts[part] + first) * spec.a
                padded[row, : n * spec.a] = array[begin : begin + n * spec.a]

    def _unpack(
        self,
        plan: MethodPlan,
        bucket: BucketInfo,
        pieces: Sequence[Piece],
        starts: np.ndarray,
        results: Sequence[np.ndarray],
    ) -> None:
        for array, spec, at in zip(results, plan.spec.outputs, bucket.outputs, strict=True):
            padded = self._argument(self._out, at, bucket, spec)
            for row, (part, first, n) in enumerate(pieces):
                begin = (starts[part] + first) * spec.a
                array[begin : begin + n * spec.a] = padded[row, : n * spec.a]

    @staticmethod
    def _argument(buffer: np.ndarray, at: int, bucket: BucketInfo, spec: Any) -> np.ndarray:
        """An argument in a staging buffer: [batch, rows of a session, cols]."""
        kind, rows = DTYPES[spec.dtype], spec.rows(bucket.n)
        nbytes = bucket.batch * rows * spec.cols * kind.itemsize
        return buffer[at : at + nbytes].view(kind).reshape(bucket.batch, rows, spec.cols)

    def memory(self) -> dict[str, int]:
        staging = self._sizes["in"] + self._sizes["out"] + self._sizes["between"]
        return {
            "weights": self._sizes["weight"], "arena": self._sizes["arena"], "scratch": self._sizes["scratch"],
            "outputs": staging + sum(array.nbytes for arrays in self._results.values() for array in arrays),
        }  # fmt: skip

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._graphs.clear()
        self._ticks.clear()
        self._marked.clear()
        self.driver.close()


def _made_up(spec: TensorSpec, below: int, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Random values of an input: ids `below` a limit, keys of random numbers, rows that are normally distributed; a
    float by itself is a temperature."""
    kind = DTYPES[spec.dtype]
    if spec.dtype == "f32":
        return np.full(shape, 0.8, kind) if spec.cols == 1 else draw.standard_normal(shape, np.float32)
    if spec.dtype == "bf16":  # as its bits
        return (draw.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(kind)
    return draw.integers(0, below or np.iinfo(kind).max, shape, kind, endpoint=not below)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def open_backend(
    package: Package,
    target: str,
    threads: int,
    isa: str | None = None,
    placement: Placement | None = None,
    portable_bits: bool = False,
) -> CudaBackend:
    """The Triton engine of `package` on the first device that the driver shows (CUDA_VISIBLE_DEVICES chooses).
    `threads` counts nothing: one thread, the caller's, drives the device.

    Raises TargetError where `cuda-bindings`, the driver or a fitting device is missing, UsageError for `isa`,
    `portable_bits` or a placement, which are the CPU's affair, and what `CudaBackend` raises.
    """
    refuse_cpu_options(target, isa, portable_bits, placement)
    from tmlc.runtimes.cuda.nvidia import NvidiaDriver

    return CudaBackend(package, target, NvidiaDriver())
