"""Time and memory of a tick on given hardware, and how many sessions fit the budget (docs/cost-model.md: formulas)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tmlc.errors import UsageError
from tmlc.ir.program import Program
from tmlc.report.plan.engine import Engine, OpsEngine, Run
from tmlc.report.plan.hardware import Hardware
from tmlc.report.plan.work import MethodCall, OpWork, key_heads, method_work, session_bytes, weight_bytes

MEMORY_SHARE = 0.92  # of a device: the driver, code, workspace and arenas need the rest
JITTER = {True: 1.3, False: 1.15}  # p99 over a typical step, on a measured CPU and on a device of the table
MAX_SESSIONS = 4096
PARTS = ("bytes", "products", "launches", "links")
BETWEEN = "between methods"
"""In `Step.methods`: what moves rows between the methods of a graph, and the waiting for it."""


@dataclass
class Step:
    """A predicted step.

    Attributes:
        seconds: of the whole batch; `parts` splits it by what bounds it: bytes, products, launches, links.
        bytes, operations: of all devices together; `methods` are seconds by method.
        launches, waits: how many launches there are, and how often the host waits for them.
    """

    seconds: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    methods: dict[str, float] = field(default_factory=dict)
    launches: int = 0
    waits: int = 0

    def add(self, method: str, part: str, seconds: float) -> None:
        """So many seconds more of a method, for that reason."""
        self.seconds += seconds
        self.parts[part] += seconds
        self.methods[method] = self.methods.get(method, 0.0) + seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Predictor:
    """One model in one precision on so many devices of one kind.

    Args:
        program: after the passes.
        precision: how the weights of products are stored.
        hardware, devices: what runs it; each device has a part of every weight (tensor parallelism), or, with
            `split="experts"`, whole experts and a part of every other weight.
        context: positions that a session has kept.
        spread: the share of the experts that the routing really uses.
        engine: how a tick is run; default: an op is a launch.

    Raises UsageError for a precision that the hardware has no rate for.
    """

    def __init__(
        self,
        program: Program,
        precision: str,
        hardware: Hardware,
        devices: int,
        context: int,
        split: str = "tensors",
        spread: float = 1.0,
        engine: Engine | None = None,
    ) -> None:
        rate = "int8" if precision == "int4" and "int4" not in hardware.rates else precision
        if rate not in hardware.rates:
            has = ", ".join(hardware.rates)
            raise UsageError(
                f"{hardware.title} has no products of {precision}", where="--precision", fix=f"it has {has}"
            )
        self.program, self.precision, self.hardware = program, precision, hardware
        self.devices, self.context, self.split, self.spread = devices, context, split, spread
        self.work = method_work(program, precision)
        self.engine = engine or OpsEngine(program, self.work)
        self.weights = weight_bytes(self.work, program, precision)
        self.session = session_bytes(program)
        self.rate = hardware.rates[rate] * hardware.reach["products"]
        self.attention_rate = hardware.rates.get("bf16", hardware.rates["fp32"]) * hardware.reach["products"]
        self.heads = key_heads(program)

    def step(self, sessions: int, video: bool) -> Step:
        """One tick of so many sessions together; with `video` each of them brings a clip."""
        return self._step(self.engine.tick(sessions, video))

    def calls(self, calls: Iterable[MethodCall], sessions: int) -> Step:
        """These calls, one after another, for so many sessions together."""
        return self._step(self.engine.calls(calls, sessions))

    def _step(self, runs: Iterable[Run]) -> Step:
        out, hardware = Step(), self.hardware
        for run in runs:
            whole = run.parts[0].method if len(run.parts) == 1 else BETWEEN
            out.add(whole, "launches", hardware.call_seconds + run.between * hardware.launch_seconds)
            out.launches += run.between
            out.waits += 1
            for part in run.parts:
                out.launches += part.launches
                out.add(part.method, "launches", part.launches * hardware.launch_seconds)
                fresh = sum(op.weight_bytes for op in self.work[part.method]) / self.devices
                for op in self.work[part.method]:
                    if op.computes:
                        self._op(out, part.method, op, op.rows * part.rows, part.sessions, fresh)
        return out

    def _again_bandwidth(self, fresh: float) -> float:
        """Of weights that the same call has read before: they are still in the last cache if all of the call's are."""
        return self.hardware.cache_bandwidth if fresh <= self.hardware.cache else self.hardware.bandwidth

    def _op(self, out: Step, method: str, op: OpWork, rows: int, sessions: int, fresh: float) -> None:
        hardware, devices = self.hardware, self.devices
        attended = op.attended(self.context)
        experts = op.touched(rows, self.spread) * op.expert_bytes
        cache = op.position_bytes * attended * sessions
        # A device reads the keys and values of its heads only, as far as there are heads to share out.
        per_device = op.weight_bytes / devices + self._share(op, rows) * experts + cache / min(devices, self.heads)
        again = op.again_bytes / devices / self._again_bandwidth(fresh)
        reading = (per_device / hardware.bandwidth + again) / hardware.reach["bytes"]
        macs = op.macs * rows
        attention = op.position_macs * attended * rows
        multiplying = 2 * (macs / self.rate + attention / self.attention_rate) / devices
        out.bytes += op.weight_bytes + op.again_bytes + experts + cache
        out.operations += 2 * (macs + attention)
        out.add(method, "bytes" if reading >= multiplying else "products", max(reading, multiplying))
        out.add(method, "links", self._link(op, rows))

    def _share(self, op: OpWork, rows: int) -> float:
        """The part of the touched experts' bytes that the busiest device reads."""
        if self.split == "tensors" or self.devices == 1:
            return 1.0 / self.devices
        touched = op.touched(rows, self.spread)
        if not touched:
            return 1.0
        mean = touched / self.devices
        # The largest of several Poisson counts, by the usual bound of its mean.
        return min(touched, mean + math.sqrt(2 * mean * math.log(self.devices))) / touched

    def _link(self, op: OpWork, rows: int) -> float:
        if self.devices == 1 or not op.reduces:
            return 0.0
        payload = 2.0 * rows * op.cols  # in bf16; a ring sends 2 (d - 1) / d of it over each link
        return self.hardware.link_seconds + 2 * (self.devices - 1) / self.devices * payload / self.hardware.link

    def memory(self, sessions: int) -> float:
        """Bytes on each device."""
        return self.weights / self.devices + sessions * self.session / min(self.devices, self.heads)

    def fits(self, sessions: int) -> bool:
        return self.memory(sessions) <= MEMORY_SHARE * self.hardware.memory

    def p99(self, sessions: int) -> float:
        """Seconds: the step of a tick in which every session brings a clip, times the jitter."""
        return self.step(sessions, video=True).seconds * JITTER[self.hardware.measured]

    def most_sessions(self, step_seconds: float) -> int:
        """The most sessions whose p99 step stays within `step_seconds` and whose memory fits; 0 for none."""

        def good(sessions: int) -> bool:
            return self.fits(sessions) and self.p99(sessions) <= step_seconds

        if not good(1):
            return 0
        low, high = 1, 2
        while high <= MAX_SESSIONS and good(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low
