"""The CPU kernel library from Python: the variants that run here; plans and thread pools as objects.

The library is built once per instruction set (setup.py); `load_library` takes the best that this machine
can run. Needs numpy only (the library is called through ctypes). Nothing here knows models or packages:
`Plan` takes the words of docs/plan-format.md and runs them.
"""

from tmlc.kernels.cpu.library import ABI, Library, available_isas, load_library
from tmlc.kernels.cpu.measure import PRODUCTS, MemoryReader, multiply_rate
from tmlc.kernels.cpu.plan import MAGIC, VERSION, Plan, Timed
from tmlc.kernels.cpu.pool import Pool

__all__ = [
    "ABI", "MAGIC", "PRODUCTS", "VERSION", "Library", "MemoryReader", "Plan", "Pool", "Timed", "available_isas",
    "load_library", "multiply_rate",
]  # fmt: skip
