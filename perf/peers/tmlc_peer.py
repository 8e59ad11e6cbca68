"""tmlc through its public API: `Engine.restore` for the cache, `Session.append` for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import worker

import tmlc


class TmlcPeer:
    """Settings: `model` (a package), `threads`, `huge_pages` (weights copied into large pages, or mapped)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        placed = {"huge_pages": settings["huge_pages"]}
        self._engine = tmlc.load(settings["model"], threads=settings["threads"], sessions=2, **placed)
        self._session = self._engine.session()
        self._kept = b""

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        return self._session.append(tokens=tokens, logits="last")[0]

    def keep(self) -> None:
        self._kept = self._session.snapshot()

    def reset(self) -> None:
        self._session.close()
        self._session = self._engine.restore(self._kept)

    def facts(self) -> dict[str, Any]:
        engine = self._engine
        where = "huge pages" if self._settings["huge_pages"] else "mapped"
        return {
            "tmlc": tmlc.__version__,
            "isa": engine.isa,
            "cache": "bfloat16",
            "weights": where,
            "package": engine.digest[:16],
        }


if __name__ == "__main__":
    worker.serve(TmlcPeer)
