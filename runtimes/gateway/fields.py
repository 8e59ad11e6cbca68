"""What stands in a client's event, checked field by field, and the error that names the field that is wrong."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from tmlc.errors import CapacityError, InputError, SessionError, TmlcError, UsageError
from tmlc.runtimes.background.injections import Policy

MAX_AUDIO = 1 << 20
"""Bytes of audio in one message: more than 20 s."""
MAX_CONFIG = 1 << 17
"""Characters of a session's settings as JSON: they are kept with its snapshots."""


class WireError(Exception):
    """Something that a client sent is refused; the connection and the session go on.

    Args:
        code: OpenAI's, as far as it has one. param: the field that is wrong.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.param = message, code, param
        self.kind = kind or "invalid_request_error"


def as_wire(error: TmlcError) -> WireError:
    """An error of tmlc in the words of the wire."""
    message = f"{error.what}. {error.fix}"
    if isinstance(error, CapacityError):
        return WireError(message, "rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, InputError | UsageError):
        return WireError(message, "invalid_value")
    if isinstance(error, SessionError):
        return WireError(message, "session_not_found")
    return WireError(message, "server_error", kind="server_error")


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """What tmlc refuses in here is the fault of this field."""
    try:
        yield
    except TmlcError as error:
        wire = as_wire(error)
        wire.param = param
        raise wire from None


def text_of(event: dict[str, Any], name: str, most: int, param: str | None = None) -> str:
    """A string of 1 to `most` characters."""
    value, where = event.get(name), param or name
    if not isinstance(value, str):
        raise WireError(
            f"{where} must be a string", "missing_required_parameter" if value is None else "invalid_type", where
        )
    if not value:
        raise WireError(f"{where} is empty", "invalid_value", where)
    if len(value) > most:
        raise WireError(f"{where} has {len(value)} characters, more than {most}", "string_above_max_length", where)
    return value


def object_of(event: dict[str, Any], name: str, param: str | None = None) -> dict[str, Any]:
    """An object; an empty one where there is none."""
    value = event.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WireError(f"{param or name} must be an object", "invalid_type", param or name)
    return value


def check_config(config: dict[str, Any], param: str) -> None:
    """Refuses settings of a session that are too long to be kept."""
    try:
        size = len(json.dumps(config))
    except RecursionError:
        raise WireError(f"{param} is nested too deeply", "invalid_value", param) from None
    if size > MAX_CONFIG:
        raise WireError(f"{param} has more than {MAX_CONFIG} characters", "string_above_max_length", param)


def policy_of(event: dict[str, Any]) -> Policy | None:
    """When what the event brings may be said: `tmlc: {policy}`; None where the client leaves it to the server."""
    given = object_of(event, "tmlc").get("policy")
    if given is None:
        return None
    if given not in (Policy.WHEN_IDLE, Policy.NEXT_GAP, Policy.INTERRUPT):
        raise WireError("tmlc.policy must be when_idle, next_gap or interrupt", "invalid_value", "tmlc.policy")
    return Policy(given)


def known_only(event: dict[str, Any], names: frozenset[str], param: str) -> None:
    """Refuses fields that nobody here knows."""
    for name in event:
        if name not in names:
            raise WireError(
                f"unknown parameter: {param}.{str(name)[:64]}", "unknown_parameter", f"{param}.{str(name)[:64]}"
            )


def base64_of(value: Any, name: str, most: int) -> bytes:
    """Bytes from base64."""
    if not isinstance(value, str):
        raise WireError(f"{name} must be base64 in a string", "invalid_type", name)
    if len(value) > most * 4 // 3 + 4:
        raise WireError(f"{name} has more than {most} bytes", "string_above_max_length", name)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(f"{name} is not valid base64", "invalid_value", name) from None
