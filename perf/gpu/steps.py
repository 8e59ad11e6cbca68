"""The steps of a run, each with a result of its own: of an engine (a preset in a precision), and of PyTorch beside it.

A job (jobs.py) is what one process does: the steps of an engine, or those of PyTorch for a preset. A step that fails
says why in its result, and the others go on; where the device is lost the process ends, and the next one goes on behind
that step.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bare
import brought
import checks
import floors
import numpy as np
import timing
import yaml
from jobs import PEERS, Job
from results import Results

import tmlc
from tmlc.errors import DeviceError, TargetError, UsageError
from tmlc.package.reader import open_package
from tmlc.runtimes.core.engine import Engine

TINY = Path(__file__).parent / "tiny.yaml"
LOST = 4  # exit code of a process whose device is lost

#: Steps and the most seconds that each may take before its process is ended.
ENGINE_STEPS = {
    "build": 500, "load": 120, "golden": 90, "bits": 60, "bandwidth": 30, "kernels": 120, "graphs": 60, "chains": 60,
    "cpu": 300, "ticks": 150, "ticks of four": 150, "ticks by methods": 150, "reference": 300,
}  # fmt: skip
PEER_STEPS = {"experts, 1 row": 180, "linear, 1 row": 120, "experts, 16 rows": 180, "linear, 16 rows": 120}


@dataclass(frozen=True)
class Settings:
    """What every job is told.

    Attributes:
        work: where checkpoints and packages are kept, and found again.
        sm: what engines are built for.
        rehearse: on a device in host memory, whose kernels are run by the "interpreter" or as "ptx"; "": on a GPU.
        effort: how much is measured.
        until: when no step is begun any more, in seconds of the clock.
        kernels: machine code that was brought along.
    """

    work: Path
    sm: int
    rehearse: str
    effort: timing.Effort
    until: float
    kernels: Path | None = None


def steps_of(job: str) -> dict[str, int]:
    return PEER_STEPS if job.endswith(f" {PEERS}") else ENGINE_STEPS


def run_job(job: str, settings: Settings, results: Results, only: list[str], tell: Callable[[str], None]) -> int:
    """The steps `only` of a job, in order. Returns 0, or LOST.

    Args:
        tell: gets the name of each step as it begins.
    """
    named = Job.parse(job)
    with ExitStack() as held:
        peers = named.precision == PEERS
        owner: Any = Torch(named.preset, settings) if peers else Subject(named, settings, results, held)
        for name in only:
            if time.time() > settings.until:
                return 0
            tell(name)
            begun = time.perf_counter()
            try:
                row = owner.run(name)
            except Exception as error:
                trace = [bare.relative(line) for line in traceback.format_exc().splitlines()[-12:]]
                results.put(job, name, {"error": f"{type(error).__name__}: {error}", "trace": trace})
                if isinstance(error, DeviceError):
                    return LOST
                continue
            results.put(job, name, row | {"took_seconds": round(time.perf_counter() - begun, 2)})
    return 0


class Subject:
    """An engine that is built, checked and timed.

    Args:
        held: closes what was opened.
    """

    def __init__(self, job: Job, settings: Settings, results: Results, held: ExitStack) -> None:
        self.job, self.name, self.preset, self.precision = job, job.name, job.preset, job.precision
        self.settings, self.results, self._held = settings, results, held
        self.checkpoint = settings.work / job.preset
        self.package = settings.work / f"{job.stem}-sm{settings.sm}.tmlc"
        self._engine: Engine | None = None
        self._known: dict[str, Any] = {}

    def run(self, step: str) -> dict[str, Any]:
        found: dict[str, Any] = getattr(self, f"_{step.replace(' ', '_')}")()
        return found

    # What the steps stand on, made when the first needs it.

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            if not self.package.exists():
                raise UsageError("the engine is not built", where=self.name, fix="run the step build first")
            self._engine = self._held.enter_context(load(self.package, self.settings.rehearse))
        return self._engine

    @property
    def backend(self) -> Any:
        return self.engine.backend

    @property
    def config(self) -> dict[str, Any]:
        if "config" not in self._known:
            self._known["config"] = json.loads((self.checkpoint / "config.json").read_text("utf-8"))["text_config"]
        found: dict[str, Any] = self._known["config"]
        return found

    @property
    def cuts(self) -> tuple[int, ...]:
        return (3, 2) if self.settings.rehearse else checks.CUTS

    @property
    def ids(self) -> list[int]:
        return checks.text(self.engine.model.vocab, sum(self.cuts))

    @property
    def rate(self) -> float:
        row = self.results.get(self.name, "bandwidth")
        if row is None:
            raise UsageError("the bandwidth is not measured", where=self.name, fix="run the step bandwidth first")
        return float(row["copy_bytes_per_second"])

    def streamed(self) -> np.ndarray:
        if "logits" not in self._known:
            self._known["logits"] = checks.streamed(self.engine, self.ids, self.cuts)
        found: np.ndarray = self._known["logits"]
        return found

    # The steps.

    def _build(self) -> dict[str, Any]:
        folder, settings = self.settings.kernels, self.settings
        code = None if folder is None else brought.bring(folder)
        made = create(self.preset, self.checkpoint)
        row = build(self.job, self.checkpoint, self.package, settings.sm, bool(settings.rehearse))
        if folder is not None and code is not None:
            code["variants"] = sum((folder / f"{name}.json").exists() for name in row["names"])
        del row["names"]
        return {"checkpoint_seconds": made, "machine_code_brought": code, **row}

    def _load(self) -> dict[str, Any]:
        begun = time.perf_counter()
        engine, driver = self.engine, self.backend.driver
        if engine.manifest.context.policy == "end":
            raise UsageError(
                "kernels that run again and again would leave a bounded context", fix="measure ring_with_sinks"
            )
        return {
            "seconds": time.perf_counter() - begun, "sessions": engine.slots.count, "bytes": self.backend.memory(),
            "device": asdict(driver.info) | {"memory_bytes": driver.memory()[1]},
        }  # fmt: skip

    def _golden(self) -> dict[str, Any]:
        return checks.golden(self.engine, self.package)

    def _bits(self) -> dict[str, Any]:
        return checks.bits(self.engine, [2, 2] if self.settings.rehearse else [5, 17, 3])

    def _bandwidth(self) -> dict[str, Any]:
        rate = timing.bandwidth(self.backend.driver, self.settings.effort.copy_bytes)
        return {"copy_bytes_per_second": rate}

    def _kernels(self) -> dict[str, Any]:
        effort, backend, least = self.settings.effort, self.backend, floors.least_share(self.config)
        self._fill()
        room, rows = timing.rotation(backend, least, effort), []
        for method, bucket in timing.measured(backend, effort):
            rows += timing.kernels(backend, method, bucket, self.rate, least, effort, room)
        self._clear()
        return {"rows": rows}

    def _graphs(self) -> dict[str, Any]:
        effort, backend, rows = self.settings.effort, self.backend, []
        alone: dict[tuple[str, str], float] = {}
        for row in (self.results.get(self.name, "kernels") or {"rows": []})["rows"]:
            key = row["method"], row["bucket"]
            alone[key] = alone.get(key, 0.0) + row["count"] * row["seconds"]
        self._fill()
        for method, bucket in timing.measured(backend, effort):
            parts = alone.get((method, f"b{bucket.batch}n{bucket.n}"))
            rows.append(timing.graph(backend, method, bucket, parts, self.rate, effort.times))
        self._clear()
        return {"rows": rows}

    def _chains(self) -> dict[str, Any]:
        effort, chains = self.settings.effort, self.backend.chains.glue if self.backend.chains is not None else ()
        self._fill()
        rows = [
            timing.chain(self.engine, chain, self.rate, effort.times)
            for chain in chains
            if chain.batch in effort.sessions and chain.batch <= self.engine.slots.count
        ]
        self._clear()
        least = {row["chain"]: row["weight_bytes"] / self.rate for row in rows if row["sessions"] == 1}
        waited = {row["chain"]: row["waited_seconds"] for row in rows if row["sessions"] == 1}
        return {"rows": rows, "tick_floor_ms": self._tick(least), "tick_ms": self._tick(waited)}

    def _tick(self, seconds: dict[str, float]) -> dict[str, float]:
        """Milliseconds of a tick that speaks and of a silent one, from those of its chains."""
        if not seconds:
            return {}
        speaking = seconds["listen"] + (self.engine.layout.text_out - 1) * seconds["write"] + seconds["speak"]
        return {"speaking": 1e3 * speaking, "silent": 1e3 * (seconds["listen"] + seconds["rest"])}

    def _ticks(self) -> dict[str, Any]:
        effort = self.settings.effort
        return timing.ticks(self.engine, effort.ticks, most_seconds=effort.most_seconds)

    def _ticks_of_four(self) -> dict[str, Any]:
        effort = self.settings.effort
        return timing.ticks(self.engine, max(1, effort.ticks // 10), 4, most_seconds=effort.most_seconds)

    def _ticks_by_methods(self) -> dict[str, Any]:
        effort = self.settings.effort
        return timing.ticks(self.engine, max(1, effort.ticks // 10), 1, True, effort.most_seconds)

    def _cpu(self) -> dict[str, Any]:
        """Against the CPU engine of the same checkpoint; that has no fp8, so there against its bf16."""
        from tmlc.emit.golden import TOLERANCE

        precision = "bf16" if self.precision == "fp8" else self.precision
        package = self.settings.work / f"{self.preset}-{precision}-cpu.tmlc"
        if not package.exists():
            tmlc.compile(self.checkpoint, package, precision=precision)
        with tmlc.load(package, sessions=1) as engine:
            wanted = checks.streamed(engine, self.ids, self.cuts)
        tolerance = max(TOLERANCE["bf16"], TOLERANCE[self.precision])
        return {"cpu_precision": precision, **checks.difference(self.streamed(), wanted, tolerance)}

    def _reference(self) -> dict[str, Any]:
        """Against the float64 model, whose weights are not quantised."""
        kept = self.settings.work / f"{self.preset}-reference.npy"
        if not kept.exists():
            np.save(kept, checks.reference_logits(self.checkpoint, self.ids))
        from tmlc.emit.golden import TOLERANCE

        return checks.difference(self.streamed(), np.load(kept), max(TOLERANCE["bf16"], TOLERANCE[self.precision]))

    def _fill(self) -> None:
        if self.settings.effort.fill:
            timing.fill(self.engine)

    def _clear(self) -> None:
        """Slots as new: what ran in them for measuring is no conversation."""
        for index in range(self.engine.slots.count):
            self.engine.slots.memory.zero(index)


class Torch:
    """PyTorch and transformers on the sizes of a preset."""

    def __init__(self, preset: str, settings: Settings) -> None:
        self.preset, self.settings = preset, settings

    def run(self, step: str) -> dict[str, Any]:
        import peers
        import torch

        if self.settings.rehearse:
            peers.ROTATED = 1
        elif not torch.cuda.is_available():
            fix = "run it with a PyTorch that is built for CUDA, on a machine with a GPU, or with --rehearse"
            raise TargetError("PyTorch sees no GPU", where=f"PyTorch {torch.__version__}", fix=fix)
        config = settings_of(self.preset)["text_config"]
        d, f = config["hidden_size"], config["moe_intermediate_size"]
        kind, _, rows = step.partition(", ")
        count, times = int(rows.split()[0]), self.settings.effort.times
        where = "cpu" if self.settings.rehearse else "cuda"
        versions = {"torch": torch.__version__, "device": where}
        if kind == "linear":
            sizes = {"q": (config["num_attention_heads"] * config["head_dim"], d), "head": (config["vocab_size"], d)}
            return versions | {name: peers.linear(m, k, count, times, where) for name, (m, k) in sizes.items()}
        every = config["n_routed_experts"] + config["n_shared_experts"]
        top = config["num_experts_per_tok"] + config["n_shared_experts"]  # tmlc's kernels run the shared ones too
        return versions | peers.experts(d, f, every, top, count, times, where)


# Building and loading.


def settings_of(preset: str) -> dict[str, Any]:
    """The configuration of a preset; `tiny` is the one beside this file."""
    if preset == "tiny":
        found: dict[str, Any] = yaml.safe_load(TINY.read_text("utf-8"))
        return found
    from tmlc.model_zoo.interaction import InteractionConfig

    return InteractionConfig.from_preset(preset).to_dict()


def create(preset: str, folder: Path) -> float:
    """A checkpoint with random weights; the seconds that it took, 0 where it was there."""
    from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint

    if (folder / "config.json").exists():
        return 0.0
    begun = time.perf_counter()
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was cut off
    create_checkpoint(InteractionConfig.from_dict(settings_of(preset)), 0, new)
    new.replace(folder)
    return time.perf_counter() - begun


def build(job: Job, checkpoint: Path, package: Path, sm: int, small: bool) -> dict[str, Any]:
    """Compiles an engine; needs no GPU. `small`: for few buckets only."""
    begun = time.perf_counter()
    steps = job.pipeline()
    if small:
        steps = steps.configure("memory.buckets", batch=[1, 4], positions=[1, 4])
    report = tmlc.compile(checkpoint, package, target=f"triton:sm{sm}", precision=job.precision, pipeline=steps)
    matches: Counter[str] = Counter()
    for record in report.passes:
        matches[record.name] += record.matches
    with open_package(package) as opened:
        code = opened.json(f"engines/triton/sm{sm}/code.json")
        producer = opened.manifest.producer
    return {
        "seconds": time.perf_counter() - begun, "stages": report.seconds, "package_bytes": package.stat().st_size,
        "variants": len(code["variants"]), "spilled": sum(v["spill_bytes"] > 0 for v in code["variants"]),
        "chains": len(code.get("chains", {})), "sm": sm, "producer": dict(producer), "matches": dict(matches),
        "names": [variant["name"] for variant in code["variants"]],
    }  # fmt: skip


@contextmanager
def load(package: Path, rehearse: str) -> Iterator[Engine]:
    """The engine on the GPU; for a rehearsal on a device in host memory, which runs its kernels as `rehearse` says."""
    if not rehearse:
        with tmlc.load(package, sessions=8) as engine:
            yield engine
        return
    from tmlc.emit.triton.host_device import HostDevice
    from tmlc.kernels.triton.ptx.host import PtxMachine
    from tmlc.kernels.triton.worker import open_interpreter
    from tmlc.runtimes.core.text import load_tokenizer
    from tmlc.runtimes.cuda.backend import CudaBackend

    with open_package(package) as opened:
        target = next(iter(opened.manifest.targets))
        sm = int(target.rpartition("sm")[2])
        # A file of holes: what nobody touches takes no memory.
        with PtxMachine(sm, 1 << 36) if rehearse == "ptx" else open_interpreter(1 << 36) as machine:
            backend = CudaBackend(opened, target, HostDevice.of(opened, machine, sm, nbytes=1 << 36))
            named = opened.manifest.tokenizer
            tokenizer = load_tokenizer(opened.read(named)) if named else None
            with Engine(backend, opened.manifest, opened.digest, tokenizer, 4) as engine:
                yield engine


def effort_of(rehearse: str, ticks: int, most_seconds: float) -> timing.Effort:
    """How much is measured."""
    return timing.REHEARSAL if rehearse else replace(timing.Effort(), ticks=ticks, most_seconds=most_seconds)
