"""Times single launches on a device through the runtime's driver layer, by the device's own clock.

A launch runs many times over in one CUDA graph, behind a replay of the same that keeps the device busy while the host
asks for it, so that the host is not what is measured; each time on another copy of its weights, so that they come from
memory as they do in a tick and not from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tmlc.errors import CapacityError
from tmlc.kernels.triton.launch import ITEM_BYTES, Argument, Launch, Pointer, Variant
from tmlc.kernels.triton.mode import PARAMETERS
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.runtimes.cuda.driver import Address, Driver, KernelLaunch

ROTATED = 256 << 20  # bytes of weights that are read before one is read again: more than any device caches
LAUNCHES = 64  # of a graph
REPEATS = 5  # replays; the fastest counts
ALIGN = 256


@dataclass(frozen=True)
class Sample:
    """A launch of an engine that stands for all with its shape: of which method and bucket (sessions, positions), and
    the launch that sorts its pairs, where it needs one."""

    method: str
    bucket: tuple[int, int]
    launch: Launch
    before: Launch | None = None

    @property
    def name(self) -> str:
        return f"{self.method} b{self.bucket[0]}n{self.bucket[1]} {self.launch.kernel}"

    def launches(self) -> list[Launch]:
        return [*([] if self.before is None else [self.before]), self.launch]

    def values(self) -> dict[str, Argument]:
        """The launch's arguments by name."""
        return named(self.launch)


def named(launch: Launch) -> dict[str, Argument]:
    """Arguments by the names of the kernel's parameters."""
    fixed = {name for name, _ in launch.constexprs}
    return dict(zip((n for n in PARAMETERS[launch.kernel] if n not in fixed), launch.args, strict=True))


