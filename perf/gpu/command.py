"""The command line of run.py: which steps are left, each job in a process that can be ended, and what came of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bare
import brought
import steps
import suspects
from claims import claims
from jobs import FORM, PEERS, Job
from results import Results, now

import tmlc
from tmlc.errors import CapacityError, TargetError, UsageError
from tmlc.kernels.triton.architectures import running
from tmlc.report.machine import installed, machine

RUN = Path(__file__).parent / "run.py"
LEFT, FAILED = 3, 1
OVER = "the command's time was over"  # no fault of the step, which is left for another command
GRACE = 5.0  # seconds behind the end in which a step may still end
JOBS = ("small bf16", "small bf16+overlap", "small fp8", "small fp8+overlap", f"small {PEERS}", "nano bf16",
        "nano fp8", "small int8", "small int4", "nano int8", "nano int4")  # fmt: skip
VERSIONS = ("torch", "triton", "transformers", "numpy", "cuda-bindings")


def device() -> tuple[int, str]:
    """The architecture that the GPU here runs, and "", or 0 and why there is none."""
    from tmlc.runtimes.cuda.nvidia import NvidiaDriver

    try:
        probe = NvidiaDriver()
    except (CapacityError, TargetError) as error:
        return 0, f"{error.what} ({error.fix})"
    info = probe.info
    probe.close()
    fits = running(info.architecture)
    return (fits[-1], "") if fits else (0, f"no kernels are compiled for {info.name}, which is sm{info.architecture}")


class Run:
    """The jobs of one command.

    Args:
        chosen: the command line.
        tell: prints a line.
    """

    def __init__(self, chosen: argparse.Namespace, tell: Callable[[str], None] = print) -> None:
        self.chosen, self.tell = chosen, tell
        self.until = time.time() + chosen.seconds
        here: tuple[int, str] = (chosen.sm, "") if chosen.rehearse else device()
        self.sm, self.why = here
        self.results = Results(chosen.out)
        self.tried: set[tuple[str, str]] = set()
        self.suspects: list[str] = []

    @property
    def jobs(self) -> list[str]:
        if self.chosen.bisect:
            return [self.chosen.bisect, *self.suspects]
        if self.chosen.rehearse:
            return self.chosen.job or ["tiny bf16", f"tiny {PEERS}"]
        return self.chosen.job or list(JOBS)

    def wanted(self, job: str) -> list[str]:
        """The steps of a job that are neither done nor tried by this command, and `build` where its package is gone."""
        if any((job, name) in self.tried and self.results.error(job, name) for name in ("build", "load")):
            return []  # nothing can follow
        left = [
            name for name in self.named(job) if self.results.get(job, name) is None and (job, name) not in self.tried
        ]
        gone = not any(self.chosen.work.glob(f"{Job.parse(job).stem}-sm*.tmlc"))
        if left and left[0] != "build" and "build" in steps.steps_of(job) and gone and (job, "build") not in self.tried:
            left.insert(0, "build")
        return left

    def named(self, job: str) -> list[str]:
        """The steps of a job that this command is about."""
        chosen = suspects.STEPS if self.chosen.bisect else self.chosen.step or steps.steps_of(job)
        every = [name for name in steps.steps_of(job) if name in chosen]
        return [name for name in every if name == "build"] if self.why else every

    def all(self) -> int:
        body = self.results.body
        body["runs"].append({
            "at": now(), "arguments": [bare.relative(arg) for arg in sys.argv[1:]], "machine": machine(),
            "tmlc": tmlc.__version__,
            "missing": bare.missing(), "rehearsal": bool(self.chosen.rehearse), "not run": self.why,
            "versions": {name: installed(name) for name in VERSIONS},
        })  # fmt: skip
        self.results.save()
        self._run(self.jobs)
        if self.chosen.bisect and suspects.fails(self.results, self.chosen.bisect):
            built = self.results.get(self.chosen.bisect, "build")
            self.suspects = suspects.suspects(self.chosen.bisect, built and built["matches"])
            self._run(self.suspects)
        return self._end()

    def _run(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            while (left := self.wanted(job)) and time.time() < self.until:
                self._process(job, left)

    def _process(self, job: str, left: list[str]) -> None:
        """One process for the steps of a job; ended when one of them takes too long, or at the end of the time."""
        chosen, limits = self.chosen, steps.steps_of(job)
        given = {"job": job, "steps": left, "sm": self.sm or chosen.sm, "until": self.until}
        command = [
            sys.executable, str(RUN), "--out", str(chosen.out), "--work", str(chosen.work), "--ticks",
            str(chosen.ticks), "--most-seconds", str(chosen.most_seconds), "--process", json.dumps(given),
            *(["--kernels", str(chosen.kernels)] if chosen.kernels else []),
            *(["--rehearse", chosen.rehearse] if chosen.rehearse else []),
        ]  # fmt: skip
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun: list[tuple[str, float]] = []

        def listen() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("step "):
                    begun.append((line[5:].strip(), time.time()))
                self.tell(f"{job}: {line.rstrip()}")

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        started, ended = time.time(), ""
        while child.poll() is None and not ended:
            time.sleep(0.1)
            name, since = begun[-1] if begun else (left[0], started)
            if time.time() > self.until + GRACE:
                ended = OVER
            elif time.time() - since > limits[name] and not chosen.rehearse:  # the interpreter is slow
                ended = f"it took more than {limits[name]} s"
        if ended:
            child.kill()
        child.wait()
        listener.join(5)
        self.results = Results(chosen.out)
        ran = [name for name, _ in begun]
        last = ran[-1] if ran else left[0]
        if ended or child.returncode not in (0, steps.LOST):
            if self.results.get(job, last) is None and ended != OVER:
                self.results.put(job, last, {"error": ended or f"its process ended with {child.returncode}"})
            ran.append(last)
        self.tried |= {(job, name) for name in ran}

    def _end(self) -> int:
        """Says what was found, and what is left."""
        found = claims(self.results)
        self.results.body["claims"] = found
        self.results.save()
        every = [(job, name) for job in self.jobs for name in self.named(job)]
        if self.why:
            self.tell(f"built for sm{self.chosen.sm}, and nothing was run: {self.why} ({self.chosen.out})")
            self.tell("  run it on a machine with a GPU")
            return FAILED
        for row in found:
            mark = {True: "met", False: "NOT MET", None: ""}[row["met"]]
            value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
            wanted = f" (wanted: {row['target']})" if row["target"] else ""
            self.tell(f"{row['job']}: {row['claim']}: {value}{wanted} {mark}".rstrip())
        if self.chosen.bisect:
            for line in suspects.verdict(self.results, self.chosen.bisect, self.suspects):
                self.tell(line)
        failed = [(job, name) for job, name in every if self.results.error(job, name)]
        for job, name in failed:
            self.tell(f"FAILED {job}, {name}: {self.results.error(job, name)}")
        left = [f"{job}, {name}" for job, name in every if not self.results.has(job, name)]
        if left:
            self.tell(f"left for another command: {'; '.join(left)}")
            return LEFT
        wrong = not self.chosen.rehearse and any(row["met"] is False for row in found)
        self.tell(f"{'not all is as wanted' if wrong or failed else 'done'}: {self.chosen.out}")
        return FAILED if wrong or failed else 0


def process(chosen: argparse.Namespace) -> int:
    """The child: some steps of one job."""
    given: dict[str, Any] = json.loads(chosen.process)
    effort = steps.effort_of(chosen.rehearse, chosen.ticks, chosen.most_seconds)
    settings = steps.Settings(chosen.work, given["sm"], chosen.rehearse, effort, given["until"], chosen.kernels)

    def tell(step: str) -> None:
        print(f"step {step}", flush=True)

    return steps.run_job(given["job"], settings, Results(chosen.out), given["steps"], tell)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python perf/gpu/run.py", description="Build, check and time engines on a GPU.")
    made.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON to write, or to go on with")
    job = f"{FORM}; may be given again. Default, in this order: {', '.join(JOBS)}"
    made.add_argument("--job", action="append", help=job)
    made.add_argument("--step", action="append", help=f"of {', '.join(steps.ENGINE_STEPS)}. Default: all")
    made.add_argument("--bisect", metavar="JOB", help="its golden and bits; where they fail, without one pass each")
    made.add_argument("--seconds", type=float, default=86_400.0, help="when to end, finished or not")
    made.add_argument("--ticks", type=int, default=10_000, help="whole ticks of one session")
    made.add_argument("--most-seconds", type=float, default=120.0, help="of each run of ticks")
    made.add_argument("--work", type=Path, default=bare.ROOT / "build/gpu", help="where checkpoints and packages lie")
    made.add_argument("--sm", type=int, default=90, help="what to build or rehearse for on a machine without a GPU")
    made.add_argument(
        "--rehearse", nargs="?", const="interpreter", default="", choices=["interpreter", "ptx"],
        help="no GPU: a device in host memory, by default with the smallest model; kernels run in Triton's interpreter,"
        " or as the PTX that they compile to",
    )  # fmt: skip
    made.add_argument("--make-kernels", type=Path, metavar="DIR", help="only compile kernels, for --kernels")
    made.add_argument("--kernels", type=Path, metavar="DIR", help="machine code that --make-kernels left there")
    made.add_argument("--process", help=argparse.SUPPRESS)
    return made


def check(chosen: argparse.Namespace) -> None:
    """Raises UsageError for jobs that are none."""
    if chosen.bisect and (chosen.job or chosen.step):
        raise UsageError("--bisect chooses jobs and steps itself", fix="leave out --job and --step")
    for name in chosen.job or filter(None, [chosen.bisect]):
        if (job := Job.parse(name)).precision != PEERS:
            job.pipeline()  # refuses passes that cannot be left out
        elif chosen.bisect:
            raise UsageError(f"{name} is no engine", where="--bisect", fix="name one, such as 'small bf16'")


def main(given: Sequence[str]) -> int:
    chosen = parser().parse_args(given)
    try:
        check(chosen)
    except UsageError as error:
        parser().error(str(error))
    chosen.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TMLC_CACHE", str(chosen.work / "cache"))
    if chosen.make_kernels:
        chosen.make_kernels.mkdir(parents=True, exist_ok=True)
        names = [chosen.bisect, *suspects.suspects(chosen.bisect)] if chosen.bisect else chosen.job or JOBS
        jobs = [job for job in map(Job.parse, names) if job.precision != PEERS]
        brought.make(chosen.make_kernels, jobs, chosen.sm, print)
        return 0
    return process(chosen) if chosen.process else Run(chosen).all()
