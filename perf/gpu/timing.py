"""Times of kernels, graphs and ticks on a device, beside the floor: bytes that must move over the bandwidth measured
there."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import tmlc
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.tick import InteractionDriver
from tmlc.runtimes.cuda.backend import CudaBackend
from tmlc.runtimes.cuda.chains import Chain, Link
from tmlc.runtimes.cuda.driver import Address, Driver, KernelLaunch
from tmlc.runtimes.cuda.plan import BucketInfo, LaunchInfo, PointerArg, up

READ_SPACES = ("weight", "arena", "input", "output", "scratch")
BUCKETS = ((1, 1), (1, 4), (1, 16), (4, 1))
MOST_ROTATED = 8 << 30  # bytes of copies of one launch's weights
MOST_FILLED = 1 << 16  # positions that are appended before kernels are timed


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        times: replays of each graph.
        launches: of one kernel in the graph that times it, so that the host is not what is measured.
        rotated: bytes of weights that are read before one is read again; more than any device caches.
        copy_bytes: size of the copy that measures the bandwidth.
        buckets: (sessions, positions) whose kernels and graphs are timed.
        ticks: of one session; a tenth of them for four, and method by method.
        most_seconds: of each run of ticks.
        fill: whether caches are full while kernels are timed.
    """

    times: int = 50
    launches: int = 64
    rotated: int = 256 << 20
    copy_bytes: int = 1 << 30
    buckets: tuple[tuple[int, int], ...] = BUCKETS
    ticks: int = 10_000
    most_seconds: float = 120.0
    fill: bool = True


REHEARSAL = Effort(1, 2, 1 << 12, 1 << 16, ((1, 1),), 1, 1.0, False)
"""For a device whose times mean nothing."""


def repeated(driver: Driver, work: Callable[[], None], times: int) -> float:
    """Seconds of one run, from `times` runs that follow each other (a few before them are not counted)."""

    def run(count: int) -> None:
        for _ in range(count):
            work()

    run(min(3, times))
    driver.synchronize()
    return driver.timed(lambda: run(times)) / times


def bandwidth(driver: Driver, nbytes: int, times: int = 20) -> float:
    """Bytes a second that a copy inside device memory reads and writes."""
    source, to = driver.allocate(nbytes), driver.allocate(nbytes)
    return 2 * nbytes / repeated(driver, lambda: driver.copy(to, source, nbytes), times)


# What a launch must move.


def expert_share(config: dict[str, Any], batch: int, n: int) -> float:
    """The part of the experts that a call of these sizes reads at most."""
    chosen = (config["num_experts_per_tok"] + config["n_shared_experts"]) * batch * n
    return min(1.0, chosen / (config["n_routed_experts"] + config["n_shared_experts"]))


def part(kernel: str, share: float) -> float:
    """The part of its weights that a kernel reads: of stacked experts `share`; of a table only rows, which count as
    nothing."""
    return share if kernel.startswith("moe_") else 0.0 if kernel == "embedding_kernel" else 1.0


def weight_bytes(launch: LaunchInfo, kernel: str, share: float) -> int:
    """Bytes of weights that a launch must read."""
    sizes = [arg.nbytes for arg in launch.args if isinstance(arg, PointerArg) and arg.space == "weight"]
    return int(sum(sizes) * part(kernel, share))


def launch_bytes(launch: LaunchInfo, kernel: str, share: float) -> int:
    """Bytes that a launch must move: its weights, and what its other pointers span. Caches are left out (what of them
    is read depends on the session)."""
    others = [a.nbytes for a in launch.args if isinstance(a, PointerArg) and a.space in READ_SPACES[1:]]
    return weight_bytes(launch, kernel, share) + sum(others)


def bucket_weights(backend: CudaBackend, bucket: BucketInfo, config: dict[str, Any]) -> int:
    """Bytes of weights that a call of a bucket must read."""
    share = expert_share(config, bucket.batch, bucket.n)
    return sum(weight_bytes(x, backend.plan.variants[x.variant].kernel, share) for x in bucket.launches)


def chain_weights(backend: CudaBackend, chain: Chain, config: dict[str, Any]) -> int:
    """Bytes of weights that a chain's methods must read, each time that they run."""
    total = 0
    for link in chain.links:
        if isinstance(link, Link):
            found = backend.plan.methods[link.method].buckets
            bucket = next(b for b in found if (b.batch, b.n) == (chain.batch, link.n))
            total += bucket_weights(backend, bucket, config)
    return total


# Kernels by themselves.


