"""What PyTorch takes for the same products on the same device: eager, `torch.compile`, and the experts of transformers.

Imported only where PyTorch sees a GPU. Weights are random; only sizes count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Work = Callable[[], Any]


def seconds(work: Work, times: int, device: str) -> float:
    """One run, by the device's clock where it has one."""
    import torch

    for _ in range(5):
        work()
    if device != "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begun) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def compiled(work: Any, device: str) -> Any:
    """`torch.compile`, tuned where that is quick enough to wait for."""
    import torch

    return torch.compile(work, mode="max-autotune-no-cudagraphs") if device == "cuda" else torch.compile(work)


def linear(m: int, k: int, rows: int, times: int, device: str = "cuda") -> dict[str, float]:
    """x · Wᵀ with W [m, k] in bfloat16."""
    import torch

    w = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    fast = compiled(torch.nn.functional.linear, device)
    with torch.no_grad():
        eager = seconds(lambda: torch.nn.functional.linear(x, w), times, device)
        return {"eager": eager, "compile": seconds(lambda: fast(x, w), times, device)}


def experts(d: int, f: int, count: int, top_k: int, rows: int, times: int, device: str = "cuda") -> dict[str, float]:
    """A mixture of experts of Qwen3-MoE in transformers, with the routes given: its eager, batched and grouped ways,
    and the grouped one under `torch.compile`."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    out: dict[str, float] = {}
    x = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
    routes = torch.stack([torch.randperm(count, device=device)[:top_k] for _ in range(rows)])
    weights = torch.full((rows, top_k), 1 / top_k, device=device, dtype=torch.bfloat16)
    for way in ("eager", "batched_mm", "grouped_mm"):
        config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=f, num_experts=count, num_experts_per_tok=top_k)
        config._experts_implementation = way
        with torch.device(device):
            module = Qwen3MoeExperts(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)
            out[way] = seconds(lambda module=module: module(x, routes, weights), times, device)  # type: ignore[misc]
            if way == "grouped_mm":
                fast = compiled(module, device)
                out["grouped_mm, compiled"] = seconds(lambda fast=fast: fast(x, routes, weights), times, device)  # type: ignore[misc]
        del module
    return out
