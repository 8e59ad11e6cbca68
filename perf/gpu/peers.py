"""What PyTorch takes for the same products on the same device: eager, `torch.compile`, and the experts of transformers.

Imported only where PyTorch sees a GPU. Weights are random; only sizes count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Work = Callable[[], Any]


def seconds(work: Work, times: int) -> float:
    """One run, by the device's clock."""
    import torch

    for _ in range(5):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def linear(m: int, k: int, rows: int, times: int) -> dict[str, float]:
    """x · Wᵀ with W [m, k] in bfloat16."""
    import torch

    w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(torch.nn.functional.linear, mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        eager = seconds(lambda: torch.nn.functional.linear(x, w), times)
        return {"eager": eager, "compile": seconds(lambda: compiled(x, w), times)}


def experts(d: int, f: int, count: int, top_k: int, rows: int, times: int) -> dict[str, float]:
    """A mixture of experts of Qwen3-MoE in transformers, with the routes given: its eager, batched and grouped ways, and
    the grouped one under `torch.compile`."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    out: dict[str, float] = {}
    x = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16)
    routes = torch.stack([torch.randperm(count, device="cuda")[:top_k] for _ in range(rows)])
    weights = torch.full((rows, top_k), 1 / top_k, device="cuda", dtype=torch.bfloat16)
    for way in ("eager", "batched_mm", "grouped_mm"):
        config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=f, num_experts=count, num_experts_per_tok=top_k)
        config._experts_implementation = way
        with torch.device("cuda"):
            module = Qwen3MoeExperts(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)
            out[way] = seconds(lambda module=module: module(x, routes, weights), times)
            if way == "grouped_mm":
                compiled = torch.compile(module, mode="max-autotune-no-cudagraphs")
                out["grouped_mm, compiled"] = seconds(lambda: compiled(x, routes, weights), times)
        del module
    return out