class Rotation:
    """Device memory for copies of a launch's weights, so that they come from memory as in a tick, not from a cache.

    Args:
        nbytes: as much as all copies of one launch may take.
    """

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver, self._size = driver, nbytes
        self._base = driver.allocate(max(nbytes, 1))

    @staticmethod
    def copies(bound: KernelLaunch, share: float, effort: Effort) -> int:
        """How many a launch needs."""
        whole = _weights(bound)
        read = int(whole * share)
        return max(1, min(effort.launches, -(-effort.rotated // read), MOST_ROTATED // whole)) if read else 1

    def of(self, bound: KernelLaunch, count: int) -> list[KernelLaunch]:
        """The launch, and `count` - 1 others like it, each over a copy of its weights."""
        made, at = [bound], 0
        for _ in range(count - 1):
            args: list[Address | int | float] = []
            for arg in bound.args:
                if isinstance(arg, Address) and arg.space == "weight":
                    if at + arg.nbytes > self._size:
                        raise ValueError(f"{bound.variant}: copies do not fit {self._size} bytes")
                    self._driver.copy(self._base + at, arg.value, arg.nbytes)
                    args.append(replace(arg, value=self._base + at))
                    at += up(arg.nbytes)
                else:
                    args.append(arg)
            made.append(replace(bound, args=tuple(args)))
        return made


def _weights(bound: KernelLaunch) -> int:
    return sum(up(arg.nbytes) for arg in bound.args if isinstance(arg, Address) and arg.space == "weight")


def rotation(backend: CudaBackend, config: dict[str, Any], effort: Effort) -> Rotation:
    """Room for the launch that needs the most."""
    most = 0
    for bucket in measured(backend, effort):
        share = expert_share(config, bucket[1].batch, bucket[1].n)
        for info, bound in zip(bucket[1].launches, backend.launches(bucket[1]), strict=True):
            read = part(backend.plan.variants[info.variant].kernel, share)
            most = max(most, (Rotation.copies(bound, read, effort) - 1) * _weights(bound))
    return Rotation(backend.driver, most)


def measured(backend: CudaBackend, effort: Effort) -> list[tuple[str, BucketInfo]]:
    """The methods and buckets that are timed."""
    return [
        (name, bucket) for name, method in backend.plan.methods.items() for bucket in method.buckets
        if (bucket.batch, bucket.n) in effort.buckets
    ]  # fmt: skip


def fill(engine: Engine) -> None:
    """Appends positions until the caches of the first slots are full, which kernels that run alone then meet."""
    backend: Any = engine.backend
    buckets = [b for b in backend.plan.methods["decode"].buckets if b.batch <= engine.slots.count]
    bucket = max(buckets, key=lambda b: (min(b.batch, 4), b.n))
    backend.rehearse(bucket)
    for _ in range(-(-min(engine.manifest.context.limit, MOST_FILLED) // bucket.n)):
        backend.replay("decode", bucket)
    backend.driver.synchronize()


def kernels(
    backend: CudaBackend, method: str, bucket: BucketInfo, rate: float, share: float, effort: Effort, room: Rotation
) -> list[dict[str, Any]]:
    """Each launch of a bucket by itself: seconds, bytes, and the part of the floor that it reaches. Launches that
    differ in addresses only (layers) are timed once and counted.

    A graph holds `effort.launches` of one kernel, each over another copy of its weights; the fastest replay counts.
    Launches run in the order of the bucket, so each finds what those before it leave.
    """
    driver = backend.driver
    rows: dict[Any, dict[str, Any]] = {}
    backend.rehearse(bucket)
    for info, bound in zip(bucket.launches, backend.launches(bucket), strict=True):
        variant = backend.plan.variants[info.variant]
        key = info.variant, info.grid, tuple(
            (arg.space, arg.nbytes) if isinstance(arg, PointerArg) else arg for arg in info.args
        )  # fmt: skip
        if key in rows:
            rows[key]["count"] += 1
            driver.launch(bound)
            continue
        count = Rotation.copies(bound, part(variant.kernel, share), effort)
        seconds = _alone(driver, room.of(bound, count), effort)
        moved = launch_bytes(info, variant.kernel, share)
        rows[key] = {
            "method": method, "bucket": f"b{bucket.batch}n{bucket.n}", "kernel": variant.kernel,
            "variant": variant.name, "grid": list(info.grid), "count": 1, "seconds": seconds, "bytes": moved,
            "weight_bytes": weight_bytes(info, variant.kernel, share), "copies": count,
            "of_floor": moved / rate / seconds,
        }  # fmt: skip
    driver.synchronize()
    return list(rows.values())


def _alone(driver: Driver, launches: list[KernelLaunch], effort: Effort) -> float:
    """Seconds of one launch in a graph of many."""

    def work() -> None:
        for number in range(effort.launches):
            driver.launch(launches[number % len(launches)])

    graph = driver.capture(work)
    try:
        driver.replay(graph)
        driver.synchronize()
        return min(driver.timed(lambda: driver.replay(graph)) for _ in range(min(5, effort.times))) / effort.launches
    finally:
        driver.forget(graph)


# Graphs.


def graph(
    backend: CudaBackend, method: str, bucket: BucketInfo, alone: float | None, weights: int, rate: float, times: int
) -> dict[str, Any]:
    """A bucket's whole graph. `alone` is the sum of its kernels by themselves, if that is known: what the graph takes
    beyond that is gaps and copies. `weights` are the bytes of weights that it must read."""
    backend.rehearse(bucket)
    seconds = repeated(backend.driver, lambda: backend.replay(method, bucket), times)
    return {
        "method": method, "bucket": f"b{bucket.batch}n{bucket.n}", "launches": len(bucket.launches),
        "seconds": seconds, "kernels_alone": alone, "weight_bytes": weights, "of_floor": weights / rate / seconds,
    }  # fmt: skip


def chain(backend: CudaBackend, one: Chain, weights: int, rate: float, times: int) -> dict[str, Any]:
    """The graph of a part of a tick, by the device's clock, and by the host's when it waits for each replay, as a tick
    does: what the second is longer is the gap that the host leaves."""
    backend.rehearse_chain(one)
    seconds = repeated(backend.driver, lambda: backend.replay_chain(one), times)
    waited = []
    for _ in range(times):
        begun = time.perf_counter()
        backend.replay_chain(one)
        backend.driver.synchronize()
        waited.append(time.perf_counter() - begun)
    alone = statistics.median(waited)
    return {
        "chain": one.name, "sessions": one.batch, "launches": len(backend.chain_launches(one)), "seconds": seconds,
        "waited_seconds": alone, "host_gap_seconds": alone - seconds, "weight_bytes": weights,
        "of_floor": weights / rate / seconds,
    }  # fmt: skip


# Ticks.


def ticks(
    engine: Engine, count: int, sessions: int = 1, methods: bool = False, most_seconds: float = 120.0
) -> dict[str, Any]:
    """Whole ticks of sessions in lock-step, sound in and out, as a server runs them; milliseconds. Fewer than `count`
    where they would take longer than `most_seconds`; the answer says how many. With `methods` a call for each method in
    place of the graphs of a tick."""
    driver = engine.driver
    if methods:
        engine.driver = InteractionDriver(engine.model, engine.slots.count)
    try:
        return _ticks(engine, count, sessions, most_seconds) | {"by_methods": methods}
    finally:
        engine.driver = driver


def _ticks(engine: Engine, count: int, sessions: int, most_seconds: float) -> dict[str, Any]:
    layout = engine.manifest.tick
    opened = [engine.session(seed=k) for k in range(sessions)]
    draw = np.random.default_rng(0)
    if engine.kind == "interaction":
        sound = (0.1 * draw.standard_normal(layout.audio_in * layout.hop)).astype(np.float32)
        given = [tmlc.TickInput(sound) for _ in opened]
    else:
        given = [tmlc.TickInput(tokens=[1]) for _ in opened]
    free = engine.backend.driver.memory()[0]  # type: ignore[attr-defined]
    times, done, silent, resident, started = np.zeros(count), 0, 0, 0, time.perf_counter()
    while not done or (done < count and time.perf_counter() - started < most_seconds):
        begun = time.perf_counter()
        for out in engine.tick_batch(opened, given):
            if isinstance(out, Exception):
                raise out
            silent += out.stats["silent"]
        times[done] = 1e3 * (time.perf_counter() - begun)
        done += 1
        if done == max(1, count // 10):  # buffers of the host are warm
            resident = resident_bytes()
    grown = free - engine.backend.driver.memory()[0]  # type: ignore[attr-defined]
    for session in opened:
        session.close()
    times = times[:done]
    edge = max(1, done // 10)
    return {
        "sessions": sessions, "ticks": done, "asked": count, "silent": silent, "p50_ms": float(np.median(times)),
        "p99_ms": float(np.quantile(times, 0.99, method="higher")), "max_ms": float(np.max(times)),
        "last_tenth_over_first": float(np.median(times[-edge:]) / np.median(times[:edge])),
        "device_bytes_grown": grown, "host_bytes_grown": resident_bytes() - resident if resident else None,
    }  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
