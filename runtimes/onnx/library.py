"""ONNX Runtime, imported when a package needs it, and what is said when it is not there or too old."""

from __future__ import annotations

from types import ModuleType

from tmlc.errors import TargetError
from tmlc.versions import release


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
    if release(onnxruntime.__version__) < release(oldest):
        what = f"onnxruntime {onnxruntime.__version__} is older than the {oldest} that the package needs"
        raise TargetError(what, where="target onnx", fix=command)
    return onnxruntime
