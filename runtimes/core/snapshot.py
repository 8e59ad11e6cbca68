"""A session as bytes: everything it remembers, bound to the package it came from and sealed by a digest.

Layout: magic, length of the header (u32), header (JSON), slot, own last samples and last hidden state
(float32), sha256 of all before. Restoring gives the same session bit for bit, on any machine that loads
the same package.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from typing import Any

import numpy as np

from tmlc.errors import SessionError
from tmlc.runtimes.core.text import Tokenizer
from tmlc.runtimes.core.tick import MAX_QUEUED_TOKENS, Conversation

MAGIC = b"TMLCSNP1"
_NUMBERS = {"seed": 2**63 - 1, "tick": 2**53, "positions": 2**53}


def write_snapshot(slot: bytes, talk: Conversation, package: str, target: str) -> bytes:
    """The bytes of a session whose slot holds `slot`, and `talk`; `package` is the digest of its package."""
    header = {
        "package": package,
        "target": target,
        "slot_bytes": len(slot),
        "heard": talk.heard.shape[1],
        "hidden": talk.hidden.shape[1],
        "seed": talk.seed,
        "temperature": talk.temperature,
        "tick": talk.tick,
        "positions": talk.positions,
        "last_clip": talk.last_clip,
        "queue": list(talk.queue),
        "decoder": talk.decoder.state() if talk.decoder is not None else None,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    parts = [slot, talk.heard.tobytes(), talk.hidden.tobytes()]
    body = b"".join([MAGIC, struct.pack("<I", len(text)), text, *parts])
    return body + hashlib.sha256(body).digest()


def read_snapshot(
    blob: bytes,
    slot_bytes: int,
    talk: Conversation,
    package: str,
    target: str,
    tokenizer: Tokenizer | None,
    vocab: int,
) -> memoryview:
    """Fills `talk` from a snapshot of a model with `vocab` tokens, and gives back what its slot holds.

    Raises SessionError, with `talk` untouched, when the bytes are damaged, not a snapshot, or
    of another package or target.
    """
    header, body = _open(blob)
    for key, have in (("package", package), ("target", target)):
        if header.get(key) != have:
            raise SessionError(
                f"the snapshot is of another {key}: {str(header.get(key))[:16]}, not {have[:16]}",
                fix="load the package that the session came from",
            )
    sizes = {"slot_bytes": slot_bytes, "heard": talk.heard.shape[1], "hidden": talk.hidden.shape[1]}
    if any(header.get(key) != size for key, size in sizes.items()):
        raise _damaged("its sizes do not fit this engine")
    if len(body) != slot_bytes + talk.heard.nbytes + talk.hidden.nbytes:
        raise _damaged("its length does not fit its header")
    values = _values(header)
    # A token that the model has not would stop a kernel, and with it every session of the same batch.
    if max(values["queue"], default=0) >= vocab:
        raise _damaged("a queued token is not in the vocabulary")
    decoder = None
    if tokenizer is not None:
        decoder = tokenizer.decoder(values["decoder"] or ())
    data = np.frombuffer(body[slot_bytes:], np.uint8)
    for array in (talk.heard, talk.hidden):
        array.view(np.uint8).reshape(-1)[:] = data[: array.nbytes]
        data = data[array.nbytes :]
    talk.seed, talk.temperature, talk.tick = values["seed"], values["temperature"], values["tick"]
    talk.positions, talk.last_clip = values["positions"], values["last_clip"]
    talk.queue, talk.decoder = deque(values["queue"]), decoder
    return body[:slot_bytes]


def _damaged(why: str) -> SessionError:
    return SessionError(f"not a usable snapshot: {why}", fix="take it again with session.snapshot()")


def _open(blob: bytes) -> tuple[dict[str, Any], memoryview]:
    start = len(MAGIC) + 4
    if len(blob) < start + 32 or blob[: len(MAGIC)] != MAGIC:
        raise _damaged("it does not begin like one")
    body = memoryview(blob)[:-32]
    if hashlib.sha256(body).digest() != blob[-32:]:
        raise _damaged("it was cut short or altered")
    (length,) = struct.unpack_from("<I", blob, len(MAGIC))
    try:
        header = json.loads(bytes(body[start : start + length]))
    except (ValueError, RecursionError):
        raise _damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged("its header is not an object")
    return header, body[start + length :]


def _values(header: dict[str, Any]) -> dict[str, Any]:
    """The header's remembered values, each checked: the digest does not prove who made the snapshot."""
    out: dict[str, Any] = {key: header.get(key) for key in (*_NUMBERS, "temperature", "last_clip")}
    for key, most in _NUMBERS.items():
        if type(out[key]) is not int or not 0 <= out[key] <= most:
            raise _damaged(f"{key} is out of range")
    if type(out["temperature"]) is not float or not 0.0 <= out["temperature"] < 1e6:
        raise _damaged("temperature is out of range")
    clip = out["last_clip"]
    if clip is not None and (type(clip) is not int or not 0 <= clip < out["tick"]):
        raise _damaged("last_clip is not a tick before this one")
    for key in ("queue", "decoder"):
        value = header.get(key)
        if value is None:
            value = []
        tokens = isinstance(value, list) and all(type(v) is int and 0 <= v < 2**31 for v in value)
        if not tokens or len(value) > MAX_QUEUED_TOKENS:
            raise _damaged(f"{key} is not a list of tokens")
        out[key] = value
    return out