class _Places:
    """Where a sample's operands lie in the timer's memory: every space or tensor once, the weights `copies` times."""

    def __init__(self, sample: Sample) -> None:
        sizes: dict[tuple[str, str], int] = {}
        for launch in sample.launches():
            for arg in launch.args:
                if isinstance(arg, Pointer):
                    key = (arg.space, arg.name)
                    sizes[key] = max(sizes.get(key, 0), arg.offset + arg.nbytes)
        self.weights = sum(_up(size) for key, size in sizes.items() if key[0] == "weight")
        read = int(self.weights * touched(sample.launch))
        self.copies = max(1, min(LAUNCHES, -(-ROTATED // read))) if read else 1
        self.nbytes = 0
        self.offsets: dict[tuple[str, str], int] = {}
        for key in sorted(sizes, key=lambda key: (key[0] == "weight", key)):  # weights last, their copies behind
            self.offsets[key] = self.nbytes
            self.nbytes += _up(sizes[key])
        self.nbytes += (self.copies - 1) * self.weights

    def at(self, pointer: Pointer, copy: int) -> int:
        moved = copy * self.weights if pointer.space == "weight" else 0
        return self.offsets[pointer.space, pointer.name] + moved + pointer.offset


def touched(launch: Launch) -> float:
    """The part of a launch's weights that it reads at most: of stacked experts those that its pairs can name."""
    values = named(launch)
    pairs, order, tiles = (values.get(name) for name in ("experts", "order", "tile_count"))
    if isinstance(pairs, Pointer) and "count_e" in values:
        return min(1.0, pairs.nbytes // ITEM_BYTES[pairs.dtype] / _integer(values, "count_e"))
    if not isinstance(order, Pointer) or not isinstance(tiles, Pointer):
        return 1.0
    count = order.nbytes // ITEM_BYTES[order.dtype]  # pairs sorted by expert, in count // 16 tiles and one an expert
    return min(1.0, count / (tiles.nbytes // ITEM_BYTES[tiles.dtype] - count // 16))


def _up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


class Timer:
    """Memory on a device for the samples, and times on it.

    Raises (when made):
        CapacityError: the device has not the memory; says how much was asked for and is free.
    """

    def __init__(self, driver: Driver, samples: Sequence[Sample]) -> None:
        self.driver = driver
        driver.activate()
        self._places = {id(sample): _Places(sample) for sample in samples}
        needed, (free, _) = max((p.nbytes for p in self._places.values()), default=0), driver.memory()
        if needed > free:
            raise CapacityError(
                f"timing needs {needed} bytes of device memory, {free} are free",
                where=driver.info.name, fix="free the device, or tune fewer ops with --op",
            )  # fmt: skip
        self._base, self._size = driver.allocate(max(needed, 1)), needed
        self._filled: Sample | None = None

    def seconds(self, sample: Sample, launch: Launch, compiled: Mapping[Variant, Compiled], sm: int) -> float:
        """Seconds of one run of `launch`, which stands for the sample's own.

        Raises:
            KernelError: the device refuses the launch.
            DeviceError: the device is lost.
        """
        driver, places = self.driver, self._places[id(sample)]
        driver.activate()
        if self._filled is not sample:
            self._fill(sample, compiled, sm)
            self._filled = sample
        figures = compiled[launch.variant(sm)]
        function = driver.load(figures.cubin, figures.entry, figures.shared)
        bound = [self._bound(launch, figures, function, places, copy, sm) for copy in range(places.copies)]

        def work() -> None:
            for number in range(LAUNCHES):
                driver.launch(bound[number % len(bound)])

        graph = driver.capture(work)

        def replay() -> None:
            driver.replay(graph)

        try:
            replay()
            driver.synchronize()
            return min(driver.timed(replay, ahead=replay) for _ in range(REPEATS)) / LAUNCHES
        finally:
            driver.forget(graph)

    def _fill(self, sample: Sample, compiled: Mapping[Variant, Compiled], sm: int) -> None:
        """Operands as in a call: zeros, but for what decides how much a kernel does (positions, counts, experts)."""
        driver, places = self.driver, self._places[id(sample)]
        driver.zero(self._base, self._size)
        kept = []  # until they are copied
        for launch in sample.launches():
            values = named(launch)
            for name, arg in values.items():
                if not isinstance(arg, Pointer):
                    continue
                host: np.ndarray | None = None
                if arg.space == "counts":
                    host = np.full(arg.nbytes // 4, sample.bucket[1], np.int32)
                elif name == "experts" and "count_e" in values:
                    kind = np.int32 if arg.dtype == "i32" else np.int64
                    host = (np.arange(arg.nbytes // np.dtype(kind).itemsize) % _integer(values, "count_e")).astype(kind)
                elif name == "position" and "k_cache" in values:  # a full cache
                    host = np.array([max(0, _cache_rows(values) - sample.bucket[1])], np.int64)
                if host is not None:
                    kept.append(host)
                    driver.to_device(self._base + places.at(arg, 0), host)
        if sample.before is not None:
            figures = compiled[sample.before.variant(sm)]
            function = driver.load(figures.cubin, figures.entry, figures.shared)
            driver.launch(self._bound(sample.before, figures, function, places, 0, sm))
        driver.synchronize()

    def _bound(
        self, launch: Launch, figures: Compiled, function: object, places: _Places, copy: int, sm: int
    ) -> KernelLaunch:
        args = tuple(
            Address(self._base + places.at(arg, copy), arg.space, arg.nbytes) if isinstance(arg, Pointer) else arg
            for arg in launch.args
        )
        return KernelLaunch(
            function, variant_key(launch.variant(sm)), launch.grid, 32 * figures.num_warps, figures.shared,
            launch.signature(), args, figures.hidden_params, launch.overlap,
        )  # fmt: skip


def _cache_rows(values: Mapping[str, Argument]) -> int:
    """Rows of the cache of a launch of attention; the last one may be shorter than the stride."""
    cache = values["k_cache"]
    assert isinstance(cache, Pointer)
    return -(-cache.nbytes // ITEM_BYTES[cache.dtype] // _integer(values, "k_stride"))


def _integer(values: Mapping[str, Argument], name: str) -> int:
    return int(values[name])  # type: ignore[arg-type]
