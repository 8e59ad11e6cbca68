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
from floors import Experts, part, spanned, weight_bytes, weights_read

import tmlc
from tmlc.runtimes.core.chains import Answering, Key, Listening, Writing
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.tick import InteractionDriver
from tmlc.runtimes.cuda.backend import CudaBackend
from tmlc.runtimes.cuda.chains import Chain
from tmlc.runtimes.cuda.driver import Address, Driver, KernelLaunch
from tmlc.runtimes.cuda.plan import BucketInfo, PointerArg, up

BUCKETS = ((1, 1), (1, 4), (1, 16), (4, 1))
MOST_ROTATED = 8 << 30  # bytes of copies of one launch's weights
MOST_FILLED = 1 << 16  # positions that are appended before anything is timed
ROUNDS = 5  # of a graph by the device's clock and by the host's
TEMPERATURE = 0.8


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
        fill: whether caches are full while kernels and graphs are timed.
        sessions: for how many the graphs of ticks are timed.
    """

    times: int = 50
    launches: int = 64
    rotated: int = 256 << 20
    copy_bytes: int = 1 << 30
    buckets: tuple[tuple[int, int], ...] = BUCKETS
    ticks: int = 10_000
    most_seconds: float = 120.0
    fill: bool = True
    sessions: tuple[int, ...] = (1, 4)


REHEARSAL = Effort(1, 2, 1 << 12, 1 << 16, ((1, 1),), 1, 1.0, False, (1,))
"""For a device whose times mean nothing."""


def repeated(driver: Driver, work: Callable[[], None], times: int) -> float:
    """Seconds of one run, from `times` runs that follow each other (a few ahead of them are not counted)."""

    def run(count: int) -> None:
        for _ in range(count):
            work()

    return driver.timed(lambda: run(times), ahead=lambda: run(min(3, times))) / times


def bandwidth(driver: Driver, nbytes: int, times: int = 20) -> float:
    """Bytes a second that a copy inside device memory reads and writes."""
    source, to = driver.allocate(nbytes), driver.allocate(nbytes)
    return 2 * nbytes / repeated(driver, lambda: driver.copy(to, source, nbytes), times)


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
    def copies(bound: KernelLaunch, least: float, effort: Effort) -> int:
        """How many a launch needs that reads this part of its weights at least."""
        whole = _weights(bound)
        read = int(whole * least)
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


def rotation(backend: CudaBackend, least: float, effort: Effort) -> Rotation:
    """Room for the launch that needs the most. `least` is the part of the experts that any call reads."""
    most = 0
    for _, bucket in measured(backend, effort):
        for info, bound in zip(bucket.launches, backend.launches(bucket), strict=True):
            read = part(backend.plan.variants[info.variant].kernel, least)
            most = max(most, (Rotation.copies(bound, read, effort) - 1) * _weights(bound))
    return Rotation(backend.driver, most)


def measured(backend: CudaBackend, effort: Effort) -> list[tuple[str, BucketInfo]]:
    """The methods and buckets that are timed."""
    return [
        (name, bucket) for name, method in backend.plan.methods.items() for bucket in method.buckets
        if (bucket.batch, bucket.n) in effort.buckets
    ]  # fmt: skip


def fill(engine: Engine) -> None:
    """Appends positions, others each time, until the caches of the first slots are full, as late in a conversation."""
    backend: Any = engine.backend
    buckets = [b for b in backend.plan.methods["decode"].buckets if b.batch <= engine.slots.count]
    bucket = max(buckets, key=lambda b: (min(b.batch, 4), b.n))
    for seed in range(-(-min(engine.manifest.context.limit, MOST_FILLED) // bucket.n)):
        backend.rehearse("decode", bucket, seed)
        backend.replay("decode", bucket)
    backend.driver.synchronize()


def kernels(
    backend: CudaBackend, method: str, bucket: BucketInfo, rate: float, least: float, effort: Effort, room: Rotation
) -> list[dict[str, Any]]:
    """Each launch of a bucket by itself: seconds, bytes, and the part of the floor that it reaches. Launches that
    differ in addresses only (layers) are timed once and counted. `least` is the part of the experts that any call
    reads; bytes are those of the experts that the launch reads.

    A graph holds `effort.launches` of one kernel, each over another copy of its weights; the fastest replay counts.
    Launches run in the order of the bucket, so each finds what those before it leave.
    """
    driver, experts = backend.driver, Experts(backend)
    rows: dict[Any, dict[str, Any]] = {}
    backend.rehearse(method, bucket)
    for info, bound in zip(bucket.launches, backend.launches(bucket), strict=True):
        variant = backend.plan.variants[info.variant]
        key = info.variant, info.grid, tuple(
            (arg.space, arg.nbytes) if isinstance(arg, PointerArg) else arg for arg in info.args
        )  # fmt: skip
        if key in rows:
            rows[key]["count"] += 1
            driver.launch(bound)
            experts.behind(bound)
            continue
        count = Rotation.copies(bound, part(variant.kernel, least), effort)
        seconds = _alone(driver, room.of(bound, count), effort)
        share = experts.behind(bound)
        weights = weight_bytes(bound, variant.kernel, share)
        moved = weights + spanned(bound)
        rows[key] = {
            "method": method, "bucket": f"b{bucket.batch}n{bucket.n}", "kernel": variant.kernel,
            "variant": variant.name, "grid": list(info.grid), "count": 1, "seconds": seconds, "bytes": moved,
            "weight_bytes": weights, "expert_share": share if variant.kernel.startswith("moe_") else None,
            "copies": count, "of_floor": moved / rate / seconds,
        }  # fmt: skip
    driver.synchronize()
    return list(rows.values())


def _alone(driver: Driver, launches: list[KernelLaunch], effort: Effort) -> float:
    """Seconds of one launch in a graph of many, behind a replay of the same."""

    def work() -> None:
        for number in range(effort.launches):
            driver.launch(launches[number % len(launches)])

    graph = driver.capture(work)

    def replay() -> None:
        driver.replay(graph)

    try:
        return min(driver.timed(replay, ahead=replay) for _ in range(min(5, effort.times))) / effort.launches
    finally:
        driver.forget(graph)


# Graphs.


def graph(
    backend: CudaBackend, method: str, bucket: BucketInfo, alone: float | None, rate: float, times: int
) -> dict[str, Any]:
    """A bucket's whole graph. `alone` is the sum of its kernels by themselves, if that is known: what the graph takes
    beyond that is gaps and copies."""
    backend.rehearse(method, bucket)
    weights = weights_read(backend, backend.launches(bucket))
    seconds = repeated(backend.driver, lambda: backend.replay(method, bucket), times)
    return {
        "method": method, "bucket": f"b{bucket.batch}n{bucket.n}", "launches": len(bucket.launches),
        "seconds": seconds, "kernels_alone": alone, "weight_bytes": weights, "of_floor": weights / rate / seconds,
    }  # fmt: skip


def chain(engine: Engine, one: Chain, rate: float, times: int) -> dict[str, Any]:
    """The graph of a part of a tick, by the device's clock, and by the host's when it waits for each replay, as a tick
    does: what the second is longer is the gap that the host leaves."""
    backend: Any = engine.backend
    stage(engine, one)
    launches = backend.chain_launches(one)
    weights = weights_read(backend, launches)
    seconds, waited = both_clocks(backend.driver, lambda: backend.replay_chain(one), times)
    return {
        "chain": one.name, "sessions": one.batch, "launches": len(launches), "seconds": seconds,
        "waited_seconds": waited, "host_gap_seconds": waited - seconds, "weight_bytes": weights,
        "of_floor": weights / rate / seconds,
    }  # fmt: skip


def stage(engine: Engine, chain: Chain) -> None:
    """Runs a chain once for as many made-up sessions as it holds, in the first slots: its replays then repeat what was
    uploaded."""
    backend: Any = engine.backend
    chains, layout, draw = backend.chains, engine.layout, np.random.default_rng(0)
    below = backend.plan.methods["embed_text"].id_limits[0]
    slots = [engine.slots.handle(index) for index in range(chain.batch)]

    def key() -> Key:
        seed, tick, number = draw.integers(0, 1 << 31, 3).tolist()
        return seed, tick, number

    def sound(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32)

    def tokens(count: int) -> list[int]:
        return [int(v) for v in draw.integers(0, below, count)]

    if chain.name in ("listen", "listen_text"):
        typed = chains.typed if chain.name == "listen_text" else 0
        heard = [sound(layout.audio_in, layout.hop) for _ in slots]
        chains.listen([Listening(s, h, (), tokens(typed), key(), TEMPERATURE)
                       for s, h in zip(slots, heard, strict=True)])  # fmt: skip
    elif chain.name == "write":
        chains.write([Writing(slot, tokens(1)[0], key(), TEMPERATURE) for slot in slots])
    else:
        spoken = layout.audio_out if chain.name == "speak" else 0
        end = layout.end_of_tick_token_id
        chains.answer([Answering(slot, [*tokens(1), end], sound(layout.hop), [key() for _ in range(spoken)])
                       for slot in slots])  # fmt: skip


def both_clocks(driver: Driver, replay: Callable[[], None], times: int) -> tuple[float, float]:
    """Seconds of a replay, of some that follow each other by the device's clock, and of one that is waited for by the
    host's: medians of rounds that take turns, since a replay finds what those before it have appended."""
    rounds, blocks, waited = min(ROUNDS, times), [], []
    for _ in range(rounds):
        count = max(1, times // rounds)
        blocks.append(repeated(driver, replay, count))
        for _ in range(count):
            begun = time.perf_counter()
            replay()
            driver.synchronize()
            waited.append(time.perf_counter() - begun)
    return statistics.median(blocks), statistics.median(waited)


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
