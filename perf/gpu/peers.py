"""What PyTorch takes for the same products on the same device: eager, `torch.compile`, and the experts of transformers.

Times are of the device: one run by itself as a program calls it ("eager": where the host is too slow to keep the device
busy, that shows), and in a CUDA graph of many ("graph"), which leaves the host out as tmlc's graphs do. Weights are
random, and others each time, so that they come from memory. Imported only where PyTorch sees a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

Work = Callable[[], Any]
ROTATED = 256 << 20  # bytes of weights that are read before one is read again


def timed(works: Sequence[Work], times: int, device: str, graph: bool = True) -> dict[str, Any]:
    """Seconds of one of `works`, which do the same on different weights. `graph`: whether a graph can hold them."""
    out: dict[str, Any] = {"eager": _loop(works, times, device)}
    if device == "cuda":
        out["graph"] = _graph(works, times) if graph else None
    return out


def _loop(works: Sequence[Work], times: int, device: str) -> float:
    import torch

    runs = -(-times // len(works))
    for work in works[:5]:
        work()
    if device != "cuda":
        begun = time.perf_counter()
        for _ in range(runs):
            for work in works:
                work()
        return (time.perf_counter() - begun) / runs / len(works)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(runs):
        for work in works:
            work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / runs / len(works)


def _graph(works: Sequence[Work], times: int) -> float:
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for work in works[:3]:
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 64 // len(works))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for work in works:
                work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(max(1, min(5, times))):
        graph.replay()  # the device is busy with it while the host asks for the next, as where tmlc's kernels are timed
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, float(begin.elapsed_time(end)) / 1e3)
    return best / repeats / len(works)


def linear(m: int, k: int, rows: int, times: int, device: str = "cuda") -> dict[str, Any]:
    """x · Wᵀ with W [m, k] in bfloat16: seconds by way."""
    import torch

    count = max(1, min(64, -(-ROTATED // (2 * m * k)))) if device == "cuda" else 1
    w = [torch.randn(m, k, device=device, dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    fast = torch.compile(torch.nn.functional.linear)
    with torch.no_grad():
        plain = timed([lambda w=one: torch.nn.functional.linear(x, w) for one in w], times, device)  # type: ignore[misc]
        made = timed([lambda w=one: fast(x, w) for one in w], times, device)  # type: ignore[misc]
    return {"bytes": 2 * (m * k + rows * (m + k)), "eager": plain, "compile": made}


def experts(d: int, f: int, count: int, top_k: int, rows: int, times: int, device: str = "cuda") -> dict[str, Any]:
    """A mixture of experts of Qwen3-MoE in transformers, with the routes given: its eager, batched and grouped ways,
    and the grouped one under `torch.compile`. A way that fails says why, and the others go on."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    out: dict[str, Any] = {"bytes": 2 * 3 * d * f * min(count, top_k * rows)}
    x = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
    order = torch.randperm(count, device=device)
    # Other experts each time: sets of routes that share as few as they can.
    routes = [
        torch.stack([order[(torch.arange(top_k, device=device) + top_k * (rows * s + r)) % count] for r in range(rows)])
        for s in range(max(1, count // (top_k * rows)))
    ]
    weights = torch.full((rows, top_k), 1 / top_k, device=device, dtype=torch.bfloat16)
    for way in ("grouped_mm", "grouped_mm, compiled", "batched_mm", "eager"):
        config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=f, num_experts=count, num_experts_per_tok=top_k)
        config._experts_implementation = way.partition(",")[0]
        try:
            with torch.device(device):
                module: Any = Qwen3MoeExperts(config).to(torch.bfloat16)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_(0, 0.02)
                run = torch.compile(module) if way.endswith("compiled") else module
                works = [lambda run=run, r=r: run(x, r, weights) for r in routes]
                # The eager way asks the device which experts were chosen: no graph can hold that, and a capture that
                # fails leaves PyTorch's random numbers unusable in this process.
                out[way] = timed(works, times, device, graph=way != "eager")
        except Exception as error:
            out[way] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"}
    return out
