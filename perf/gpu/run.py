"""One command for a machine with a GPU: build the engines, check them, time them, write one JSON.

    python perf/gpu/run.py --preset small --precision bf16 --out perf/results/gpu-h200.json

It was run against a device in host memory only (tests/gpu/test_perf.py): no figure of a GPU is recorded yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # this folder is scripts, not a package

import checks
import timing

import tmlc
from tmlc.errors import UsageError
from tmlc.report.machine import installed, machine
from tmlc.runtimes.core.engine import Engine

CUTS = [1, 3, 16, 7, 5, 32, 1, 15]
BUCKETS = [(1, 1), (1, 4), (1, 16), (4, 1)]


def measure(
    engine: Engine, package: Path, checkpoint: Path, reference: np.ndarray, times: int, ticks: int, copy_bytes: int
) -> dict[str, Any]:
    """Checks and times one engine.

    Args:
        reference: float64 logits of the fixed text (`text`).
        times: runs of each kernel.
        ticks: whole ticks.
        copy_bytes: size of the copy that measures the bandwidth.
    """
    backend: Any = engine.backend
    if engine.manifest.context.policy == "end":
        raise UsageError(
            "kernels that run again and again would leave a bounded context", fix="measure ring_with_sinks"
        )
    ids, cuts = text(engine.model.vocab), [min(n, engine.model.chunk) for n in CUTS]
    out: dict[str, Any] = {
        "device": asdict(backend.driver.info) | {"memory_bytes": backend.driver.memory()[1]},
        "bytes": backend.memory(), "reproducible": checks.bits(engine, [5, 17, 3]),
        "golden": checks.golden(engine, package), "reference": checks.against_reference(engine, reference, ids, cuts),
    }  # fmt: skip
    rate = timing.bandwidth(backend.driver, copy_bytes)
    out["copy_bytes_per_second"] = rate
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))["text_config"]
    out["kernels"], out["graphs"] = [], []
    for method, plan in backend.plan.methods.items():
        for bucket in plan.buckets:
            if (bucket.batch, bucket.n) not in BUCKETS:
                continue
            chosen = config["num_experts_per_tok"] * bucket.batch * bucket.n + config["n_shared_experts"]
            share = min(1.0, chosen / (config["n_routed_experts"] + config["n_shared_experts"]))
            rows = timing.kernels(backend, method, bucket, rate, share, times)
            weights = sum(_weight_bytes(launch, backend, share) for launch in bucket.launches)
            alone = sum(row["seconds"] for row in rows)
            out["kernels"] += rows
            out["graphs"].append(timing.graph(backend, method, bucket, alone, weights, rate, times))
    for index in range(engine.slots.count):
        engine.slots.memory.zero(index)
    out["ticks"] = [timing.ticks(engine, ticks, count) for count in (1, 4)]
    return out


def _weight_bytes(launch: Any, backend: Any, share: float) -> int:
    kernel = backend.plan.variants[launch.variant].kernel
    sizes = [getattr(arg, "nbytes", 0) for arg in launch.args if getattr(arg, "space", "") == "weight"]
    return int(sum(sizes) * (share if kernel.startswith("moe_") else 1.0))


def text(vocab: int) -> list[int]:
    """The tokens that every engine is checked on."""
    return [int(v) for v in np.random.default_rng(7).integers(0, min(vocab, 250), sum(CUTS))]


def peers(checkpoint: Path, times: int) -> dict[str, Any]:
    """PyTorch and transformers on the same sizes; a reason where they cannot run."""
    import torch

    if not torch.cuda.is_available():
        return {"not run": "PyTorch sees no GPU"}
    import peers as torch_side

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))["text_config"]
    d, f = config["hidden_size"], config["moe_intermediate_size"]
    sizes = {"qkv": (config["num_attention_heads"] * config["head_dim"], d), "head": (config["vocab_size"], d)}
    made: dict[str, Any] = {"torch": torch.__version__, "transformers": installed("transformers")}
    for rows in (1, 4, 16):
        made[f"linear, {rows} rows"] = {n: torch_side.linear(m, k, rows, times) for n, (m, k) in sizes.items()}
        made[f"experts, {rows} rows"] = torch_side.experts(
            d, f, config["n_routed_experts"], config["num_experts_per_tok"], rows, times
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python perf/gpu/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", help="of the zoo; may be given again. Default: nano and small")
    parser.add_argument("--precision", action="append", help="may be given again. Default: bf16, fp8, int8, int4")
    parser.add_argument("--times", type=int, default=200, help="runs of each kernel")
    parser.add_argument("--ticks", type=int, default=1000, help="whole ticks")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    chosen = parser.parse_args()
    from tmlc.model_zoo.interaction import create_checkpoint
    from tmlc.runtimes.cuda.nvidia import NvidiaDriver

    probe = NvidiaDriver()
    sm = probe.info.architecture
    probe.close()
    body: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(),
        "tmlc": tmlc.__version__, "cuda_bindings": installed("cuda-bindings"), "engines": [], "peers": {},
    }  # fmt: skip
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        for preset in chosen.preset or ["nano", "small"]:
            folder = Path(scratch) / preset
            create_checkpoint(preset, 0, folder)
            reference = None
            for precision in chosen.precision or ["bf16", "fp8", "int8", "int4"]:
                package = Path(scratch) / f"{preset}-{precision}.tmlc"
                tmlc.compile(folder, package, target=f"triton:sm{sm}", precision=precision)
                with tmlc.load(package, sessions=8) as engine:
                    if reference is None:
                        reference = checks.reference_logits(folder, text(engine.model.vocab))
                    found = measure(engine, package, folder, reference, chosen.times, chosen.ticks, 1 << 30)
                passed &= found["golden"]["passed"] and found["reproducible"]["passed"]
                body["engines"].append({"preset": preset, "precision": precision, **found})
            body["peers"][preset] = peers(folder, chosen.times)
    chosen.out.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    print(f"{'passed' if passed else 'FAILED'}: {chosen.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
