"""What must be true of an engine on a device before its times mean anything: the right numbers, and the same bits in
any company and any cut. The same checks run in the tests on a device in host memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.report.verify import replay
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.session import Session

CUTS = (1, 3, 16, 7, 5, 32, 1, 15)


def golden(engine: Engine, package: Path) -> dict[str, Any]:
    """The recorded calls of the package, which eager PyTorch answered: `tmlc verify`."""
    view = replay(engine, package, lambda *_: None)
    keys = ("method", "calls", "max_error", "tolerance", "passed")
    return {"passed": view["passed"], "methods": [{key: row[key] for key in keys} for row in view["methods"]]}


def text(vocab: int, count: int = sum(CUTS)) -> list[int]:
    """The tokens that every engine is checked on."""
    return [int(v) for v in np.random.default_rng(7).integers(0, min(vocab, 250), count)]


def reference_logits(checkpoint: Path, ids: Sequence[int]) -> np.ndarray:
    """float64 [positions, vocab]: the PyTorch model of the checkpoint, every weight and activation in float64, over the
    whole sequence at once."""
    import torch

    from tmlc.model_zoo.interaction import load_model

    methods = {name: method.module.double() for name, method in load_model(checkpoint).methods().items()}
    with torch.no_grad():
        x = methods["embed_text"](torch.tensor(ids).reshape(-1, 1))
        logits: np.ndarray = methods["unembed"](methods["decode"](x)).numpy()
    return logits


def streamed(engine: Engine, ids: Sequence[int], cuts: Sequence[int]) -> np.ndarray:
    """Logits [positions, vocab] of a session that gets the tokens in pieces."""
    at, parts = 0, []
    with engine.session() as session:
        for count in cuts:
            count = min(count, engine.model.chunk)
            parts.append(session.append(tokens=ids[at : at + count]).copy())
            at += count
    return np.concatenate(parts)


def difference(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> dict[str, Any]:
    """How far logits are from others: the largest and the mean square difference, the others' own spread, the part of
    the positions that differ by more than `tolerance` of the largest (where a row takes another expert, that is no
    rounding any more), and the part whose best token is another."""
    wanted = wanted[: len(found)].astype(np.float64)
    off = np.abs(found.astype(np.float64) - wanted)
    beyond = (~(off.max(1) <= tolerance * np.abs(wanted).max())).mean()  # a NaN is beyond
    other = (found.argmax(1) != wanted.argmax(1)).mean()
    return {
        "positions": len(found), "max_error": float(off.max()), "rms_error": float(np.sqrt((off**2).mean())),
        "spread": float(wanted.std()), "tolerance": tolerance, "positions_beyond": float(beyond),
        "other_best_token": float(other), "finite": bool(np.isfinite(found).all()),
    }  # fmt: skip


def bits(engine: Engine, lengths: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Sessions with pasts of these lengths, then all of them in one call of `decode` with different numbers of new
    positions: hidden states and slots must be those that each has alone, with its past cut otherwise. `digest` is that
    of the hidden states, to compare engines by."""
    draw = np.random.default_rng(seed)
    pasts = [draw.integers(0, engine.model.vocab, n).tolist() for n in lengths]
    counts = [1 + k % 3 for k in range(len(lengths))]
    while sum(counts) > engine.model.chunk:
        counts[int(np.argmax(counts))] -= 1
    rows = [draw.standard_normal((n, engine.model.width)).astype(np.float32) for n in counts]
    alone = []
    for past, new in zip(pasts, rows, strict=True):
        with engine.session() as session:
            session.append(tokens=past, logits="none")
            alone.append((_decode(engine, [session], [new])[0].tobytes(), _slot(session)))
    sessions = [engine.session() for _ in lengths]
    try:
        for session, past in zip(sessions, pasts, strict=True):
            for at in range(0, len(past), 3):
                session.append(tokens=past[at : at + 3], logits="none")
        together = _decode(engine, sessions, rows)
        digest = hashlib.sha256(b"".join(h.tobytes() for h in together)).hexdigest()
        same = [h.tobytes() == a for h, (a, _) in zip(together, alone, strict=True)]
        slots = [_slot(session) == s for session, (_, s) in zip(sessions, alone, strict=True)]
    finally:
        for session in sessions:
            session.close()
    return {"sessions": len(lengths), "passed": all(same) and all(slots), "hidden": same, "states": slots,
            "digest": digest}  # fmt: skip


def _decode(engine: Engine, sessions: Sequence[Session], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    parts = [(len(new), engine.slots.handle(s.index)) for s, new in zip(sessions, rows, strict=True)]
    with engine.device():
        out = engine.backend.call("decode", parts, [np.concatenate(rows)])[0].copy()
    return np.split(out, np.cumsum([len(new) for new in rows])[:-1])


def _slot(session: Session) -> bytes:
    return session.engine.slots.memory.read(session.index)
