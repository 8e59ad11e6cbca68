"""Sittings: the beginning of a session, played again and again in fresh processes, some before the session that a
profile plays and some after it.

An interval within one session knows nothing of what differs from one to the next: what else the machine does in those
seconds, and where memory lies. Each sitting gives one value of each figure; how these values differ is how well the
figure is known. `tmlc profile --compare` reads nothing else. A sitting beside which other programs were at work is
played again.

`python -m tmlc.report.profile.sittings` reads a job, one JSON object, and prints one sitting as a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.errors import KernelError
from tmlc.processes import python_module
from tmlc.report.bootstrap import TAIL, tail_mean
from tmlc.report.profile.kernels import KernelTicks, layers_of
from tmlc.report.profile.samples import Samples, ran
from tmlc.report.profile.stages import MethodCall, in_order
from tmlc.report.scenario.case import Case
from tmlc.report.tables import milliseconds
from tmlc.runtimes.core.kernels import KernelCall
from tmlc.runtimes.media.recording import TickShape

TICKS, WARM = 100, 20
"""Ticks of a sitting that count, and ticks before them that do not."""
STEP = "step"
QUANTILES = (("p95", 0.95), ("p99", 0.99))
QUIET = 0.05
"""Other programs, and other machines on the same processor, only ever add to a time. From one sitting to the next the
median of a step moves more than this quantile (`perf/test_sittings.py`)."""
BUSY = 0.1
"""Part of the machine's cores that other programs may use beside a sitting. One that kept a core of two busy made steps
of `nano` a seventh longer."""
SPARE = 2
"""So many times the number of sittings may be played again; what is still disturbed then counts."""
STAT = Path("/proc/stat")
SELF = tuple(python_module("tmlc.report.profile.sittings"))


class Sittings:
    """The sittings of one profile.

    Args:
        package: its path. settings: keyword arguments of `tmlc.load`.
        case: what is played; its first WARM + TICKS ticks, or all of it if that is shorter.
        kernels_every: every how many ticks kernel calls are timed; None times none.
        count: how many there are to be.
        command: what plays one: reads a job, prints a sitting.
    """

    def __init__(
        self,
        package: Path,
        settings: Mapping[str, Any],
        case: Case,
        shape: TickShape,
        seed: int,
        kernels_every: int | None,
        count: int,
        command: Sequence[str] = SELF,
    ) -> None:
        seconds = min(case.seconds, (max(WARM, case.warm_up) + TICKS) * shape.seconds)
        length = round(seconds / shape.seconds)
        warm_up = max(case.warm_up, min(WARM, length // 5))
        played = case.model_copy(update={"seconds": seconds, "warm_up": warm_up, "repetitions": 1})
        self._job: dict[str, Any] = {
            "package": str(package), "settings": {**settings, "sessions": case.sessions}, "case": played.to_json(),
            "shape": asdict(shape), "seed": seed, "kernels_every": kernels_every,
        }  # fmt: skip
        self._command, self.count = tuple(command), count
        self._found: list[dict[str, Any]] = []
        self._spare = 0 if case.load else SPARE * count  # what the case puts beside it belongs there

    @property
    def left(self) -> int:
        """Sittings that are still to be played."""
        return self.count - len(self._found)

    def measure(self) -> None:
        """Plays one, and again while it is disturbed. Raises KernelError when it failed, with the last thing that it
        said.
        """
        found = self._play()
        while self._spare and (found["busy"] or 0.0) > BUSY:
            self._spare -= 1
            found = self._play()
        self._found.append(found)

    def _play(self) -> dict[str, Any]:
        done = subprocess.run(self._command, input=json.dumps(self._job), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise KernelError(
                f"a sitting failed: {last}", where=self._job["package"],
                fix="run `tmlc verify` on the package, or profile with --sittings 0",
            )  # fmt: skip
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    def to_json(self) -> dict[str, Any]:
        """The part `sittings` of a profile: the figures of each sitting, in the order in which they were played. What
        not every sitting has, such as a stage that ran in some only, is left out.
        """
        first = self._found[0]["figures"]
        names = [name for name in first if all(name in one["figures"] for one in self._found)]
        return {
            "ticks": min(one["ticks"] for one in self._found),
            "figures": {name: [one["figures"][name] for one in self._found] for name in names},
            "busy": [one["busy"] for one in self._found],
        }


def told(sat: Mapping[str, Any]) -> str:
    """The part `sittings` in words: how the undisturbed step differs between them."""
    steps = sorted(sat["figures"][STEP])
    return (
        f"{len(steps)} fresh processes of {sat['ticks']} ticks; an undisturbed step "
        f"{milliseconds(statistics.median(steps))}, from {milliseconds(steps[0])} to {milliseconds(steps[-1])}"
    )


def figures(samples: Samples, kernels: Mapping[str, float]) -> dict[str, float]:
    """The figures of one sitting in ms: its steps, stages (`decode[0]`) and kernels (`kernel decode/moe layer 3`)."""
    steps = np.asarray(samples.step[1:], np.float64)
    found = {STEP: undisturbed(steps)}
    found |= {f"step {name}": float(np.percentile(steps, 100 * of, method="higher")) for name, of in QUANTILES}
    found[f"slowest {TAIL:.0%} of steps"] = tail_mean(steps)
    if audio := ran(samples.first_audio):
        found["first audio"] = undisturbed(audio)
    for name in in_order(samples.stages):
        if values := ran(samples.stages[name]):
            found[name] = undisturbed(values)
    found["between calls"] = undisturbed(samples.between_calls[1:])
    return found | {f"kernel {name}": ms for name, ms in kernels.items()}


def undisturbed(times: Sequence[float] | np.ndarray) -> float:
    """What something takes while the machine leaves it alone: the quantile QUIET of its times."""
    return float(np.percentile(times, 100 * QUIET, method="higher"))


def by_layer(calls: Sequence[KernelCall], ticks: int) -> dict[str, float]:
    """Milliseconds of a mean timed tick in all calls of a method to one kernel in one layer: `decode/moe layer 3`, or
    `vocode/gelu` where nothing tells a layer. Packages of one model have these names in common in any precision.
    """
    found: dict[str, float] = {}
    for call, layer in zip(calls, layers_of(calls), strict=True):
        name = f"{call.method}/{call.op}" + ("" if layer is None else f" layer {layer}")
        found[name] = found.get(name, 0.0) + call.ns / ticks / 1e6
    return found


def sit(job: Mapping[str, Any]) -> dict[str, Any]:
    """One sitting: loads the package, plays its ticks, and gives the figures."""
    import tmlc
    from tmlc.report.scenario.show import Show

    samples, calls = Samples(), list[MethodCall]()
    with tmlc.load(job["package"], **job["settings"]) as engine:
        show = Show(engine, Case.model_validate(job["case"]), TickShape(**job["shape"]), job["seed"])
        ticks = None
        if job["kernels_every"] is not None:
            ticks = KernelTicks(engine.backend.kernel_timer(), job["kernels_every"])
        before = 0

        def ready(index: int) -> None:
            nonlocal before
            calls.clear()
            if ticks is not None:
                ticks.before(index)
            before = preemptions()

        engine.model.watch = lambda *call: calls.append(MethodCall(*call))
        busy = Busy()
        for played in show.ticks(ready):
            if ticks is not None:
                ticks.after(preemptions() > before)
            samples.add(played, calls)
        share = busy.share()
        kernels = by_layer(*ticks.calls()[:2]) if ticks is not None else {}
    return {"ticks": len(samples.step) - 1, "busy": share, "figures": figures(samples, kernels)}


class Busy:
    """What other programs use of this machine's cores from here on."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of all cores, those of them at work, and those of this process; None where the system tells none."""
        try:
            fields = [int(field) for field in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        if len(fields) < 8:
            return None
        own = resource.getrusage(resource.RUSAGE_SELF)
        unit = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields) / unit, (sum(fields) - idle) / unit, own.ru_utime + own.ru_stime

    def share(self) -> float | None:
        """The part of all cores; None where the system does not tell it, or too little time has passed."""
        now = self._read()
        if now is None or self._before is None:
            return None
        total, working, own = (x - y for x, y in zip(now, self._before, strict=True))
        return max(0.0, (working - own) / total) if total > 0 else None


def preemptions() -> int:
    """How often the system took a core away from this process so far (involuntary context switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


if __name__ == "__main__":
    print(json.dumps(sit(json.load(sys.stdin))))
