"""Which versions of transformers foreign decoders are traced with.

pyproject.toml declares the same range, and docs/checkpoints.md says what was run (`make test-transformers`).
"""

from __future__ import annotations

import re

from tmlc.errors import UsageError

#: The first version whose modules are understood, the newest whose modules were run, and the first that is refused.
OLDEST, NEWEST_RUN, REFUSED_FROM = (5, 17), (5, 23), (6,)
INSTALL = 'pip install "tmlc[hf]"'


def check_version(version: str) -> list[str]:
    """Notes on tracing with this version of transformers: none inside the range that was run.

    Raises:
        UsageError: the version is outside the range that tmlc supports.
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    release = tuple(map(int, numbers[0].split("."))) if numbers else ()
    if not OLDEST <= release < REFUSED_FROM:
        raise UsageError(
            f"transformers {version} is outside the range that tmlc supports, "
            f"{_text(OLDEST)} up to (not including) {_text(REFUSED_FROM)}",
            where="reading a decoder of transformers",
            fix=f"{INSTALL} --upgrade installs one that fits",
        )
    if release[:2] > NEWEST_RUN:
        return [
            f"transformers {version} is newer than {_text(NEWEST_RUN)}, the newest that tmlc was tested with: "
            "forms that it does not know are errors; compare a few logits"
        ]
    return []


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
