"""Memory of a compilation in a fresh process: `python -m tmlc.report.compile_memory CHECKPOINT OUT` prints one JSON
line.

The peak is the kernel's own figure (VmHWM): everything resident at once, pages of mapped checkpoint files included.
What the interpreter has resident when PyTorch and the compiler are imported and nothing is opened is told beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import CheckError
from tmlc.processes import python_module
from tmlc.report.startup import peak_rss_bytes

if TYPE_CHECKING:
    from tmlc.model_zoo.interaction.config import InteractionConfig

#: Bytes of one expert layer of `wide_config` in bfloat16, and of what is there once (about).
_LAYER, _ONCE = 423_000_000, 350_000_000


def wide_config(nbytes: int) -> InteractionConfig:
    """The reference model, wide (32 experts of 2048 × 1024 a layer, stacks of 0.3 GB) and deep enough that a bfloat16
    checkpoint of it has about `nbytes`."""
    from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset

    layers = max(2, round((nbytes - _ONCE) / _LAYER))
    config = read_preset("nano")["config"]
    config["name"] = "wide"
    config["text_config"].update(
        vocab_size=32768, unpadded_vocab_size=32000, hidden_size=2048, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, swa_num_attention_heads=16,
        swa_num_key_value_heads=4, swa_head_dim=128, intermediate_size=4096, moe_intermediate_size=1024,
        n_routed_experts=32, num_experts_per_tok=4, n_shared_experts=1,
        layer_types=["hybrid_sliding" if (i + 1) % 6 else "hybrid" for i in range(layers)],
        mlp_layer_types=["sparse"] * layers,
    )  # fmt: skip
    return InteractionConfig.from_dict(config)


def create_wide_checkpoint(folder: Path, nbytes: int, shard_bytes: int = 2 << 30) -> Path:
    """Writes a sharded bfloat16 checkpoint of `wide_config(nbytes)`: one block of random numbers again and again, so
    that the disk and not the random generator decides how long it takes. For measuring only: it has no tokenizer."""
    import numpy as np
    import torch

    from tmlc.model_zoo.interaction.modeling import InteractionModel

    config = wide_config(nbytes)
    with torch.device("meta"):
        tensors = InteractionModel(config).state_dict()
    block = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    data = block.view(torch.int16).numpy().view(np.uint8).data
    shards: list[dict[str, int]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(shards[-1].values()) + 2 * tensor.numel() > shard_bytes:
            shards.append({})
        shards[-1][name] = 2 * tensor.numel()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), "utf-8")
    index = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, size in shard.items():
            index[name] = file_name
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size in shard.values():
                for begin in range(0, size, len(data)):
                    file.write(data[: min(len(data), size - begin)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    return folder


def measure_compile(checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    """Compiles in a fresh process: {seconds, peak_bytes, base_bytes, above_bytes}.

    Raises:
        CheckError: the compilation failed; its last line is in the message.
    """
    started = time.perf_counter()
    command = python_module("tmlc.report.compile_memory", checkpoint, out, precision)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise CheckError(f"the compilation failed: {last}", where=str(checkpoint), fix="run tmlc compile on it")
    return {"seconds": time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])}


def _child(checkpoint: str, out: str, precision: str) -> None:
    from tmlc.compiler import compile

    base = peak_rss_bytes()
    compile(checkpoint, out, precision=precision)
    peak = peak_rss_bytes()
    print(json.dumps({"peak_bytes": peak, "base_bytes": base, "above_bytes": peak - base}))


if __name__ == "__main__":
    _child(*sys.argv[1:4])
