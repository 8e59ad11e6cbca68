"""Kernels in Triton's GPU dialect, as text, and rewritten as such between two of Triton's stages."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rewrite = Callable[[str], str]


def rewritten(module: Any, *rewrites: Rewrite) -> Any:
    """Triton's module, its text rewritten by each in turn."""
    from triton._C.libtriton import ir

    text = changed = str(module)
    for rewrite in rewrites:
        changed = rewrite(changed)
    if changed == text:
        return module
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "module.ttgir"
        file.write_text(changed, "utf-8")
        made = ir.parse_mlir_module(str(file), module.context)
    made.context = module.context  # Triton's stages ask a module for it
    return made
