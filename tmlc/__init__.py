"""tmlc: from the checkpoint of an interaction model to an engine that answers within 400 ms.

The names below are the public interface. They are resolved on first use, so `import tmlc` costs no numpy, and
`tmlc.load` never brings in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "compile": "tmlc.compiler",
    "program": "tmlc.compiler",
    "CompileReport": "tmlc.compiler",
    "load": "tmlc.runtimes.core.engine",
    "Engine": "tmlc.runtimes.core.engine",
    "Session": "tmlc.runtimes.core.session",
    "TickInput": "tmlc.runtimes.core.tick",
    "TickOutput": "tmlc.runtimes.core.tick",
    "TmlcError": "tmlc.errors",
}

__all__ = ["CompileReport", "Engine", "Session", "TickInput", "TickOutput", "TmlcError", "__version__",
           "compile", "load", "program"]

if TYPE_CHECKING:
    from tmlc.compiler import CompileReport, compile, program
    from tmlc.errors import TmlcError
    from tmlc.runtimes.core.engine import Engine, load
    from tmlc.runtimes.core.session import Session
    from tmlc.runtimes.core.tick import TickInput, TickOutput


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tmlc' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
