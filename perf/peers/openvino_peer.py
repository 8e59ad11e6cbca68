"""OpenVINO on the graph that optimum-intel exports for OpenVINO GenAI: the cache is a state of the compiled model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
import worker


class OpenvinoPeer:
    """Settings: `model` (an XML file), `threads`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        core = ov.Core()
        hints = {"INFERENCE_NUM_THREADS": settings["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self._model = core.compile_model(settings["model"], "CPU", hints)
        self._request = self._model.create_infer_request()
        self._names = {name for port in self._model.inputs for name in port.get_names()}
        self._at = self._kept_at = 0
        self._kept: list[np.ndarray] = []

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        count = len(tokens)
        feed: dict[str, np.ndarray] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._at + count), np.int64),
            "position_ids": np.arange(self._at, self._at + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: value for name, value in feed.items() if name in self._names}, share_inputs=True)
        self._at += count
        return self._request.get_tensor("logits").data[0, -1]

    def keep(self) -> None:
        self._kept_at = self._at
        self._kept = [np.array(state.state.data) for state in self._request.query_state()]

    def reset(self) -> None:
        self._at = self._kept_at
        for state, was in zip(self._request.query_state(), self._kept, strict=True):
            state.state = ov.Tensor(was)

    def facts(self) -> dict[str, Any]:
        precision = str(self._model.get_property("INFERENCE_PRECISION_HINT"))
        cache = str(self._model.get_property("KV_CACHE_PRECISION"))
        return {"openvino": ov.__version__, "exporter": "optimum-intel", "arithmetic": precision, "cache": cache}


if __name__ == "__main__":
    worker.serve(OpenvinoPeer)
