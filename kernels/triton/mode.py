"""Kernels are compiled or interpreted, never both in one process: `triton` reads TRITON_INTERPRET when it is imported.

`device` is what every kernel and every function that kernels call is decorated with. In a process started with
TRITON_INTERPRET=1 (worker.py starts one) it gives a plain Python function over Triton's interpreter; in any other
process it gives a `triton.jit` function that `variants.py` compiles.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRET = os.environ.get("TRITON_INTERPRET", "") == "1"
#: For kernels: whether there are a GPU's instructions. Triton's interpreter has none.
COMPILED = tl.constexpr(not INTERPRET)

#: Every function by its name; names are unique over the room.
FUNCTIONS: dict[str, Any] = {}
PARAMETERS: dict[str, tuple[str, ...]] = {}


def device(fn: Callable[..., Any]) -> Any:
    """Registers a kernel, or a function that kernels call."""
    name = fn.__name__
    if name in FUNCTIONS:
        raise ValueError(f"two device functions are called {name}")
    PARAMETERS[name] = tuple(inspect.signature(fn).parameters)
    if INTERPRET:
        from triton.runtime.interpreter import FunctionRewriter

        # Called directly, so a call of a helper costs a Python call and does not patch the language again.
        FUNCTIONS[name] = FunctionRewriter(fn).rewrite_ast()
    else:
        FUNCTIONS[name] = triton.jit(fn)
    return FUNCTIONS[name]


_HELD = tl.constexpr("mov.b32 $0, $1;")


@device
def held(values):
    """float32 `values`, of which the compiler does not know that: what is made of them is not moved out of a loop, nor
    into threads that would make it again. It takes no instruction."""
    if COMPILED:
        values = tl.inline_asm_elementwise(_HELD, "=r,r", [values], tl.float32, False, 1)
    return values
