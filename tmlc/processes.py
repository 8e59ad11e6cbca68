"""Python processes that tmlc starts beside its own.

Python puts the current folder first on the path of what it runs with `-m` or `-c`. Somebody else's checkpoint may be
the current folder, with a `json.py` in it: no process of tmlc's may import from there.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SAFE = "PYTHONSAFEPATH"
_LOCK = threading.Lock()


def python_module(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of tmlc with arguments in a process of its own."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


@contextmanager
def safe_path() -> Iterator[None]:
    """For what `multiprocessing` starts meanwhile: its command lines cannot be changed, so the environment is."""
    with _LOCK:
        before = os.environ.get(_SAFE)
        os.environ[_SAFE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_SAFE]
            else:
                os.environ[_SAFE] = before
