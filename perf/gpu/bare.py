"""tmlc on a machine where it is not installed: the rooms of this checkout as its sub-packages, through links."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("passes", "kernels", "runtimes", "model_zoo")
NEEDED = ("numpy", "click", "yaml", "pydantic", "safetensors", "rich", "torch", "triton", "cuda.bindings")


def prepare(folder: Path) -> None:
    """Makes `import tmlc` work, in this process and in those that it starts; does nothing where it works already."""
    if _there("tmlc.kernels"):
        return
    rooms = folder / "tmlc"
    rooms.mkdir(parents=True, exist_ok=True)
    for source in [p for p in (ROOT / "tmlc").iterdir() if p.name != "__pycache__"] + [ROOT / name for name in ROOMS]:
        link = rooms / source.name
        if not link.is_symlink():
            link.symlink_to(source)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def missing() -> list[str]:
    """Packages that a run needs and that are not installed."""
    return [name for name in NEEDED if not _there(name)]


def relative(text: str) -> str:
    """Text without the folders of this machine: results are read elsewhere."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    return Path(text).name if Path(text).is_absolute() else text


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
