"""A tiny text model that is really trained: what the quality of quantised engines is measured on.

Random weights say little about rounding: their logits are nearly flat, and their layers have no large channels. This
model is an `InklingForCausalLM` (transformers) over bytes, with sliding and global layers, dense and expert layers,
trained with AdamW on the sources of Python's own standard library, which every machine that runs tmlc has. A minute
gives sharply uneven next-byte distributions (about 2 nats on text it has not seen) and weights shaped by gradients.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf

__all__ = ["TrainedText", "library_bytes", "train_text"]

CONFIG: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=32, sliding_window_size=32, d_rel=8,
    rel_extent=64, log_scaling_n_floor=64, local_layer_ids=[0, 2], intermediate_size=256, moe_intermediate_size=64,
    n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1, dense_mlp_idx=1, logits_mup_width_multiplier=1.0,
)  # fmt: skip
HELD_OUT = 4096  # bytes at the end that are never trained on


@dataclass(frozen=True)
class TrainedText:
    """The folder of the checkpoint, the held-out bytes, and the loss reached there (nats per byte)."""

    folder: Path
    held_out: list[int]
    loss: float
    steps: int
    seconds: float


def library_bytes(count: int = 1 << 20) -> torch.Tensor:
    """The first bytes of the standard library's modules, in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, total = [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total >= count:
            break
    return torch.frombuffer(bytearray(b"".join(parts)[:count]), dtype=torch.uint8).long()


def train_text(
    folder: str | Path,
    steps: int = 300,
    *,
    batch: int = 4,
    length: int = 64,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainedText:
    """Trains the model and writes its checkpoint (`save_pretrained`) into `folder`.

    Args:
        steps: of AdamW, with a learning rate that warms up and falls to a tenth.
        batch, length: windows of bytes a step, and bytes of each.
        on_step: gets (step, loss).
    """
    from transformers import InklingForCausalLM, InklingTextConfig

    torch.manual_seed(seed)
    config = InklingTextConfig(**CONFIG)
    config._attn_implementation = "eager"
    model = InklingForCausalLM(config).train()
    data = library_bytes()
    train, held_out = data[:-HELD_OUT], data[-HELD_OUT:]
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1, final_div_factor=0.4)
    started = time.perf_counter()
    for step in range(steps):
        begins = torch.randint(len(train) - length - 1, (batch,), generator=draw).tolist()
        windows = torch.stack([train[begin : begin + length + 1] for begin in begins])
        loss = _loss(model, windows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        final = _loss(model, held_out[: 1 + 16 * length].unfold(0, length + 1, length)).item()
    model.save_pretrained(folder)
    return TrainedText(Path(folder), held_out.tolist(), final, steps, seconds)


def _loss(model: Any, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nnf.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
