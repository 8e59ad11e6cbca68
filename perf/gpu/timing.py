"""Times of kernels, graphs and ticks on a device, beside the floor: bytes that must move over the bandwidth measured
there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import tmlc
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.tick import InteractionDriver
from tmlc.runtimes.cuda.backend import CudaBackend
from tmlc.runtimes.cuda.chains import Chain
from tmlc.runtimes.cuda.driver import Driver
from tmlc.runtimes.cuda.plan import BucketInfo, LaunchInfo, PointerArg

READ_SPACES = ("weight", "state", "arena", "input", "output", "scratch")


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


def launch_bytes(launch: LaunchInfo, kernel: str, share: float) -> int:
    """Bytes that a launch must move: what its pointers span, of stacked experts the `share` that a call touches. Caches
    are left out (what of them is read depends on the session)."""
    touched = 0.0
    for arg in launch.args:
        if isinstance(arg, PointerArg) and arg.space in READ_SPACES and arg.space != "state":
            expert = kernel.startswith("moe_") and arg.space == "weight"
            touched += arg.nbytes * (share if expert else 1.0)
    return int(touched)


def kernels(
    backend: CudaBackend, method: str, bucket: BucketInfo, rate: float, share: float, times: int
) -> list[dict[str, Any]]:
    """Each launch of a bucket by itself, many times over: seconds, bytes, and the part of the floor that it reaches."""
    rows = []
    backend.rehearse(bucket)
    for info, bound in zip(bucket.launches, backend.launches(bucket), strict=True):
        variant = backend.plan.variants[info.variant]
        seconds = repeated(backend.driver, lambda bound=bound: backend.driver.launch(bound), times)  # type: ignore[misc]
        moved = launch_bytes(info, variant.kernel, share)
        rows.append({
            "method": method, "bucket": f"b{bucket.batch}n{bucket.n}", "kernel": variant.kernel,
            "variant": variant.name, "grid": list(info.grid), "seconds": seconds, "bytes": moved,
            "of_floor": moved / rate / seconds,
        })  # fmt: skip
    return rows


def graph(
    backend: CudaBackend, method: str, bucket: BucketInfo, alone: float, weights: int, rate: float, times: int
) -> dict[str, Any]:
    """A bucket's whole graph. `alone` is the sum of its kernels by themselves: what the graph takes beyond that is gaps
    and copies. `weights` are the bytes of weights that it must read."""
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
    times: list[float] = []
    silent, started = 0, time.perf_counter()
    while not times or (len(times) < count and time.perf_counter() - started < most_seconds):
        begun = time.perf_counter()
        for out in engine.tick_batch(opened, given):
            if isinstance(out, Exception):
                raise out
            silent += out.stats["silent"]
        times.append(1e3 * (time.perf_counter() - begun))
    grown = free - engine.backend.driver.memory()[0]  # type: ignore[attr-defined]
    for session in opened:
        session.close()
    last = times[-max(1, len(times) // 10) :]
    return {
        "sessions": sessions, "ticks": len(times), "asked": count, "silent": silent, "p50_ms": statistics.median(times),
        "p99_ms": sorted(times)[min(len(times) - 1, int(0.99 * len(times)))], "max_ms": max(times),
        "last_tenth_over_first": statistics.median(last) / statistics.median(times[: len(last)]),
        "device_bytes_grown": grown,
    }  # fmt: skip
