"""A small package of every kind of member, in both forms."""

from pathlib import Path

import numpy as np
import pytest

from tmlc.package import PackageWriter
from tmlc.package.manifest import (
    ContextInfo,
    Manifest,
    MemoryInfo,
    MethodInfo,
    ModelInfo,
    Signature,
    StateInfo,
    TargetInfo,
    TickLayout,
)

PLAN = "engines/cpu/plan.json"


def make_manifest(**changes: object) -> Manifest:
    fields = {
        "model": ModelInfo("nano", "interaction", {"config.json": "0" * 64}),
        "methods": (
            MethodInfo(
                "decode", (Signature("x", "f32", (1, 0), 8),), (Signature("y", "f32", (1, 0), 8),), 64
            ),
        ),
        "states": (StateInfo("position", "position", "decode", "i64", (1, 1), 0, 8),),
        "session_bytes": 64,
        "tick": TickLayout(duration_ms=200, audio_in=4, silence_level=-7.0),
        "context": ContextInfo(1024, "ring_with_sinks", 16, 64),
        "memory": MemoryInfo(704, 128, 0),
        "targets": {"cpu": TargetInfo(PLAN, "fp32", "k16")},
        "tolerances": {"atol": 1e-4, "rtol": 1e-4},
        "tokenizer": "tokenizer.json",
        "producer": {"tmlc": "0.1.0"},
        "pipeline": ({"pass": "state.insert", "matches": 3},),
        "required_features": ("cpu.plan.v1", "weights.k16"),
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


TENSORS = {
    "norm": np.arange(7, dtype=np.float32).reshape(1, 7),
    "head": np.arange(160, dtype=np.uint16).reshape(2, 80),
    "ids": np.arange(5, dtype=np.int32).reshape(5, 1),
}
DTYPES = {"norm": "f32", "head": "bf16", "ids": "i32"}


def write(path: Path, folder: bool = False, **changes: object) -> Path:
    with PackageWriter(path, folder) as writer:
        writer.add_json(PLAN, {"version": 1})
        writer.add_bytes("tokenizer.json", b"{}")
        writer.add_weights([(n, DTYPES[n], a.shape, lambda a=a: a) for n, a in TENSORS.items()])
        writer.finish(make_manifest(**changes))
    return path


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def package_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "m.tmlc", folder=request.param)
