"""Asks the kernel library whether it accepts a plan, before a package is written around it."""

import numpy as np

from tmlc.emit.cpu import CpuEngine
from tmlc.errors import EmitError, PlanError
from tmlc.package.safetensors_io import TensorEntry, WeightItem, layout


def weight_entries(engine: CpuEngine) -> tuple[dict[str, TensorEntry], int]:
    """Where each weight will lie in the package, and the bytes of all."""
    items = [WeightItem(w.name, w.dtype, (w.rows, w.cols), lambda: b"") for w in engine.weights]
    _, entries, total = layout(items)
    return entries, total


def check_plan(engine: CpuEngine, threads: int = 1) -> int:
    """Lets the library check every word of the plan.

    Returns:
        Bytes of scratch memory that the plan needs with that many threads.

    Raises:
        EmitError: the library refuses the plan, which is a fault of the emitter or of a pass.
        TargetError: the kernel library is not there.
    """
    from tmlc.kernels.cpu import Plan, load_library
    from tmlc.runtimes.cpu.plan import plan_words

    library = load_library()
    entries, total = weight_entries(engine)
    words = plan_words(engine.plan, entries, library.ops).words
    backing = np.zeros(total + 64, np.uint8)  # pages that nothing touches: creating a plan reads no weights
    weights = backing[-backing.ctypes.data % 64 :][:total]
    try:
        plan = Plan(library, words, weights, threads)
    except PlanError as error:
        fix = "This is a fault of tmlc: report it with the output of `tmlc compile --dump DIR`."
        raise EmitError(f"the kernel library refuses the plan: {error.what}", where="cpu", fix=fix) from error
    scratch = int(plan.scratch_bytes)
    plan.close()
    return scratch
