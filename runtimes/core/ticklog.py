"""The tick log: one JSON record for each thing that happened to a session, enough to do it all again.

A session's output depends on the package, the seed and this log only; `replay` proves it on another
engine.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import CheckError, InputError
from tmlc.runtimes.core.tick import Conversation, TickInput, TickOutput

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

VERSION = 1
_DTYPES = ("float32", "uint8")


def _packed(array: np.ndarray | None) -> dict[str, Any] | None:
    if array is None:
        return None
    data = base64.b64encode(np.ascontiguousarray(array).data).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _unpacked(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    try:
        if value["dtype"] not in _DTYPES:
            raise ValueError(value["dtype"])
        data = base64.b64decode(value["data"], validate=True)
        return np.frombuffer(data, value["dtype"]).reshape(value["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"an array of the tick log cannot be read: {error}") from None


def _field(record: Any, key: str, kind: Any) -> Any:
    if not isinstance(record, dict) or key not in record or not isinstance(record[key], kind):
        raise InputError(f"a record of the tick log has no usable {key!r}")
    return record[key]


def _digest(audio: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(audio).data).hexdigest()


def opened(package: str, talk: Conversation) -> dict[str, Any]:
    """The first record of a log."""
    return {
        "event": "open",
        "version": VERSION,
        "package": package,
        "seed": talk.seed,
        "temperature": talk.temperature,
        "tick": talk.tick,
        "positions": talk.positions,
    }


def appended(tokens: list[int], audio: np.ndarray | None, video: np.ndarray | None) -> dict[str, Any]:
    """The record of one append."""
    return {"event": "append", "tokens": tokens, "audio": _packed(audio), "video": _packed(video)}


def ticked(given: TickInput, out: TickOutput) -> dict[str, Any]:
    """The record of one tick: all that went in, and what came out (the audio by its sha256)."""
    return {
        "event": "tick",
        "tick": out.index,
        "audio": _packed(given.audio),
        "video": _packed(given.video),
        "text": given.text,
        "tokens": [int(t) for t in given.tokens],
        "out_tokens": out.tokens,
        "out_text": out.text,
        "out_audio": _digest(out.audio),
    }


def replay(engine: Engine, records: Iterable[dict[str, Any]]) -> int:
    """Does a whole log again on `engine` and compares every tick's output. Returns the number of ticks.

    Raises:
        InputError: the records are not a log that starts a session, or are of another package.
        CheckError: a tick gave something else; it is named.
    """
    iterator = iter(records)
    first = next(iterator, {})
    if (
        not isinstance(first, dict)
        or first.get("event") != "open"
        or first.get("version") != VERSION
        or first.get("positions")
    ):
        raise InputError("not a tick log from the start of a session")
    if first.get("package") != engine.digest:
        raise InputError("the tick log is of another package", fix="load the package that the log names")
    ticks = 0
    seed, temperature = _field(first, "seed", int), _field(first, "temperature", float)
    with engine.session(seed, temperature) as session:
        for record in iterator:
            event, tokens = _field(record, "event", str), _field(record, "tokens", list)
            audio, video = _unpacked(record.get("audio")), _unpacked(record.get("video"))
            if event == "append":
                session.append(tokens, audio, video)
                continue
            if event != "tick":
                raise InputError(f"unknown event {event[:40]!r} in the tick log")
            out = session.tick(TickInput(audio, video, _field(record, "text", str | None), tokens))
            got = {"out_tokens": out.tokens, "out_text": out.text, "out_audio": _digest(out.audio)}
            for key, value in got.items():
                if record.get(key) != value:
                    raise CheckError(f"tick {out.index} gave another {key} than the log holds")
            ticks += 1
    return ticks
