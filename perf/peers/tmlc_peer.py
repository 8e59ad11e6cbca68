"""tmlc through its public API: `Engine.restore` for the cache, `Session.append` for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import worker

import tmlc


class TmlcPeer:
    """Settings: `model` (a package), `threads`, `path` ("session": the public API; "model": the layer below it)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = tmlc.load(settings["model"], threads=settings["threads"], sessions=2)
        self._session = self._engine.session()
        self._below = settings["path"] == "model"
        self._logits = np.zeros((1, worker.VOCAB), np.float32)
        self._kept = b""

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        if not self._below:
            return self._session.append(tokens=tokens, logits="last")[0]
        model = self._engine.model
        model.begin([self._session._slot])
        model.put_text([(0, tokens)])
        model.flush()
        model.logits(model.hidden[:1], self._logits)
        return self._logits[0]

    def keep(self) -> None:
        self._kept = self._session.snapshot()

    def reset(self) -> None:
        self._session.close()
        self._session = self._engine.restore(self._kept)

    def facts(self) -> dict[str, Any]:
        engine = self._engine
        return {"tmlc": tmlc.__version__, "isa": engine.isa, "cache": "bfloat16", "package": engine.digest[:16]}


if __name__ == "__main__":
    worker.serve(TmlcPeer)
