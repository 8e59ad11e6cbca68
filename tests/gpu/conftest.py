"""Small packages for a GPU, and a device in host memory to run them: the very plan, the real runtime, no GPU.

Kernels are not compiled here: a variant's machine code is its name, by which the host device knows what to interpret.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("triton", reason="needs Triton (pip install 'tmlc[triton]')")

import tmlc
import tmlc.emit.triton.target as target
from tmlc.emit.triton.host_device import HostDevice
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.kernels.triton.worker import open_interpreter
from tmlc.model_zoo.interaction import InteractionConfig, create_checkpoint
from tmlc.package.reader import open_package
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.text import load_tokenizer
from tmlc.runtimes.cuda.backend import CudaBackend

for room in ("foreign", "conformance"):  # random_models.py and stored_codes.py; inkling2_models.py
    sys.path.insert(0, str(Path(__file__).parents[1] / room))

TARGET = "triton:sm90"
#: Few buckets, so that lowering and capturing stay quick: what they hold is cut into them.
BUCKETS = {"batch": [1, 4], "positions": [1, 4]}
TINY = yaml.safe_load((Path(__file__).parents[2] / "perf/gpu/tiny.yaml").read_text("utf-8"))


def named(variants, on_done=lambda done, total: None, jobs=None):
    """In place of `build_variants`: machine code that is the variant's name."""
    return {v: Compiled(variant_key(v).encode(), v.kernel, v.num_warps, 0, 32, 0, 2) for v in variants}


@contextmanager
def nothing_compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "build_variants", named)
        yield


def compile_for_gpu(
    checkpoint: Path,
    out: Path,
    precision: str = "fp32",
    name: str = TARGET,
    buckets: dict = BUCKETS,
    grouped_from: int = 2,  # the small buckets would never group experts otherwise
    **bounds,
) -> Path:
    steps = load_pipeline("triton").configure("memory.buckets", **buckets)
    steps = steps.configure("route.select_kernel", grouped_from=grouped_from)
    with nothing_compiled():
        tmlc.compile(checkpoint, out, target=name, precision=precision, pipeline=steps, **bounds)
    return out


def load_on_host(package, machine, sessions: int = 5, device: HostDevice | None = None) -> Engine:
    """The engine of a package on a host device; `load` with another driver."""
    opened = open_package(package)
    target = next(iter(opened.manifest.targets))
    sm = min(int(part[2:]) for part in target.partition(":")[2].split("+"))
    backend = CudaBackend(opened, target, device or HostDevice.of(opened, machine, sm))
    named = opened.manifest.tokenizer
    tokenizer = load_tokenizer(opened.read(named)) if named else None
    engine = Engine(backend, opened.manifest, opened.digest, tokenizer, sessions)
    engine._package = opened
    return engine


@pytest.fixture(scope="session")
def machine():
    with open_interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """The smallest interaction model: its checkpoint, and packages of it for the CPU and for a GPU, in float32."""
    base = tmp_path_factory.mktemp("tiny")
    create_checkpoint(InteractionConfig.from_dict(TINY), seed=3, out_dir=base / "checkpoint")
    tmlc.compile(base / "checkpoint", base / "cpu.tmlc", precision="fp32")
    compile_for_gpu(base / "checkpoint", base / "gpu.tmlc")
    return SimpleNamespace(checkpoint=base / "checkpoint", cpu=base / "cpu.tmlc", gpu=base / "gpu.tmlc")


@pytest.fixture(scope="session")
def parsed(tiny) -> SimpleNamespace:
    """The JSON of the tiny package's engine, and where its weights lie."""
    with open_package(tiny.gpu) as opened:
        plan, code = opened.json("engines/triton/plan.json"), opened.json("engines/triton/sm90/code.json")
        return SimpleNamespace(plan=json.dumps(plan), code=json.dumps(code), tensors=dict(opened.tensors))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seeded(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decode(engine, parts):
    """Hidden rows of each session, for as many positions of noise (which depends on their number only)."""
    width = engine.model.width
    rows = [np.random.default_rng(n).standard_normal((n, width)).astype(np.float32) for _, n in parts]
    slots = [(n, engine.slots.handle(session.index)) for session, n in parts]
    with engine.device():
        out = engine.backend.call("decode", slots, [np.concatenate(rows)])[0].copy()
    return np.split(out, np.cumsum([n for _, n in parts])[:-1])


SCRIPTS = ("bare", "brought", "checks", "claims", "command", "floors", "jobs", "peers", "results", "steps", "suspects",
           "timing")  # fmt: skip


@pytest.fixture
def perf(monkeypatch) -> Iterator[SimpleNamespace]:
    """The scripts of perf/gpu, as run.py imports them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "perf/gpu"))
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What tests here are made with: compile(checkpoint, out, precision, ...), load(package, machine, ...),
    decode(engine, [(session, positions), ...]), buckets."""
    return SimpleNamespace(
        compile=compile_for_gpu, load=load_on_host, buckets=BUCKETS, target=TARGET, nothing_compiled=nothing_compiled,
        config=TINY, decode=decode,
    )  # fmt: skip
