"""ONNX Runtime, imported when a package needs it, and what is said when it is not there or too old."""

from __future__ import annotations

from types import ModuleType

from tmlc.errors import TargetError


def load_onnxruntime(oldest: str) -> ModuleType:
    """The module, at least of version `oldest` ("1.24").

    Raises:
        TargetError: not installed, cannot be loaded, or too old; with the command that helps.
    """
    command = f"Run `pip install -U 'onnxruntime>={oldest}'`."
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise TargetError(f"onnxruntime lacks {error.name}", where="target onnx", fix=command) from error
        raise TargetError("onnxruntime is not installed", where="target onnx", fix=command) from None
    except ImportError as error:
        what = f"onnxruntime cannot be loaded: {str(error)[:200]}"
        raise TargetError(what, where="target onnx", fix=command) from error
    if version_of(onnxruntime.__version__) < version_of(oldest):
        what = f"onnxruntime {onnxruntime.__version__} is older than the {oldest} that the package needs"
        raise TargetError(what, where="target onnx", fix=command)
    return onnxruntime


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of "1.24.0"; (0, 0) where it does not start like a version."""
    parts = text.split(".")[:2]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return 0, 0
    return int(parts[0]), int(parts[1])
