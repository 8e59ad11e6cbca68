"""The tick log: one JSON record for each thing that happened to a session, enough to do it all again.

A session's output depends on the package, the seed and this log only; `replay` proves it on another
engine. A live session's log also holds what the scheduler decided about it (`DECISIONS`); what a decision changed is in
the record of the tick (the missed inputs, the samples that were left), so replaying passes over it. A log that had to
end before its session says so in a last record, `cut`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import CheckError, InputError
from tmlc.runtimes.core.tick import TickInput, TickOutput

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

VERSION = 2
_READABLE = (1, 2)  # 1 knew neither injected, said nor missed input, nor decisions
DECISIONS = ("join", "late", "collapse", "missing", "dropped", "ladder", "detach", "attach", "end")
CUT = "cut"
"""The event of the last record of a log that ended before its session did."""
FIX = "give a tick log: `tmlc serve --record DIR` and Engine.session(log=...) write them"
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
        raise InputError(f"an array of the tick log cannot be read: {error}", fix=FIX) from None


def _field(record: Any, key: str, kind: Any) -> Any:
    if not isinstance(record, dict) or key not in record or not isinstance(record[key], kind):
        raise InputError(f"a record of the tick log has no usable {key!r}", fix=FIX)
    return record[key]


def _digest(audio: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(audio).data).hexdigest()


def opened(package: str, seed: int, temperature: float, tick: int, positions: int) -> dict[str, Any]:
    """The first record of a log."""
    return {
        "event": "open",
        "version": VERSION,
        "package": package,
        "seed": seed,
        "temperature": temperature,
        "tick": tick,
        "positions": positions,
    }


def appended(tokens: list[int], audio: np.ndarray | None, video: np.ndarray | None) -> dict[str, Any]:
    """The record of one append."""
    return {"event": "append", "tokens": tokens, "audio": _packed(audio), "video": _packed(video)}


def _input(given: TickInput) -> dict[str, Any]:
    """All that went into one tick."""
    return {
        "audio": _packed(given.audio),
        "video": _packed(given.video),
        "text": given.text,
        "tokens": [int(t) for t in given.tokens],
        "inject": [int(t) for t in given.inject],
        "say": [int(t) for t in given.say],
    }


def ticked(given: TickInput, out: TickOutput, missed: Sequence[TickInput]) -> dict[str, Any]:
    """The record of one tick: all that went into it and into the missed ticks before it, and what came out (the audio
    by its sha256)."""
    return {
        "event": "tick",
        "tick": out.index,
        **_input(given),
        "missed": [_input(late) for late in missed],
        "out_tokens": out.tokens,
        "out_text": out.text,
        "out_audio": _digest(out.audio),
    }


def decided(event: str, tick: int, **facts: Any) -> dict[str, Any]:
    """The record of a decision of the scheduler, one of `DECISIONS`, before the session's tick `tick`."""
    assert event in DECISIONS
    return {"event": event, "tick": tick, **facts}


def cut(tick: int, reason: str) -> dict[str, Any]:
    """The last record of a log that ends before its session: `tick` was the last one that it holds, -1 for none."""
    return {"event": CUT, "tick": tick, "reason": reason}


@dataclass(frozen=True, slots=True)
class Redone:
    """One tick that was done again.

    Attributes:
        record: what the log says of it.
        given, missed: what went into it, and into the missed ticks before it.
        output: what it gave now.
    """

    record: dict[str, Any]
    given: TickInput
    missed: list[TickInput]
    output: TickOutput

    def check(self) -> None:
        """Raises CheckError when the output is not the one that the log holds."""
        out = self.output
        got = {"tick": out.index, "out_tokens": out.tokens, "out_text": out.text, "out_audio": _digest(out.audio)}
        for key, value in got.items():
            if self.record.get(key) != value:
                fix = "replay on the kind of machine and version of tmlc that wrote the log, with its --portable-bits"
                raise CheckError(f"tick {out.index} gave another {key} than the log holds", fix=fix)


def redo(engine: Engine, records: Iterable[dict[str, Any]], snapshot: bytes | None = None) -> Iterator[Redone]:
    """Does a whole log again on `engine`, tick by tick; `snapshot` is where the log goes on from, if it does.
    A log that was cut is done up to there.

    Raises:
        InputError: the records are not a log, are of another package, or go on from a snapshot that is not this one.
    """
    iterator = iter(records)
    first = next(iterator, {})
    if not isinstance(first, dict) or first.get("event") != "open" or first.get("version") not in _READABLE:
        raise InputError("not a tick log: it does not begin with the opening of a session", fix=FIX)
    if first.get("package") != engine.digest:
        raise InputError("the tick log is of another package", fix="load the package that the log names")
    begins = (_field(first, "seed", int), _field(first, "tick", int), _field(first, "positions", int))
    if snapshot is None and begins[1:] != (0, 0):
        raise InputError(f"the tick log goes on from a snapshot at tick {begins[1]}", fix="give that snapshot, too")
    if snapshot is None:
        session = engine.session(begins[0], _field(first, "temperature", float))
    else:
        session = engine.restore(snapshot)
    with session:
        if begins != (session.seed, session.ticks, session.positions):
            raise InputError(
                f"the tick log does not go on from this snapshot, which is at tick {session.ticks}",
                fix=f"give the snapshot with which its session was opened, at tick {begins[1]}",
            )
        for record in iterator:
            event = _field(record, "event", str)
            if event in DECISIONS:
                continue
            if event == CUT:
                if next(iterator, None) is not None:
                    raise InputError(
                        "the tick log goes on after the record that ends it", fix="give its records up to that one"
                    )
                return
            if event == "append":
                given = _given(record)
                session.append(given.tokens, given.audio, given.video, logits="none")
                continue
            if event != "tick":
                raise InputError(f"unknown event {event[:40]!r} in the tick log", fix=FIX)
            missed = [_given(late) for late in _field(record, "missed", list)] if "missed" in record else []
            given = _given(record)
            (output,) = engine.tick_batch([session], [given], [missed])
            if isinstance(output, Exception):
                raise output
            yield Redone(record, given, missed, output)


def _given(record: Any) -> TickInput:
    """What `_input` wrote, or the record of an append."""
    tokens = _field(record, "tokens", list)
    audio, video = _unpacked(record.get("audio")), _unpacked(record.get("video"))
    text = _field(record, "text", str | None) if "text" in record else None
    later = {key: _field(record, key, list) for key in ("inject", "say") if key in record}
    return TickInput(audio, video, text, tokens, **later)


def replay(engine: Engine, records: Iterable[dict[str, Any]], snapshot: bytes | None = None) -> int:
    """Does a whole log again on `engine` and compares every tick's output. Returns the number of ticks, missed ones
    included.

    Raises:
        InputError: see `redo`.
        CheckError: a tick gave something else; it is named.
    """
    ticks = 0
    for redone in redo(engine, records, snapshot):
        redone.check()
        ticks += 1 + len(redone.missed)
    return ticks
