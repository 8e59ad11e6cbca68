"""Asks the kernel library whether it accepts a plan, before a package is written around it."""

import numpy as np

from tmlc.emit.cpu import CpuEngine
from tmlc.emit.targets import weight_entries
from tmlc.errors import REPORT, EmitError, PlanError


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
    entries, total = weight_entries(engine.weights)
    words = plan_words(engine.plan, entries, library.ops).words
    backing = np.zeros(total + 64, np.uint8)  # pages that nothing touches: creating a plan reads no weights
    weights = backing[-backing.ctypes.data % 64 :][:total]
    try:
        plan = Plan(library, words, weights, threads)
    except PlanError as error:
        raise EmitError(f"the kernel library refuses the plan: {error.what}", where="cpu", fix=REPORT) from error
    scratch = int(plan.scratch_bytes)
    plan.close()
    return scratch
