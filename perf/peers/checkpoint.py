"""The checkpoint that every peer runs: a random Qwen3-MoE whose routing is spread over its experts.

Run in the environment of the peers: `python checkpoint.py FOLDER`. Writes FOLDER/checkpoint, FOLDER/checkpoint-4 (the
same weights with the config that transformers 4 reads, for the exporters) and FOLDER/routing.json.

A plain random initialisation sends most positions to the same few experts, because the layers' outputs drown what the
embeddings say about a position; an append then reads a third of the experts and every engine looks fast. Here the
embeddings are as large as what the layers add to the stream, and 16 positions touch about 25 of 32 experts.
routing.json has the count, from the routing that really happens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import worker
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": worker.VOCAB,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
}
THETA = 1e6


def make(folder: Path) -> None:
    """Writes the checkpoint in bfloat16, so that every peer starts from the same bits."""
    torch.manual_seed(worker.SEED)
    rope = {"rope_type": "default", "rope_theta": THETA}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG, rope_parameters=rope)).to(torch.bfloat16)
    random = torch.Generator().manual_seed(worker.SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, scale = 0.0, parameter.shape[-1] ** -0.5
            if name.endswith("norm.weight"):
                mean, scale = 1.0, 0.1
            elif "embed_tokens" in name:
                scale = 1.0
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float32)
            parameter.copy_(mean + scale * noise)
    model.save_pretrained(folder, max_shard_size="8GB")


def older(folder: Path, out: Path) -> None:
    """The same weights beside a config in the words of transformers 4."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("rope_parameters", "num_local_experts"):
        config.pop(name, None)
    config |= {
        "rope_theta": THETA,
        "num_experts": CONFIG["num_experts"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = out / "model.safetensors"
    weights.unlink(missing_ok=True)
    os.link(folder / "model.safetensors", weights)


def routing(folder: Path) -> dict[str, float]:
    """Mean number of different experts that a layer reads: for the append, and for one decoded position."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, out: chosen.append(out[2]))
    with torch.inference_mode():
        model(torch.tensor([worker.token_stream()]))
    if len(chosen) != CONFIG["num_hidden_layers"]:
        raise RuntimeError(f"the routers answered {len(chosen)} times, not once a layer")

    def touched(begin: int, count: int) -> float:
        return sum(len(c[begin : begin + count].unique()) for c in chosen) / len(chosen)

    return {
        "experts": CONFIG["num_experts"],
        "append": touched(worker.CACHED, worker.APPENDED),
        "decode": touched(worker.CACHED + worker.APPENDED, 1),
    }


if __name__ == "__main__":
    base = Path(sys.argv[1])
    make(base / "checkpoint")
    older(base / "checkpoint", base / "checkpoint-4")
    (base / "routing.json").write_text(json.dumps(routing(base / "checkpoint")), encoding="utf-8")
