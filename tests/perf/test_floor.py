"""What `make peers` holds times against: bytes and multiply-adds, counted by hand for a plan of four calls."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEERS = Path(__file__).parents[2] / "perf/peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of perf/peers, which are scripts and in no package."""
    monkeypatch.syspath_prepend(str(PEERS))
    import floor
    import report

    yield floor, report
    for name in ("floor", "report", "worker"):
        sys.modules.pop(name, None)


def tensor(space: str, dtype: str, rows: tuple[int, int], cols: int) -> dict[str, Any]:
    return {"space": space, "dtype": dtype, "rows": list(rows), "cols": cols, "stride": cols}


TENSORS = [
    tensor("arena", "f32", (1, 0), 32),  # 0: activations
    tensor("weight", "bf16", (0, 2), 32 * 16),  # 1: a linear of 32 to 32
    tensor("slot", "i64", (0, 1), 1),  # 2: the position
    tensor("slot", "bf16", (0, 16), 16 * 16),  # 3: keys of 256 positions, one head of 16
    tensor("slot", "bf16", (0, 256), 16),  # 4: values
    tensor("arena", "f32", (1, 0), 16),  # 5: one new key or value
    tensor("arena", "f32", (1, 0), 2),  # 6: two experts a row
    tensor("weight", "bf16", (0, 4 * 2 * 3), 32 * 16),  # 7: gate and up of four experts, 48 wide
    tensor("weight", "bf16", (0, 4 * 2), 48 * 16),  # 8: down
    tensor("weight", "f32", (0, 100), 32),  # 9: a table of embeddings
]
DECODE = [
    {"op": "linear", "t": [0, 0, 1], "i": []},
    {"op": "attention", "t": [0, 0, 5, 5, 2, 3, 4], "i": [2, 1, 0, 0, 256, 0]},
    {"op": "moe", "t": [0, 0, 6, 6, 7, 8], "i": [4, 48]},
]
UNEMBED = [{"op": "linear", "t": [0, 0, 1], "i": []}, {"op": "embedding", "t": [0, 9], "i": []}]
PLAN = {"tensors": TENSORS, "methods": [{"name": "decode", "code": DECODE}, {"name": "unembed", "code": UNEMBED}]}


def test_bytes_and_products_of_a_call_are_counted(peers: Any) -> None:
    floor, _ = peers
    works = {w.op: w for w in floor._Counter(PLAN, "bf16").work(touched=3.0, n=5, attended=64)}
    linear = 2 * 32 * 16 * 2
    assert works["linear"].bytes == 2 * linear  # of decode, and the head
    assert works["linear"].multiply_adds == (5 + 1) * 32 * 32  # the head is asked for one row
    assert works["attention"].bytes == 2 * 64 * 16 * 2  # a quarter of both caches, nothing for the position
    assert works["attention"].multiply_adds == 5 * 64 * 2 * (16 + 16)
    assert works["moe"].bytes == 3 / 4 * (24 * 512 + 8 * 768) * 2
    assert works["moe"].multiply_adds == 5 * 2 * 3 * 48 * 32
    assert set(works) == {"linear", "attention", "moe"}


def test_the_roofline_is_what_takes_longer_op_by_op(peers: Any) -> None:
    _, report = peers
    run = {"bandwidth": [1e9, 2e9], "multiply_adds": {"bf16": [1e12, 1e12]}}
    works = [
        {"op": "a", "bytes": 4e6, "multiply_adds": 1e9, "product": "bf16"},  # 4 and 2 ms of bytes, 1 ms of products
        {"op": "b", "bytes": 2e6, "multiply_adds": 3e9, "product": "bf16"},  # 2 and 1 ms of bytes, 3 ms of products
    ]
    assert np.allclose(report.roofline(run, works), [4 + 3, 2 + 3])
