"""The passes by name. Every module under `tmlc.passes` is imported on the first look-up and registers its pass; then
come the passes of other distributions, which name theirs in the entry point group `tmlc.passes`:

    [project.entry-points."tmlc.passes"]
    "acme.drop_silence" = "acme_passes.silence:DropSilence"
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import TypeVar

from tmlc.errors import PipelineError, shown
from tmlc.pipeline.pass_base import Pass

GROUP = "tmlc.passes"
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
    for point in metadata.entry_points(group=GROUP):
        _load_plugin(point)


def _load_plugin(point: metadata.EntryPoint) -> None:
    """Registers one third-party pass under the name of its entry point.

    Raises:
        PipelineError: it cannot be imported, is no pass, or takes a name that is taken; the message names the
            distribution, because a pass that silently is not there would compile another program.
    """
    owner = point.dist.name if point.dist is not None else "an unknown distribution"
    where = f"{owner}, entry point {point.name} = {point.value}"
    fix = f"repair or uninstall {owner}"
    try:
        loaded = point.load()
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PipelineError(f"a third-party pass cannot be loaded: {what}", where=where, fix=fix) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise PipelineError("a third-party pass is no subclass of Pass", where=where, fix=fix)
    if loaded.name not in ("", point.name):
        what = f"a third-party pass calls itself {loaded.name}, its entry point says {point.name}"
        raise PipelineError(what, where=where, fix=fix)
    try:
        register_pass(point.name)(loaded)
    except ValueError as error:
        raise PipelineError(str(error), where=where, fix=fix) from None


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
        raise PipelineError(f"there is no pass called {shown(name)}", where="pipeline", fix=hint)
    return passes[name]
