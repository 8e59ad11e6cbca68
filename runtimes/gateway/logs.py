"""Logs: JSON lines for machines, without content; and, only when asked for, the tick logs that hold all of it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any, TextIO

from tmlc.runtimes.gateway.observer import Observer

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
        return json.dumps(body, ensure_ascii=False)


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
    """The tick log of one session as JSON lines: what `tmlc replay` reads. Called by the device thread only.

    At `most` bytes it ends with a record that says so; the session goes on.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}.jsonl"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: TextIO | None = os.fdopen(descriptor, "w", encoding="utf-8")
        self._left = most

    def __call__(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(record) + "\n"
        self._left -= len(line)
        if self._left < 0:
            log.warning("a tick log has reached its bound and ends", extra={"facts": {"file": self._path.name}})
            self._file.close()
            self._file = None
            return
        self._file.write(line)
        if record.get("event") != "tick":
            self._file.flush()
        if record.get("event") == "end":
            self._file.close()
            self._file = None


class TickLogs:
    """Makes a tick log for each session in a folder that nobody else can read."""

    def __init__(self, folder: Path, most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._most = folder, most

    def __call__(self) -> TickLog:
        return TickLog(self._folder, self._most)
