"""Made-up profiles in the JSON form of the current version: every part there, or none but what every profile has."""

from __future__ import annotations

from typing import Any

import numpy as np

from tmlc.report.latency import Budget, as_dict, growth, spread, turn_latency
from tmlc.report.profile.parts import PARTS

RUDE = "</script><script>alert(1)</script>\u202e<b>"
STAGES = {"decode": 14.0, "vocode": 3.1, "next_token": 1.9, "embed_audio": 0.7, "flow": 2.4, "embed_video": 0.6,
          "embed_text": 0.05, "decode[1]": 0.12}  # fmt: skip


def made_steps(count: int, slow: float = 0.0, scale: float = 1.0) -> dict[str, list[float]]:
    """Stages of `count` ticks in ms that grow by a twentieth; with `slow` one tick in fifty takes that much longer."""
    random = np.random.default_rng(7)
    grown = 1 + 0.05 * np.arange(count) / count
    stages = {n: scale * ms * grown * np.exp(0.03 * random.standard_normal(count)) for n, ms in STAGES.items()}
    stages["decode"][25::50] += slow
    return {name: column.round(4).tolist() for name, column in stages.items()}


def bare_profile(count: int = 649, slow: float = 0.0, scale: float = 1.0, budget_ms: float = 400.0) -> dict[str, Any]:
    """What a profile always has; all other parts are null."""
    stages = made_steps(count, slow, scale)
    between = [round(0.6 * scale + 0.01 * (k % 7), 4) for k in range(count)]
    step = [round(sum(column[k] for column in stages.values()) + between[k], 4) for k in range(count)]
    allowed, steps = Budget(budget_ms), spread(step)
    zeros = [0.0] * count

    def part(column: list[float]) -> dict[str, Any]:
        return {**as_dict(spread(column)), "share": sum(column) / sum(step)}

    return {
        "schema": 3, "package": "made/nano.tmlc", "digest": "c0ffee" * 10 + "abcd", "model": "nano",
        "machine": {"system": "Linux 6.1", "architecture": "x86_64", "cpu": "Some Processor 9000", "cores": 2,
                    "memory_bytes": 24 << 30, "python": "3.11.9", "isa": "v4", "threads": 2},
        "inputs": {"what": "made-up audio, video and text", "clock": "input", "seed": 0},
        "settings": {"target": "cpu", "precision": "bf16", "threads": None, "pin": False, "huge_pages": False,
                     "portable_bits": False},
        "ticks": count + 1, "seconds": (count + 1) / 5, "ticks_with_output": count, "first_tick_ms": 31.0 * scale,
        "step_ms": as_dict(steps), "first_audio_ms": as_dict(spread([0.8 * ms for ms in step])),
        "stages_ms": {name: part(column) for name, column in stages.items()},
        "wait_ms": part(zeros), "between_calls_ms": part(between), "turn_latency": turn_latency(steps, allowed),
        "missed_deadlines": sum(ms > allowed.step_ms for ms in step), "preempted": 3, "latest_start_ms": 0.0,
        "growth": growth([step[0], *step], 200.0),
        "bytes": {"weights": 412_000_000, "arena": 3_100_000, "scratch": 1_200_000, "slot": 21_000_000},
        "memory": {"peak_rss_bytes": 530_000_000, "resident_early_bytes": 500_000_000,
                   "resident_end_bytes": 501_000_000},
        "startup": None,
        **dict.fromkeys(PARTS), "not_measured": dict.fromkeys(PARTS, "it was made up"),
        "samples": {"every": 1, "step_ms": step, "wait_ms": zeros, "between_calls_ms": between,
                    "first_audio_ms": [round(0.8 * ms, 4) for ms in step], "stages_ms": stages},
    }  # fmt: skip


