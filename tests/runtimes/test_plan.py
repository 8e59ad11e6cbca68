"""plan.json to words: the flat form is what docs/plan-format.md says, and anything malformed is named and refused."""

import copy
import json
import struct
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from tmlc.errors import PackageError, PlanError
from tmlc.runtimes.cpu.plan import MAGIC, plan_words


@dataclass
class Entry:
    dtype: str
    offset: int
    nbytes: int


WEIGHTS = {"w": Entry("f32", 128, 4 * 64), "norm": Entry("f32", 384, 32)}
DEEP = json.loads("[" * 900 + "]" * 900)  # what would end in a RecursionError where it is shown
OPS = {"copy": 0, "rms_norm": 7, "linear": 3}
PLAN = {
    "version": 2,
    "arena_bytes": 256,
    "slot_bytes": 64,
    "tensors": [
        {"space": "input", "offset": 0, "dtype": "f32", "rows": [1, 0], "cols": 8, "stride": 8},
        {"space": "output", "offset": 0, "dtype": "f32", "rows": [2, 1], "cols": 4, "stride": 4},
        {"space": "weight", "name": "norm", "dtype": "f32", "rows": [0, 1], "cols": 8, "stride": 8},
        {"space": "weight", "name": "w", "offset": 64, "dtype": "f32", "rows": [0, 3], "cols": 16, "stride": 16},
        {"space": "arena", "offset": 64, "dtype": "f32", "rows": [1, 0], "cols": 4, "stride": 8},
    ],
    "methods": [
        {
            "name": "decode",
            "max_n": 4,
            "inputs": [0],
            "outputs": [1],
            "code": [
                {"op": "rms_norm", "t": [4, 0, 2], "i": [-5], "f": [1e-6]},
                {"op": "copy", "t": [1, 4], "i": [], "f": []},
            ],
        },
        {"name": "idle", "max_n": 1, "inputs": [], "outputs": [], "code": []},
    ],
}


def test_the_words_are_the_flat_form_of_the_plan():
    out = plan_words(PLAN, WEIGHTS, OPS)
    bits = struct.unpack("<q", struct.pack("<d", 1e-6))[0]
    assert out.words.dtype == np.int64
    assert out.words.tolist() == [
        MAGIC,
        2,
        256,
        64,
        5,
        2,
        3,
        0,
        0,
        1,
        0,
        8,
        8,
        4,
        0,
        0,
        2,
        1,
        4,
        4,
        2,
        0,
        384,
        0,
        1,
        8,
        8,
        2,
        0,
        128 + 64,
        0,
        3,
        16,
        16,
        0,
        0,
        64,
        1,
        0,
        4,
        8,
        4,
        1,
        1,
        2,
        0,
        1,
        7,
        3,
        1,
        1,
        4,
        0,
        2,
        -5,
        bits,
        0,
        2,
        0,
        0,
        1,
        4,
        1,
        0,
        0,
        0,
    ]
    assert [str(m) for m in out.methods] == ["decode(f32[n,8]) -> (f32[2n+1,4])", "idle() -> ()"]
    assert (out.arena_bytes, out.slot_bytes) == (256, 64)


def changed(path: list, value) -> dict:
    plan = copy.deepcopy(PLAN)
    place = plan
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return plan


T, M = ["tensors"], ["methods", 0]
C = [*M, "code", 0]


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        (["version"], 1, "version 1"),
        (["version"], True, "version"),
        (["extra"], 1, "unknown key 'extra'"),
        (["methods"], KeyError, "'methods' is missing"),
        (["arena_bytes"], -1, "arena_bytes"),
        (["slot_bytes"], 1 << 60, "slot_bytes"),
        (["slot_bytes"], 1.0, "slot_bytes"),
        (["tensors"], {}, "a list"),
        ([*T, 0], 3, "tensor 0"),
        ([*T, 0, "space"], "heap", "unknown space 'heap'"),
        ([*T, 0, "dtype"], ["f32"], "unknown dtype"),
        ([*T, 0, "rows"], [1], r"\[a, b\]"),
        ([*T, 0, "rows", 0], -1, "tensor 0: rows"),
        ([*T, 0, "rows", 0], 1 << 25, "tensor 0: rows"),
        ([*T, 0, "cols"], 0, "cols"),
        ([*T, 0, "stride"], 7, "stride"),
        ([*T, 0, "stride"], 16, "dense"),
        ([*T, 0, "offset"], KeyError, "offset"),
        ([*T, 0, "offset"], 1, "is not input 0"),
        ([*T, 0, "name"], "w", "needs a name"),
        ([*T, 2, "name"], KeyError, "needs a name"),
        ([*T, 2, "rows"], [1, 0], "depends on n"),
        ([*T, 4, "color"], 1, "unknown key"),
        ([*T, 0, "space"], DEEP, "unknown space this list"),
        ([*T, 0, "cols"], DEEP, "cols"),
        ([*M, "name"], "\x1b[2J", "name"),
        (M, [], "method 0"),
        ([*M, "name"], "", "name"),
        ([*M, "name"], "idle", "given twice"),
        ([*M, "max_n"], 0, "max_n"),
        ([*M, "inputs"], [1], "is not input 0"),
        ([*M, "inputs"], [99], "inputs"),
        ([*M, "outputs"], 1, "a list"),
        ([*C, "op"], "system", "unknown operation 'system'"),
        ([*C, "op"], 7, "unknown operation"),
        ([*C, "t"], [5], "from 0 to 4"),
        ([*C, "t"], [0] * 65, "at most 64"),
        ([*C, "i"], [1 << 63], "call 0: i"),
        ([*C, "f"], ["1"], "a number"),
        ([*C, "f"], [float("inf")], "a number"),
        ([*C, "f"], [10**400], "a number"),
        ([*C, "g"], [], "unknown key"),
    ],
)
def test_a_malformed_plan_is_refused_by_name(path, value, what):
    with pytest.raises(PlanError, match=what):
        plan_words(changed(path, value), WEIGHTS, OPS)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ([*T, 2, "name"], "absent", "'absent' is not in the package"),
        ([*T, 2, "dtype"], "bf16", "norm is f32, the plan wants bf16"),
        ([*T, 3, "rows"], [0, 4], "past the end of weight w"),
        ([*T, 3, "offset"], 65, "past the end of weight w"),
        ([*T, 2, "cols"], 9, "stride"),
    ],
)
def test_weights_are_checked_against_the_package(path, value, what):
    with pytest.raises((PackageError, PlanError), match=what):
        plan_words(changed(path, value), WEIGHTS, OPS)


def test_no_change_of_a_value_gets_past_as_another_error():
    """Every place of the plan replaced by every odd value: a plan or one of our errors, never anything else."""
    paths: list[list] = []

    def walk(value, path):
        paths.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, [*path, key])

    walk(PLAN, [])
    for path in paths[1:]:
        for value in (None, -1, 0, 1.5, "x", [], {}, [[]], [None], True, 1 << 70, json.loads("[[[[1]]]]")):
            with suppress(PlanError, PackageError):
                plan_words(changed(path, value), WEIGHTS, OPS)
