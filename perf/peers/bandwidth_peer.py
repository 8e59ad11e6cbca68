"""How fast this machine reads memory and multiplies right now, by tmlc's own measures: one request, one answer."""

from __future__ import annotations

import json
import sys

from tmlc.kernels.cpu import PRODUCTS, MemoryReader, Pool, load_library, multiply_rate

if __name__ == "__main__":
    pool = Pool(load_library(), json.loads(sys.argv[1])["threads"])
    reader = MemoryReader(pool)
    print(json.dumps({"ok": True, "facts": {}}), flush=True)
    for _ in sys.stdin:
        answer = {"ok": True, "bytes_per_second": max(reader.bandwidth() for _ in range(3))}
        rates = {kind: max(multiply_rate(pool, kind) for _ in range(3)) for kind in PRODUCTS}
        answer["multiply_adds_per_second"] = rates
        print(json.dumps(answer), flush=True)
