"""Runs plans with tests/kernels/alloc_count.c preloaded: `alloc_child.py LIBRARY COUNTER` prints what was counted.

One JSON object: allocations that the kernel library made while plans were built, and in all runs of each plan, with
timers and without.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DTYPES, Builder
from test_sanitized import SEEDS

from tmlc.kernels.cpu import Library, Plan, Pool

MAX_N, THREADS = 6, 3
NUMPY = dict(f32=np.float32, bf16=np.uint16, i32=np.int32, i64=np.int64, u8=np.uint8)
NAMES = {number: name for name, number in DTYPES.items()}


def wide(b: Builder, rng: np.random.Generator) -> None:
    """Products that are large enough to be split between threads."""
    x, y = b.input(0, "f32", 256), b.output(0, "f32", 256)
    b.method([x], [y], [("linear", [y, x, b.weight(rng.random((16, 256 * 16), np.float32))])])


def arguments(b: Builder, numbers: list[int], n: int, rng: np.random.Generator) -> list[np.ndarray]:
    arrays = []
    for number in numbers:
        _, dtype, _, rows_a, rows_b, cols, _ = b.tensors[number]
        array = np.ones((rows_a * n + rows_b, cols), NUMPY[NAMES[dtype]])
        if array.dtype == np.float32:
            array[:] = rng.random(array.shape)
        arrays.append(array)
    return arrays


def main(library_path: str, counter_path: str) -> None:
    library, counter = Library(Path(library_path)), ctypes.CDLL(counter_path)
    counter.alloc_counted.restype = ctypes.c_long
    counter.alloc_watch.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(library_path)]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    counter.alloc_watch(min(low for low, _ in ranges), max(high for _, high in ranges))
    rng, found = np.random.default_rng(0), {"building": 0}
    pools = [None, Pool(library, 2), Pool(library, THREADS)]
    for name, fill in {**SEEDS, "wide": wide}.items():
        b = Builder(max_n=MAX_N)
        fill(b, rng)
        counter.alloc_counted()
        plan: Plan = b.build(library, THREADS)
        found["building"] += counter.alloc_counted()
        found[name] = 0
        for index, (inputs, outputs, _) in enumerate(b.methods):
            for n in (1, MAX_N):
                for pool in pools:
                    slot = np.zeros(plan.slot_bytes, np.uint8)
                    given, taken = arguments(b, inputs, n, rng), arguments(b, outputs, n, rng)
                    for timed in (False, True):
                        counter.alloc_counted()
                        plan.profile(timed)
                        plan.run(pool, index, n, slot, given, taken)
                        found[name] += counter.alloc_counted()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
