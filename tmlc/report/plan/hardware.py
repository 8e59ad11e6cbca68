"""The machines that a plan can be made for: the table beside this file, and the machine that this runs on, measured."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tmlc.errors import UsageError

if TYPE_CHECKING:
    from tmlc.kernels.cpu import MemoryReader

HERE = "here"
CACHE_TIMES = 2.0  # how much faster than its memory a GPU's last cache is taken to be
HERE_REACH = {"bytes": 0.80, "products": 0.70}
"""What the CPU engine reaches of the measured rates: the calibration of docs/cost-model.md, tested by
`perf/test_plan.py`."""
HERE_OP_US = 0.8
"""What one op of the CPU engine costs beside its bytes and products: hand-over between threads, activations, norms."""
HERE_CALL_US = 14.0
"""What one call of a method costs beside its ops: the interpreter, copies in and out."""


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name, title, source: what it is called, and where its figures are from.
        memory: bytes. bandwidth: bytes a second. cache, cache_bandwidth: of the last cache.
        rates: operations a second by how weights are stored.
        link: bytes a second to another device, one way; link_seconds: of one sum over all devices, beside its bytes.
        launch_seconds: of one launch (an op, or a kernel), beside its bytes and operations.
        call_seconds: of one run that the host waits for (a call of a method, or a graph), beside its launches.
        reach: fractions of `bandwidth` and `rates` that an engine gets.
        target: of the compiler for it.
        measured: was all this measured here?
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    cache: float
    cache_bandwidth: float
    rates: dict[str, float]
    link: float
    link_seconds: float
    launch_seconds: float
    call_seconds: float
    reach: dict[str, float]
    source: str
    target: str = "cpu"
    measured: bool = False


def table() -> dict[str, Hardware]:
    """The machines of `hardware.yaml`, by name."""
    rows = yaml.safe_load(files(__package__).joinpath("hardware.yaml").read_text("utf-8"))
    made = {}
    for row in rows:
        made[row["name"]] = Hardware(
            name=row["name"],
            title=row["title"],
            memory=row["memory"] * 1e9,
            bandwidth=row["bandwidth"] * 1e9,
            cache=row["cache"] * 1e6,
            cache_bandwidth=CACHE_TIMES * row["bandwidth"] * 1e9,
            rates={kind: rate * 1e12 for kind, rate in row["rates"].items()},
            link=row["link"] * 1e9,
            link_seconds=row["link_us"] * 1e-6,
            launch_seconds=row["launch_us"] * 1e-6,
            call_seconds=row["call_us"] * 1e-6,
            reach=row["reach"],
            source=row["source"],
            target=row["target"],
        )
    return made


def find(name: str, working_set: float, threads: int | None) -> Hardware:
    """A machine by name.

    Args:
        name: of the table, or `here`, which measures this machine for some seconds.
        working_set: bytes that a tick reads, for `here`: caches may hold them.
        threads: of the engine, for `here`.

    Raises UsageError for a name that the table lacks.
    """
    if name == HERE:
        return measure_here(working_set, threads)
    known = table()
    if name not in known:
        fix = f"use one of {', '.join((*known, HERE))}"
        raise UsageError(f"no hardware called {name!r}", where="--on", fix=fix)
    return known[name]


def measure_here(working_set: float, threads: int | None = None) -> Hardware:
    """This machine: how fast its threads read as much memory as a tick does, and how fast they multiply."""
    from tmlc.kernels.cpu import MemoryReader, Pool, load_library, multiply_rate
    from tmlc.report.machine import cpu_name, memory_bytes
    from tmlc.runtimes.core.engine import default_threads

    count = threads or default_threads()
    pool = Pool(load_library(), count)
    cache = last_cache_bytes()
    bandwidth = _bandwidth(MemoryReader(pool, int(min(512, max(4, working_set / 2**20)))))
    cached = _bandwidth(MemoryReader(pool, max(1, int(cache / 4 / 2**20))))
    macs = {kind: sorted(multiply_rate(pool, kind) for _ in range(5))[2] for kind in ("f32", "bf16", "int8")}
    return Hardware(
        name=HERE,
        title=f"{cpu_name()}, {count} threads",
        memory=float(memory_bytes() or 0),
        bandwidth=bandwidth,
        cache=cache,
        cache_bandwidth=max(bandwidth, cached),
        rates={"fp32": 2 * macs["f32"], "bf16": 2 * macs["bf16"], "int8": 2 * macs["int8"], "int4": 2 * macs["int8"]},
        link=0.0,
        link_seconds=0.0,
        launch_seconds=HERE_OP_US * 1e-6,
        call_seconds=HERE_CALL_US * 1e-6,
        reach=HERE_REACH,
        source="measured",
        measured=True,
    )


def _bandwidth(reader: MemoryReader) -> float:
    return sorted(reader.bandwidth() for _ in range(15))[7]


def last_cache_bytes() -> float:
    """The size of the largest cache that the system lists for the first core; 0 when it lists none."""
    sizes = [0.0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(float(text.rstrip("KMG")) * {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}.get(text[-1:], 1.0))
    return max(sizes)
