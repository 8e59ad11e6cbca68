"""The settings of `tmlc serve`: a strict YAML file, command-line options over it, what makes sense together."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tmlc.errors import UsageError, first_problem
from tmlc.yaml_text import YamlFault, parse_yaml

MAX_FILE = 1 << 20


class Caps(BaseModel):
    """What one key may use; every session of a server without keys counts as one key's.

    Attributes:
        sessions: of one key at a time, those that wait for their client included; twice as many sockets.
        frames, messages, bytes: a second, of each connection, on average; twice as much at once, so that a message of
            more than twice `bytes` is always refused.
        image_bytes, image_pixels: of one picture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: int = Field(1024, ge=1, le=65536)
    frames: float = Field(5.0, gt=0, le=1000)
    messages: float = Field(200.0, gt=0, le=100_000)
    bytes: float = Field(4 << 20, ge=1024, le=1 << 30)
    image_bytes: int = Field(2 << 20, ge=1024, le=3 << 20)
    image_pixels: int = Field(4 << 20, ge=1024, le=1 << 28)


class ServeSettings(BaseModel):
    """All of it.

    Attributes:
        host, port: where clients connect; port 0 takes a free one.
        admin_host, admin_port: of /livez, /readyz and /metrics; None for no admin port.
        admin_open: the admin port, which has no keys, may be reached from other machines.
        model, aliases: names that clients ask for; None takes the package's.
        sessions, threads, pin, huge_pages: of the engine.
        keys: file of bearer keys; origins: of pages that may connect beside our own.
        caps: see `Caps`.
        resume_window: seconds for which a session without a client keeps its slot.
        snapshots: folder in which sessions are kept, so that they outlive this process.
        record: folder of tick logs, which hold all that was said; record_bytes: of one log, then it ends.
        background: settings of the background room.
        certificate, private_key: of TLS.
        drain: seconds that sessions get to end by themselves after SIGTERM.
        trace: endpoint of OpenTelemetry (OTLP over HTTP); trace_ticks: one tick in so many gets a span.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(9000, ge=0, le=65535)
    admin_open: bool = False
    model: str | None = Field(None, min_length=1, max_length=256)
    aliases: tuple[str, ...] = Field((), max_length=64)
    sessions: int = Field(16, ge=1, le=65536)
    threads: int | None = Field(None, ge=1, le=256)
    pin: bool = False
    huge_pages: bool = False
    keys: Path | None = None
    origins: tuple[str, ...] = Field((), max_length=256)
    caps: Caps = Field(default_factory=lambda: Caps.model_validate({}))
    resume_window: float = Field(30.0, ge=0, le=3600)
    snapshots: Path | None = None
    record: Path | None = None
    record_bytes: int = Field(256 << 20, ge=1 << 16)
    background: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    drain: float = Field(10.0, ge=0, le=3600)
    trace: str | None = None
    trace_ticks: int = Field(25, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _sensible(self) -> ServeSettings:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("TLS needs both certificate and private_key")
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.rstrip("/").count("/") != 2:
                raise ValueError("an origin is a scheme, a host and perhaps a port, like https://app.example")
        if self.trace is not None and not self.trace.startswith(("http://", "https://")):
            raise ValueError("spans go to a URL, like http://127.0.0.1:4318/v1/traces")
        return self

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def read_settings(path: Path | None, options: dict[str, Any]) -> ServeSettings:
    """The file's settings with `options` (those that were given) over them.

    Raises UsageError: unreadable, not YAML, unknown or wrong entries.
    """
    given: Any = {}
    fix = "write a YAML mapping of settings; see docs/operations.md"
    if path is not None:
        try:
            data = path.read_bytes()
            if len(data) > MAX_FILE:
                raise UsageError("the settings are longer than any should be", where=str(path), fix=fix)
            given = parse_yaml(data) or {}
        except OSError as error:
            what = f"the settings cannot be read: {error.strerror}"
            raise UsageError(what, where=str(path), fix="check the path") from None
        except YamlFault as error:
            raise UsageError("the settings are not YAML", where=error.within(path), fix=fix) from None
        if not isinstance(given, dict):
            raise UsageError("the settings are no mapping", where=str(path), fix=fix)
    try:
        return ServeSettings.model_validate({**given, **options})
    except ValidationError as error:
        where = "" if path is None else str(path)
        raise UsageError(first_problem(error, "the settings"), where=where, fix="see docs/operations.md") from None


def is_loopback(host: str) -> bool:
    """Does this name or address mean this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(settings: ServeSettings) -> None:
    """Raises UsageError for a server that anybody could use, or read the numbers of."""
    if not is_loopback(settings.host) and settings.keys is None:
        raise UsageError(
            f"a server on {settings.host} without keys is open to everybody who can reach it", where="--host",
            fix="give a file of keys with --keys, or bind to 127.0.0.1",
        )  # fmt: skip
    if settings.admin_port is not None and not is_loopback(settings.admin_host) and not settings.admin_open:
        raise UsageError(
            f"the admin port on {settings.admin_host} has no keys: everybody who can reach it reads the numbers",
            where="--admin-host", fix="bind it to 127.0.0.1, or say admin_open: true in the settings",
        )  # fmt: skip
    own = (settings.host, settings.port)
    if settings.port and own == (settings.admin_host, settings.admin_port):
        raise UsageError("clients and the admin port cannot share a port", where="--admin-port", fix="use another one")
