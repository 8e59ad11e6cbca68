"""ONNX Runtime on what the stock exporter (optimum) makes of the checkpoint: a decoder with its cache as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import worker


class OnnxPeer:
    """Settings: `model` (an ONNX file), `threads`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = settings["threads"], 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(settings["model"], options, providers=["CPUExecutionProvider"])
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._names = set(inputs)
        self._past: dict[str, np.ndarray] = {}
        for name, spec in inputs.items():
            if name.startswith("past"):
                heads, size = spec.shape[1], spec.shape[3]
                self._past[name] = np.zeros((1, heads, 0, size), np.float32)
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._at, self._kept = 0, (0, self._past)

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        count = len(tokens)
        feed: dict[str, np.ndarray] = {"input_ids": np.array([tokens], np.int64), **self._past}
        if "attention_mask" in self._names:
            feed["attention_mask"] = np.ones((1, self._at + count), np.int64)
        if "position_ids" in self._names:
            feed["position_ids"] = np.arange(self._at, self._at + count)[None]
        out = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        self._past = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present")}
        self._at += count
        return out["logits"][0, -1]

    def keep(self) -> None:
        self._kept = (self._at, self._past)

    def reset(self) -> None:
        self._at, self._past = self._kept

    def facts(self) -> dict[str, Any]:
        return {"onnxruntime": ort.__version__, "exporter": "optimum-onnx", "weights": "float32"}


if __name__ == "__main__":
    worker.serve(OnnxPeer)
