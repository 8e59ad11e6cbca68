"""Which versions of transformers foreign decoders are traced with.

pyproject.toml declares the same range, and docs/checkpoints.md says what was run (`make test-transformers`).
"""

from __future__ import annotations

from tmlc.errors import UsageError
from tmlc.versions import dotted, release

#: The first version whose modules are understood, the newest whose modules were run, and the first that is refused.
OLDEST, NEWEST_RUN, REFUSED_FROM = (5, 17), (5, 24), (6,)
INSTALL = 'pip install "tmlc[hf]"'


def check_version(version: str) -> list[str]:
    """Notes on tracing with this version of transformers: none inside the range that was run.

    Raises:
        UsageError: the version is outside the range that tmlc supports.
    """
    if not OLDEST <= release(version) < REFUSED_FROM:
        raise UsageError(
            f"transformers {version} is outside the range that tmlc supports, "
            f"{dotted(OLDEST)} up to (not including) {dotted(REFUSED_FROM)}",
            where="reading a decoder of transformers",
            fix=f"{INSTALL} --upgrade installs one that fits",
        )
    if release(version)[:2] > NEWEST_RUN:
        return [
            f"transformers {version} is newer than {dotted(NEWEST_RUN)}, the newest that tmlc was tested with: "
            "forms that it does not know are errors; compare a few logits"
        ]
    return []
