"""Reading JSON that may come from a stranger: every field is checked for type and range before anything uses it."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tmlc.errors import PackageError

LIMIT = 2**53  # the largest whole number that every JSON reader keeps exactly
MAX_JSON_BYTES = 256 * 2**20
MAX_JSON_DEPTH = 64  # far below the interpreter's limit, so that whatever walks the value later may recurse

AGAIN = "Get the package again from its source, or compile it again with this version of tmlc."

T = TypeVar("T")
_MOST = 2.0**127  # every real number of a manifest must fit into float32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")


def check_member_name(name: object) -> str:
    """A file name inside a package: relative, plain ASCII, no way out of the folder."""
    if not isinstance(name, str) or len(name) > 255 or not _NAME.fullmatch(name):
        raise PackageError(f"member name {str(name)[:80]!r} is not allowed", fix=AGAIN)
    return name


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is given twice")
    if not all(map(str.isprintable, out)):  # keys are shown in errors and tables, on a terminal
        raise ValueError("a key holds a character that cannot be printed")
    return out


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError("nested too deeply")


def parse_json(data: bytes, where: str) -> Any:
    """JSON from a file that may be damaged or hostile.

    Raises:
        PackageError: not UTF-8, not JSON, a key twice or not printable, NaN or Infinity, nested too deeply, or
            too large.
    """
    if len(data) > MAX_JSON_BYTES:
        raise PackageError(f"{len(data)} bytes of JSON are too many", where=where, fix=AGAIN)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        raise PackageError(f"not valid JSON: {str(error)[:120]}", where=where, fix=AGAIN) from None


def is_text(value: object) -> bool:
    """A short text that is safe to show on a terminal: no control characters, no lone surrogates."""
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


class Fields:
    """One JSON object whose keys are taken one by one; what is missing, mistyped or left over is an error."""

    def __init__(self, value: Any, where: str, lenient: bool = False) -> None:
        if not isinstance(value, dict):
            raise PackageError("expected an object", where=where, fix=AGAIN)
        self.value, self.where, self.lenient, self.taken = value, where, lenient, set[str]()

    def fail(self, key: str, what: str) -> PackageError:
        return PackageError(what, where=f"{self.where}: {key}", fix=AGAIN)

    def any(self, key: str) -> Any:
        if key not in self.value:
            raise self.fail(key, "field is missing")
        self.taken.add(key)
        return self.value[key]

    def text(self, key: str, choices: tuple[str, ...] | None = None) -> str:
        value = self.any(key)
        if not is_text(value):
            raise self.fail(key, "expected a text")
        if choices is not None and value not in choices:
            raise self.fail(key, f"{value[:40]!r} is not one of {', '.join(choices)}")
        return value

    def integer(self, key: str, low: int = 0, high: int = LIMIT) -> int:
        value = self.any(key)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"expected a whole number from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        value = self.any(key)
        if type(value) not in (int, float) or not -_MOST <= value <= _MOST:
            raise self.fail(key, "expected a finite number")
        return float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.any(key)
        if not isinstance(value, dict):
            raise self.fail(key, "expected an object")
        return value

    def nested(self, key: str) -> "Fields":
        return Fields(self.any(key), f"{self.where}: {key}", self.lenient)

    def sequence(self, key: str) -> list[Any]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.fail(key, "expected a list")
        return value

    def ints(self, key: str, length: int | None = None, low: int = 0) -> tuple[int, ...]:
        value = self.sequence(key)
        if any(type(v) is not int or not low <= v <= LIMIT for v in value):
            raise self.fail(key, "expected whole numbers")
        if length is not None and len(value) != length:
            raise self.fail(key, f"expected {length} numbers")
        return tuple(value)

    def items(self, key: str, read: Callable[["Fields"], T]) -> tuple[T, ...]:
        return tuple(
            read(Fields(v, f"{self.where}: {key}[{i}]", self.lenient)) for i, v in enumerate(self.sequence(key))
        )

    def done(self) -> None:
        left = sorted(set(self.value) - self.taken)
        if left and not self.lenient:
            raise self.fail(left[0][:80], "unknown field")
