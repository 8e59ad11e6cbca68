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
from tmlc.runtimes.cuda.backend import CudaBackend
from tmlc.runtimes.cuda.driver import Driver
from tmlc.runtimes.cuda.plan import BucketInfo, LaunchInfo, PointerArg

READ_SPACES = ("weight", "state", "arena", "input", "output", "scratch")


def repeated(driver: Driver, work: Callable[[], None], times: int) -> float:
    """Seconds of one run, from `times` runs that follow each other (a few before them are not counted)."""
    for _ in range(min(3, times)):
        work()
    driver.synchronize()
    return driver.timed(lambda: [work() for _ in range(times)] and None) / times


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


def ticks(engine: Engine, count: int, sessions: int = 1) -> dict[str, Any]:
    """Whole ticks of sessions in lock-step, sound in and out, as a server runs them; milliseconds."""
    layout = engine.manifest.tick
    opened = [engine.session(seed=k) for k in range(sessions)]
    draw = np.random.default_rng(0)
    if engine.kind == "interaction":
        sound = (0.1 * draw.standard_normal(layout.audio_in * layout.hop)).astype(np.float32)
        given = [tmlc.TickInput(sound) for _ in opened]
    else:
        given = [tmlc.TickInput(tokens=[1]) for _ in opened]
    free = engine.backend.driver.memory()[0]  # type: ignore[attr-defined]
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        for out in engine.tick_batch(opened, given):
            if isinstance(out, Exception):
                raise out
        times.append(1e3 * (time.perf_counter() - begun))
    grown = free - engine.backend.driver.memory()[0]  # type: ignore[attr-defined]
    for session in opened:
        session.close()
    last = times[-max(1, count // 10) :]
    return {
        "sessions": sessions, "ticks": count, "p50_ms": statistics.median(times),
        "p99_ms": sorted(times)[min(count - 1, int(0.99 * count))], "max_ms": max(times),
        "last_tenth_over_first": statistics.median(last) / statistics.median(times[: len(last)]),
        "device_bytes_grown": grown,
    }  # fmt: skip
