"""llama.cpp through llama-cpp-python's plain bindings: one sequence, its cache cut back between micro-turns."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp as c
import numpy as np
import worker


class LlamaPeer:
    """Settings: `model` (a GGUF file), `threads`, `flash` (true or false)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        c.llama_backend_init()
        self._log = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        load = c.llama_model_default_params()
        self._model = c.llama_model_load_from_file(settings["model"].encode(), load)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {settings['model']}")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 4096, 512, 512
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.flash_attn_type = 1 if settings["flash"] else 0
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context with these settings")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(512, 0, 1)
        self._settings, self._at, self._kept = settings, 0, 0

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        batch, count = self._batch, len(tokens)
        batch.n_tokens = count
        for k, token in enumerate(tokens):
            batch.token[k], batch.pos[k], batch.n_seq_id[k] = token, self._at + k, 1
            batch.seq_id[k][0], batch.logits[k] = 0, k == count - 1
        status = c.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode answers {status}")
        self._at += count
        return np.ctypeslib.as_array(c.llama_get_logits_ith(self._context, -1), shape=(worker.VOCAB,))

    def keep(self) -> None:
        self._kept = self._at

    def reset(self) -> None:
        if not c.llama_memory_seq_rm(self._memory, 0, self._kept, -1):
            raise RuntimeError("llama.cpp does not cut its cache back")
        self._at = self._kept

    def facts(self) -> dict[str, Any]:
        system = c.llama_print_system_info().decode()
        return {
            "llama-cpp-python": version("llama-cpp-python"),
            "system": system,
            "attention": "flash" if self._settings["flash"] else "plain",
            "cache": "float16",
        }


if __name__ == "__main__":
    worker.serve(LlamaPeer)
