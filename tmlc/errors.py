"""Every error that tmlc raises on purpose: what happened, where, and what to do about it.

`str(error)` is two lines: `what (where)` and `what to do`. The command line prints exactly these and exits with
`exit_code`: 1 when a check failed (verify, budget), 2 when the input or the usage was wrong.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

#: What to do about an error that can only come from a fault of tmlc itself, found while it compiles.
REPORT = "This is a fault of tmlc: report it with the output of `tmlc compile --dump DIR`."


def reason(error: BaseException) -> str:
    """What an exception that is not ours says, on one line: for the `what` of an error that names the file itself."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200] or type(error).__name__


def shown(value: object) -> str:
    """A value that somebody gave, on one line and cut: for the `what` of an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def shown_entry(value: object) -> str:
    """An entry of a stranger's JSON, for the `what` of an error: never a large one."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"this {type(value).__name__}"


def first_problem(error: "ValidationError", whole: str) -> str:
    """`PLACE: what is wrong` of the first wrong entry that pydantic found; `whole` names a place that has no name.
    Quotes no value: it may be a secret in the wrong place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200] or whole
    if first["type"] == "union_tag_invalid":  # pydantic's words have the tag
        return f"{place}.{first['ctx']['discriminator'].strip(chr(39))}: none of {first['ctx']['expected_tags']}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


class TmlcError(Exception):
    """Base of all errors of tmlc.

    Args:
        what: what is wrong, one line, with the offending value.
        where: file, tensor, method, pass or option it was found in ("" where there is no better place).
        fix: what the person can do about it, one line. Required: an error that nobody can act on is not finished.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.what} ({self.where})" if self.where else self.what
        return f"{head}\n  {self.fix}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For errors that come from another process: an exception is made again with positional arguments only."""
        return partial(type(self), fix=self.fix), (self.what,), self.__dict__


class UsageError(TmlcError):
    """A command line or API call that makes no sense as written."""


class CheckpointError(TmlcError):
    """A checkpoint folder that is incomplete, damaged, or of an architecture that tmlc does not know."""


class FrontendError(TmlcError):
    """A module that could not be traced into a Program.

    `near_misses` (each with module, op, reason, source) are the operations of a foreign model that were not understood.
    """

    near_misses: Sequence[Any] = ()


class IRError(TmlcError):
    """A Program that breaks the rules of the IR (verifier), or text that is not a Program (parser)."""


class PipelineError(TmlcError):
    """A pipeline file or pass selection that is wrong: unknown keys, unmet `requires`, `expect_matches`."""


class EmitError(TmlcError):
    """A Program that cannot be lowered to the target."""


class TargetError(TmlcError):
    """A target that is unknown, or not in this package, or not possible on this machine."""


class PackageError(TmlcError):
    """A `.tmlc` package that is cut short, altered, foreign, or of a newer format."""


class PlanError(TmlcError):
    """A CPU plan that the kernel library refuses: malformed, out of bounds, or unknown operations."""


class MediaError(TmlcError):
    """Audio, video or timed text that cannot be decoded, or has the wrong form."""


class InputError(TmlcError):
    """An argument of `append` or `tick` of the wrong shape, dtype or range."""


class SessionError(TmlcError):
    """A session used in a state that does not allow it (closed, poisoned), or a snapshot that does not fit."""


class CapacityError(TmlcError):
    """No room: every session that the engine reserved memory for is in use, or one more would make the others late.

    `retry_after`: seconds after which it is worth trying again (None: nobody knows).
    """

    retry_after: float | None = None


class ContextFullError(SessionError):
    """The bounded context is used up and its declared policy is `end`.

    `part` is the place of the session in the call that was refused (None: the error is not of a call).
    """

    part: int | None = None


class KernelError(TmlcError):
    """A kernel stopped on data it must not use (an index out of range); the session is poisoned.

    `part` is the place of the one session that the call was refused for, before anything changed (None: all sessions
    of the call are poisoned).
    """

    exit_code = 1
    part: int | None = None


class DeviceError(KernelError):
    """The device failed or is gone, and with it everything that was on it: all sessions of the engine are lost."""


class BackgroundError(TmlcError):
    """A background model, its endpoint or its tools failed; the delegation fails with it, the session goes on."""

    exit_code = 1


class CheckError(TmlcError):
    """A comparison failed: a pass changed the outputs, `verify` found other numbers, a budget was missed."""

    exit_code = 1
