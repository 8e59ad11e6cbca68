"""Logs: JSON lines for machines, without content; and, only when asked for, the tick logs that hold all of it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from tmlc import json_text
from tmlc.errors import UsageError
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.surface import LogSink
from tmlc.runtimes.gateway.observer import Observer

LAST_RECORD = 256
"""Bytes of a tick log's bound that are left for the record that ends it."""
log = logging.getLogger("tmlc.serve")


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and what `extra={"facts": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            body |= facts
        if record.exc_info:
            body["error"] = self.formatException(record.exc_info)
        return json_text.dumps(body)


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Everything of tmlc goes to `stream` as JSON lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)  # a query may hold a resume token


def short(session: str) -> str:
    """Enough of a session's id to find its lines together, too little to guess the rest."""
    return session[:13]


class LogObserver(Observer):
    """Sessions and refusals as log lines; nothing of what was said."""

    def session_opened(self, session: str, dialect: str) -> None:
        log.info("session opened", extra={"facts": {"session": short(session), "dialect": dialect}})

    def session_ended(self, session: str, reason: str) -> None:
        log.info("session ended", extra={"facts": {"session": short(session), "reason": reason}})

    def session_resumed(self, session: str) -> None:
        log.info("session resumed", extra={"facts": {"session": short(session)}})

    def refused(self, reason: str) -> None:
        log.info("refused", extra={"facts": {"reason": reason}})

    def delegation(self, session: str, event: str, seconds: float) -> None:
        facts = {"session": short(session), "event": event, "seconds": round(seconds, 3)}
        log.info("delegation", extra={"facts": facts})


class TickLog:
    """The tick log of one session as JSON lines: what `tmlc replay` reads. Called by the device thread, and raises
    nothing into it.

    At `most` bytes, or when the disk takes no more, it ends with a record that says so, and the session goes on.

    Raises (when made) OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}.jsonl"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: FileIO | None = FileIO(descriptor, "w")
        self._most, self._size, self._tick = most - LAST_RECORD, 0, -1

    def __call__(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            line = _line(record)
            if self._size + len(line) > self._most:
                self._cut("bound", "a tick log has reached its bound and ends")
                return
            self._write(line)
        except OSError as error:
            self._cut("disk", f"a tick log could not be written and ends: {error.strerror}")
            return
        if record.get("event") == "tick":
            self._tick = int(record["tick"])
        elif record.get("event") == "end":
            self._file.close()
            self._file = None

    def _write(self, line: bytes) -> None:
        """Whole lines: what a full disk took of one is cut off by `_cut`."""
        assert self._file is not None
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) or 0 :]
        self._size += len(line)

    def _cut(self, reason: str, why: str) -> None:
        assert self._file is not None
        log.warning(why, extra={"facts": {"file": self._path.name}})
        try:
            self._file.seek(self._size)
            self._file.truncate()
            self._write(_line(ticklog.cut(self._tick, reason)))
            self._file.close()
        except OSError as error:  # its last line may be half a record then, which replay names
            log.warning("a tick log has no proper end", extra={"facts": {"file": self._path.name, "why": str(error)}})
        self._file = None


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


class TickLogs:
    """Makes a tick log for each session in a folder that nobody else can read.

    Raises (when made) UsageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, most: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            fix = "give a folder where this user may write"
            raise UsageError(f"tick logs cannot be kept there: {error.strerror}", where=str(folder), fix=fix) from None
        self._folder, self._most = folder, most

    def __call__(self) -> LogSink:
        """The log of one session; where the disk takes no file more, a warning, and one that writes nothing."""
        try:
            return TickLog(self._folder, self._most)
        except OSError as error:
            log.warning("a session has no tick log: %s", error.strerror)
            return lambda record: None