def a_call(method: str, index: int, op: str, layer: int | None, ms: float, nbytes: float, operations: float,
           runs: int = 65, bound: str = "bandwidth", weights: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    """A kernel call under ceilings of 29 GB/s and 400 GFLOP/s."""
    return {
        "method": method, "index": index, "op": op, "layer": layer, "weights": list(weights), "runs": runs, "ms": ms,
        "share": 0.0, "bytes": nbytes, "operations": operations, "gb_s": nbytes / ms / 1e6,
        "gflop_s": operations / ms / 1e6, "of_bandwidth": nbytes / ms / 1e6 / 29.0,
        "of_multiply": operations / ms / 1e6 / 400.0 if operations else None, "bound": bound,
    }  # fmt: skip


def made_kernels(layers: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parts kernels and memory_map of a decoder with so many layers."""
    calls, weights = [], []
    for layer in range(layers):
        for op, ms, nbytes, work, bound in (
            ("rms_norm", 0.004, 8e3, 0.0, "latency"),
            ("linear", 0.16, 4.2e6, 34e6, "bandwidth"),
            ("attention", 0.21, 3.1e6, 25e6, "bandwidth"),
            ("moe", 0.71, 18.6e6, 150e6, "bandwidth"),
        ):
            names = (f"layers.{layer}.{op}.weight",) if op in ("linear", "moe") else ()
            calls.append(a_call("decode", len(calls), op, layer, ms, nbytes, work, bound=bound, weights=names))
            weights += [{"what": "weights", "name": n, "layer": layer, "bytes": int(nbytes)} for n in names]
    calls.append(a_call("decode", len(calls), "linear", None, 0.9, 24e6, 200e6, weights=("head.weight",)))
    calls.append(a_call("vocode", 0, "conv", None, 2.9, 2.0e6, 30e6, bound="latency", weights=("vocoder.weight",)))
    calls.append(a_call("flow", 0, "linear", None, 0.55, 2.0e6, 150e6, runs=260, bound="multiply"))
    calls.append(a_call("next_token", 0, "head_sample", None, 1.8, 48e6, 48e6, weights=("head.weight",)))
    total = sum(c["runs"] * c["ms"] for c in calls)
    for call in calls:
        call["share"] = call["runs"] * call["ms"] / total
    weights.append({"what": "weights", "name": "head.weight", "layer": None, "bytes": 48_000_000})
    weights.append({"what": "weights", "name": "vocoder.weight", "layer": None, "bytes": 2_000_000})
    others = [("states", f"layers.{k}.kv", k, 1_750_000) for k in range(layers)]
    others += [("arena", "arena", None, 3_100_000), ("scratch", "scratch", None, 1_200_000)]
    rest = [{"what": w, "name": n, "layer": k, "bytes": b} for w, n, k, b in others]
    return {"every": 10, "ticks": 65, "calls": calls}, weights + rest


def made_sittings(scale: float = 1.0) -> dict[str, Any]:
    """Ten sittings that differ by half a percent."""
    figures = {"step": 23.0, "step p99": 25.0, "decode": 14.0, "embed_text": 0.05, "kernel decode/moe layers.1": 0.7}
    columns = {name: [scale * ms * (1 + 0.001 * (k * 7 % 5)) for k in range(10)] for name, ms in figures.items()}
    return {"ticks": 100, "figures": columns, "busy": [0.01] * 10}


def full_profile(**given: Any) -> dict[str, Any]:
    """A profile with every part, and with names that would be markup if they were not escaped."""
    view = bare_profile(**given)
    kernels, memory_map = made_kernels()
    passes = [
        {"pass": name, "config": {"level": k}, "matches": 3 * k, "ops_before": 900 - k,
         "ops_after": 890 - 9 * k}
        for k, name in enumerate(("fuse_router", "stack_experts", "merge_linears", "residual_norm"), 1)
    ]  # fmt: skip
    ablation = [
        {"pass": name, "p50_with_ms": 23.0, "p50_without_ms": 23.0 * (1 + change), "change": change,
         "interval": [change - 0.012, change + 0.012], "verdict": "slower" if change > 0.02 else "no difference",
         "note": ""}
        for name, change in (("stack_experts", 0.31), ("merge_linears", 0.062), ("residual_norm", 0.004),
                             ("fuse_router", -0.035))
    ]  # fmt: skip
    ablation.append({"pass": "state.insert", "p50_with_ms": 23.0, "p50_without_ms": None, "change": None,
                     "interval": None, "verdict": None, "note": "the engine needs it"})  # fmt: skip
    parts = {
        "kernels": kernels, "memory_map": memory_map, "passes": passes, "ablation": ablation,
        "ceilings": {"threads": 2, "read_gb_s": 29.0, "multiply": {"fp32": 190.0, "bf16": 400.0, "int8": 760.0},
                     "measured_ms": 310.0},
        "profiling_cost": {"p50_without_ms": 22.9, "p50_with_ms": 23.0, "ratio": 1.004, "interval": [0.998, 1.009]},
        "sessions_held": {"held": 11, "limit": "the step's p99", "tried": [
            {"sessions": n, "step_p99_ms": 18.0 + 12.4 * n, "fits": n <= 11} for n in (1, 2, 4, 8, 11, 12, 16)
        ]},
        "stop_latency": {"trials": 40, "stopped": 37, "p50_ms": 310.0, "p95_ms": 520.0, "max_ms": 610.0},
        "hesitation": {"ends": 40, "already_speaking": 2, "unanswered": 3, "count": 35, "p50": 120.0, "p95": 400.0,
                       "p99": 640.0, "max": 640.0, "mean": 160.0, "jitter": 90.0},
        "energy": {"source": "intel-rapl:0", "joules": 1830.0, "watts": 14.1, "joules_per_tick": 2.8,
                   "idle_watts": None},
        "instructions": {"per_tick_p50": 61_000_000, "per_tick_total": 40_000_000_000},
        "noise": {"preempted_per_tick": 0.004, "median_known_to": 0.004, "wanders_by": 0.01, "too_noisy": False,
                  "why": []},
        "scenario": {"name": f"two people {RUDE}", "sessions": 1, "loop": "closed", "background": {"threads": 0}},
        "sittings": made_sittings(),
        "quality": {"kl": 6.2e-4, "against": "float32", "scores": {
            "turn_taking": {"score": 0.82, "interval": [0.79, 0.85]}, RUDE: {"score": 0.4, "interval": None}}},
    }  # fmt: skip
    view.update(parts, model=f"nano {RUDE}", package=f"made/{RUDE}.tmlc", not_measured={})
    view["startup"] = {"runs": 3, "import_ms": 90.0, "load_ms": 210.0, "first_tick_ms": 40.0,
                       "load_and_first_tick_ms": 250.0, "process_ms": 400.0, "load_and_first_tick_max_ms": 270.0,
                       "peak_rss_bytes": 480_000_000}  # fmt: skip
    return view
