"""The checkpoint as GGUF files for llama.cpp: bfloat16, Q8_0 and Q4_0, quantised by the `gguf` package itself.

Run in the environment of the peers: `python gguf_file.py CHECKPOINT OUT BF16|Q8_0|Q4_0`. Norms and routers stay
float32, as llama.cpp's own converter leaves them; everything else has the named type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

KINDS = {
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class Safetensors:
    """The tensors of a bfloat16 safetensors file as float32, read one by one."""

    def __init__(self, path: Path) -> None:
        size = int.from_bytes(path.open("rb").read(8), "little")
        with path.open("rb") as file:
            file.seek(8)
            self._head = json.loads(file.read(size))
        self._data = np.memmap(path, np.uint8, "r", 8 + size)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._head[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        bits = self._data[begin:end].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(entry["shape"])


def tensors(source: Safetensors, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Names as llama.cpp has them; the experts of a layer are one tensor [experts, out, in]."""
    yield "token_embd.weight", source["model.embed_tokens.weight"]
    yield "output_norm.weight", source["model.norm.weight"]
    yield "output.weight", source["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for theirs, ours in LAYER.items():
            yield f"blk.{layer}.{ours}.weight", source[f"{base}.{theirs}.weight"]
        experts = range(config.get("num_experts") or config["num_local_experts"])
        for theirs, ours in EXPERT.items():
            parts = [source[f"{base}.mlp.experts.{e}.{theirs}.weight"] for e in experts]
            yield f"blk.{layer}.{ours}.weight", np.stack(parts)


def write(checkpoint: Path, out: Path, kind: str) -> None:
    """Writes `out`, whole or not at all."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    form, file_type = KINDS[kind]
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    writer.add_name("peers")
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors(Safetensors(checkpoint / "model.safetensors"), config):
        plain = values.ndim == 1 or "ffn_gate_inp" in name
        dtype = gguf.GGMLQuantizationType.F32 if plain else form
        data = values if plain else quantize(values, form)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
