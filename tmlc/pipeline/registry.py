"""The passes by name. Every module under `tmlc.passes` is imported on the first look-up and registers its pass."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from tmlc.errors import PipelineError
from tmlc.pipeline.pass_base import Pass

_PASSES: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound=type[Pass])


def register_pass(name: str) -> Callable[[_P], _P]:
    """Class decorator: makes a pass known as `name` (`room.what`). Two passes of one name are a programming error."""

    def register(cls: _P) -> _P:
        known = _PASSES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two passes are called {name}: {known.__module__} and {cls.__module__}")
        cls.name = name
        _PASSES[name] = cls
        return cls

    return register


@cache
def _import_all() -> None:
    package = importlib.import_module("tmlc.passes")
    for module in pkgutil.walk_packages(package.__path__, "tmlc.passes."):
        importlib.import_module(module.name)


def all_passes() -> dict[str, type[Pass]]:
    """Every known pass, by name, sorted."""
    _import_all()
    return dict(sorted(_PASSES.items()))


def get_pass(name: str) -> type[Pass]:
    """The pass of this name.

    Raises:
        PipelineError: there is none; the message names the closest one.
    """
    passes = all_passes()
    if name not in passes:
        close = difflib.get_close_matches(name, passes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known passes: {', '.join(passes)}"
        raise PipelineError(f"there is no pass called {name!r}", where="pipeline", fix=hint)
    return passes[name]
