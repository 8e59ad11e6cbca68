"""JSON for people and programs alike: letters of every script as they are, and nothing in it that a terminal obeys."""

import json
from typing import Any


def dumps(value: Any, **settings: Any) -> str:
    """`json.dumps` with characters that are not printable written as escapes (the module itself writes those below
    U+0020 so); the lines of `indent` stay. It reads back as the same value.

    Raises ValueError, TypeError as `json.dumps` does.
    """
    text = json.dumps(value, ensure_ascii=False, **settings)
    if text.replace("\n", "").isprintable():
        return text
    # Between two strings there are only printable characters and the ends of lines.
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)
