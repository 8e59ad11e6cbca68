"""One command for a machine with a GPU: build the engines, check them, time them, write one JSON.

    python perf/gpu/run.py --preset small --precision bf16 --out perf/results/gpu-h200-small-bf16.json

One preset and precision a command take well under ten minutes by the bounds set here; times were measured nowhere. On a
machine without a GPU it builds the engines for `--sm`, says what was not run, and ends with 1. It was run against a
device in host memory only (tests/gpu/test_perf.py): no figure of a GPU is recorded yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # this folder is scripts, not a package

import checks
import timing

import tmlc
from tmlc.errors import TargetError, UsageError
from tmlc.package.reader import open_package
from tmlc.report.machine import installed, machine
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.cuda.chains import Chain, Link

CUTS = [1, 3, 16, 7, 5, 32, 1, 15]
BUCKETS = [(1, 1), (1, 4), (1, 16), (4, 1)]


def measure(
    engine: Engine,
    package: Path,
    checkpoint: Path,
    reference: np.ndarray,
    times: int,
    ticks: int,
    copy_bytes: int,
    most_seconds: float = 120.0,
) -> dict[str, Any]:
    """Checks and times one engine.

    Args:
        reference: float64 logits of the fixed text (`text`).
        times: runs of each kernel.
        ticks: whole ticks of one session; a tenth of them for four, and method by method.
        copy_bytes: size of the copy that measures the bandwidth.
        most_seconds: of each run of ticks.
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
            share = _share(config, bucket)
            rows = timing.kernels(backend, method, bucket, rate, share, times)
            weights = sum(_weight_bytes(launch, backend, share) for launch in bucket.launches)
            alone = sum(row["seconds"] for row in rows)
            out["kernels"] += rows
            out["graphs"].append(timing.graph(backend, method, bucket, alone, weights, rate, times))
    out["chains"] = [
        timing.chain(backend, chain, _chain_weights(chain, backend, config), rate, times)
        for chain in (backend.chains.glue if backend.chains is not None else ())
        if chain.batch in (1, 4)
    ]
    for index in range(engine.slots.count):
        engine.slots.memory.zero(index)
    few = max(1, ticks // 10)
    runs = [(ticks, 1, False), (few, 4, False), *([(few, 1, True)] if backend.chains is not None else [])]
    out["ticks"] = [timing.ticks(engine, *run, most_seconds) for run in runs]
    floors = {row["chain"]: row["weight_bytes"] / rate for row in out["chains"] if row["sessions"] == 1}
    if floors:
        writes = engine.layout.text_out - 1
        speaking = floors["listen"] + writes * floors["write"] + floors["speak"]
        out["tick_floor_ms"] = {"speaking": 1e3 * speaking, "silent": 1e3 * (floors["listen"] + floors["rest"])}
    return out


def _share(config: dict[str, Any], bucket: Any) -> float:
    """The part of the experts that a call reads at most."""
    chosen = config["num_experts_per_tok"] * bucket.batch * bucket.n + config["n_shared_experts"]
    return min(1.0, chosen / (config["n_routed_experts"] + config["n_shared_experts"]))


def _chain_weights(chain: Chain, backend: Any, config: dict[str, Any]) -> int:
    """Bytes of weights that a chain's methods must read, each time that they run."""
    total = 0
    for link in chain.links:
        if isinstance(link, Link):
            found = backend.plan.methods[link.method].buckets
            bucket = next(b for b in found if (b.batch, b.n) == (chain.batch, link.n))
            total += sum(_weight_bytes(launch, backend, _share(config, bucket)) for launch in bucket.launches)
    return total


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


def build(folder: Path, package: Path, sm: int, precision: str) -> dict[str, Any]:
    """Compiles an engine; needs no GPU."""
    begun = time.perf_counter()
    tmlc.compile(folder, package, target=f"triton:sm{sm}", precision=precision)
    with open_package(package) as opened:
        code = opened.json(f"engines/triton/sm{sm}/code.json")
    return {
        "seconds": time.perf_counter() - begun, "package_bytes": package.stat().st_size,
        "variants": len(code["variants"]), "spilled": sum(v["spill_bytes"] > 0 for v in code["variants"]),
        "chains": len(code.get("chains", {})),
    }  # fmt: skip


def device() -> tuple[int, str]:
    """The architecture of the GPU here, and "", or 0 and why there is none."""
    from tmlc.runtimes.cuda.nvidia import NvidiaDriver

    try:
        probe = NvidiaDriver()
    except TargetError as error:
        return 0, error.what
    sm = probe.info.architecture
    probe.close()
    return sm, ""


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python perf/gpu/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", help="of the zoo; may be given again. Default: nano and small")
    parser.add_argument("--precision", action="append", help="may be given again. Default: bf16, fp8, int8, int4")
    parser.add_argument("--times", type=int, default=200, help="runs of each kernel")
    parser.add_argument("--ticks", type=int, default=10_000, help="whole ticks")
    parser.add_argument("--most-seconds", type=float, default=120.0, help="of each run of ticks")
    parser.add_argument("--sm", type=int, default=90, help="what to build for on a machine without a GPU")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    chosen = parser.parse_args(given)
    from tmlc.model_zoo.interaction import create_checkpoint

    here, reason = device()
    body: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(),
        "tmlc": tmlc.__version__, "triton": installed("triton"), "cuda_bindings": installed("cuda-bindings"),
        "engines": [], "peers": {},
    }  # fmt: skip
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        for preset in chosen.preset or ["nano", "small"]:
            folder = Path(scratch) / preset
            create_checkpoint(preset, 0, folder)
            reference = None
            for precision in chosen.precision or ["bf16", "fp8", "int8", "int4"]:
                package = Path(scratch) / f"{preset}-{precision}.tmlc"
                made = build(folder, package, here or chosen.sm, precision)
                row = {"preset": preset, "precision": precision, "build": made}
                body["engines"].append(row)
                if reason:
                    continue
                with tmlc.load(package, sessions=8) as engine:
                    if reference is None:
                        reference = checks.reference_logits(folder, text(engine.model.vocab))
                    row |= measure(
                        engine, package, folder, reference, chosen.times, chosen.ticks, 1 << 30, chosen.most_seconds
                    )
                passed &= row["golden"]["passed"] and row["reproducible"]["passed"]
            body["peers"][preset] = peers(folder, chosen.times)
    if reason:
        body["not run"] = reason
    chosen.out.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    if reason:
        print(f"built for sm{chosen.sm}, and nothing was run: {reason} ({chosen.out})")
        print("  run it on a machine with a GPU")
        return 1
    print(f"{'passed' if passed else 'FAILED'}: {chosen.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
