"""One peer in a process of its own: it holds the model and a cache of `CACHED` positions, and does micro-turns.

A worker is started with its settings as one JSON argument, and then reads one JSON request a line from standard input
and writes one JSON answer a line. Between two requests it sleeps, so that workers can take turns on one machine.
Needs numpy only; each peer's file brings its own library.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

CACHED, APPENDED, DECODED = 2000, 16, 4
VOCAB, SEED = 8192, 4
COLD = np.ones(8 << 20)
"""64 MiB, read before each micro-turn: whatever a peer's reset left in the caches is gone when the clock starts."""


def token_stream() -> list[int]:
    """The tokens of every measurement: what is in the cache, what is appended, what is decoded.

    Decoding is fed from here, not from what was chosen, so that every peer visits the same experts.
    """
    return np.random.default_rng(SEED).integers(0, VOCAB, CACHED + APPENDED + DECODED).tolist()


class Peer(Protocol):
    """What a peer's file has to bring."""

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        """Adds the tokens to the cache; float32 [vocab]: the logits at the last of them."""

    def keep(self) -> None:
        """The cache as it is now is what `reset` returns to."""

    def reset(self) -> None:
        """The cache is again as `keep` found it; never inside a measurement."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings that belong beside the figures."""


def micro_turn(peer: Peer, tokens: list[int]) -> tuple[float, float]:
    """Seconds of the append, and of all decoded positions together."""
    peer.reset()
    COLD.sum()
    new = tokens[CACHED : CACHED + APPENDED]
    started = time.perf_counter()
    logits = peer.append(new)
    appended = time.perf_counter()
    for token in tokens[CACHED + APPENDED :]:
        int(np.argmax(logits))
        logits = peer.append([token])
    return appended - started, time.perf_counter() - appended


def answers(peer: Peer, tokens: list[int]) -> np.ndarray:
    """float32 [1 + DECODED, vocab]: the logits that a micro-turn sees."""
    peer.reset()
    rows = [np.array(peer.append(tokens[CACHED : CACHED + APPENDED]), np.float32)]
    rows += [np.array(peer.append([token]), np.float32) for token in tokens[CACHED + APPENDED :]]
    return np.stack(rows)


def serve(make: Callable[[dict[str, Any]], Peer]) -> None:
    """Runs a worker until its standard input ends. `make` gets the settings."""
    settings = json.loads(sys.argv[1])
    # The answers keep the real standard output; whatever a library prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**body: Any) -> None:
        channel.write(json.dumps(body) + "\n")

    try:
        started = time.perf_counter()
        peer, tokens = make(settings), token_stream()
        for at in range(0, CACHED, 500):
            peer.append(tokens[at : at + 500])
        peer.keep()
        micro_turn(peer, tokens)
        answer(ok=True, facts=peer.facts(), start_seconds=time.perf_counter() - started)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "turns":
                gc.disable()
                turns = [micro_turn(peer, tokens) for _ in range(request["count"])]
                gc.enable()
                answer(ok=True, append_ms=[1e3 * a for a, _ in turns], decode_ms=[1e3 * d / DECODED for _, d in turns])
            elif request["do"] == "logits":
                np.save(request["to"], answers(peer, tokens))
                answer(ok=True)
            else:
                answer(ok=False, error=f"no such request: {request['do']}")
    except Exception as error:  # told to the one who asked: a peer that cannot run the model is a finding
        traceback.print_exc()
        answer(ok=False, error=f"{type(error).__name__}: {error}")
        sys.exit(1)
