"""Sessions on disk, so that one can go on in another process: one file a session, named after the hash of its token.

A file holds what a stranger said; it is written with mode 0600 into a folder that the operator named, to a temporary
name first. Whoever has the token has the session: the file's name does not tell the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmlc.errors import SessionError

MAGIC = b"TMLCLIVE"
MAX_HEADER = 1 << 20
MAX_ENDED_BYTES = 256 << 20
"""Snapshots of ended sessions that are kept in memory, all together."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is needed to go on: the engine's snapshot, and what the gateway knows.

    Attributes:
        dialect: of the client that it had. config: of the session, as the dialect keeps it.
        last_event: number of the last event. expires: seconds since the epoch.
    """

    dialect: str
    config: dict[str, Any]
    last_event: int
    expires: float
    blob: bytes


class EndedSessions:
    """Sessions that ended and can be gone on with, in memory, for a server without a folder. The oldest make room."""

    def __init__(self, most: int = MAX_ENDED_BYTES) -> None:
        self._most, self._kept = most, dict[str, Kept]()

    def write(self, token: str, kept: Kept) -> None:
        """Keeps a session for its token; one that is larger than all that may be kept is not."""
        self._kept[name_of(token)] = kept
        now = time.time()
        for name in [name for name, kept in self._kept.items() if kept.expires <= now]:
            del self._kept[name]
        while sum(len(kept.blob) for kept in self._kept.values()) > self._most:
            del self._kept[next(iter(self._kept))]

    def take(self, token: str) -> Kept | None:
        """What is kept for the token, once."""
        kept = self._kept.pop(name_of(token), None)
        return kept if kept is not None and kept.expires > time.time() else None


def name_of(token: str) -> str:
    """The file name for a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest() + ".session"


class SnapshotStore:
    """A folder of snapshots. Its methods block: call them in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, token: str, kept: Kept) -> None:
        """Replaces what is kept for the token; whole or not at all."""
        facts = {key: value for key, value in asdict(kept).items() if key != "blob"}
        header = json.dumps(facts).encode()
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + struct.pack("<I", len(header)) + header + kept.blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name_of(token))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def take(self, token: str) -> Kept | None:
        """What is kept for the token, once: it is gone then. None: nothing, or it has expired.

        Raises SessionError: the file is damaged.
        """
        path = self.folder / name_of(token)
        claimed = path.with_suffix(f".{os.getpid()}.taken")
        try:
            os.rename(path, claimed)  # of two processes that come with one token, one gets it
        except FileNotFoundError:
            return None
        try:
            data = claimed.read_bytes()
        finally:
            claimed.unlink()
        kept = _read(data)
        return kept if kept.expires > time.time() else None

    def drop(self, token: str) -> None:
        """Forgets a session that has ended or got another token."""
        (self.folder / name_of(token)).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Removes what has expired; returns how many files that were."""
        gone = 0
        for path in self.folder.glob("*.session"):
            with contextlib.suppress(OSError, SessionError):
                with path.open("rb") as file:
                    expired = _header(file.read(MAX_HEADER))["expires"] <= time.time()
                if expired:
                    path.unlink()
                    gone += 1
        return gone


def _header(data: bytes) -> dict[str, Any]:
    try:
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError
        (size,) = struct.unpack_from("<I", data, len(MAGIC))
        if size > MAX_HEADER:
            raise ValueError
        start = len(MAGIC) + 4
        facts = json.loads(data[start : start + size])
        if (
            not isinstance(facts["dialect"], str)
            or not isinstance(facts["config"], dict)
            or type(facts["last_event"]) is not int
            or not isinstance(facts["expires"], int | float)
        ):
            raise ValueError
        return {**facts, "end": start + size}
    except (ValueError, KeyError, TypeError, struct.error, RecursionError):
        raise SessionError("a kept session is damaged", fix="start a new session") from None


def _read(data: bytes) -> Kept:
    facts = _header(data)
    return Kept(facts["dialect"], facts["config"], facts["last_event"], float(facts["expires"]), data[facts["end"] :])
