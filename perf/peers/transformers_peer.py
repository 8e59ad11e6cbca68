"""transformers with `grouped_mm` experts: eager with a growing cache, or `torch.compile` over a static one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
import worker

ROOM = 2048  # positions of the static cache


class TransformersPeer:
    """Settings: `model` (the checkpoint), `threads`, `compile`, `dtype` (the reference has "float32")."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        self._model.set_experts_implementation("grouped_mm")
        self._settings, self._compiled, self._at, self._kept = settings, settings["compile"], 0, 0
        self._call: Any = self._model
        self._copy: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self._compiled:
            self._call = torch.compile(self._model, dynamic=False)
            self._cache: Any = transformers.StaticCache(config=self._model.config, max_cache_len=ROOM)
        else:
            self._cache = transformers.DynamicCache(config=self._model.config)

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        count = len(tokens)
        positions = torch.arange(self._at, self._at + count)[None]
        # What fills the cache runs as it is: only the shapes of a micro-turn are compiled.
        call = self._call if count <= worker.APPENDED else self._model
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            out = call(ids, past_key_values=self._cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self._at += count
        return out.logits[0, -1].float().numpy()

    def keep(self) -> None:
        self._kept = self._at
        if self._compiled:
            self._copy = [
                (tensor, tensor.clone())
                for layer in self._cache.layers
                for tensor in vars(layer).values()
                if isinstance(tensor, torch.Tensor)
            ]

    def reset(self) -> None:
        added, self._at = self._at - self._kept, self._kept
        if not self._compiled:
            if added:
                self._cache.crop(-added)
            return
        with torch.inference_mode():
            for tensor, was in self._copy:
                tensor.copy_(was)

    def facts(self) -> dict[str, Any]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "experts": "grouped_mm",
            "dtype": self._settings["dtype"],
            "mode": "torch.compile, static cache" if self._compiled else "eager, growing cache",
        }


if __name__ == "__main__":
    worker.serve(TransformersPeer)
