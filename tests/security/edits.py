"""Edits of bytes and of JSON: what is damaged by chance, and what somebody changed on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

_DEEP = "@deep:"  # stands for so many nested lists, which json.dumps could not write
NUMBERS = [
    *(0, 1, 2, 3, 7, 15, 16, 17, 48, 63, 64, 1000, 4096, 2**15, 2**16, 2**20, 2**24, 2**24 + 1, 2**31 - 1, 2**31),
    *(2**32, 2**36, 2**46, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -1, -2, -16, -(2**31), -(2**63)),
    *(0.0, -0.0, 0.5, 1.0, 1e-310, 1e30, 1e39, 1e299, 1e308, -1e30, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *("", "x", "../x", "/etc/passwd", "a/../../b", "C:\\x", "\0", "\x1b[2J", "\ud800", "\U0001f600", "a" * 5000),
    *("decode", "f32", "bf16", "i32", "i64", "u8", "arena", "slot", "weight", "input", "output", "linear", "attention"),
    *("tokens", "interaction", "end", "ring_with_sinks", "engines/cpu/plan.json", "manifest.json", "[red]", "%s%n"),
]
OTHERS = [True, False, None, [], {}, [[]], {"": None}, [0] * 300, *(f"{_DEEP}{n}" for n in (40, 900, 960, 990, 10**5))]


def dumps(value: Any) -> bytes:
    """JSON with everything that JSON should not have: NaN, lone surrogates, absurd depth."""
    text = json.dumps(value, separators=(",", ":"))
    while (at := text.find(f'"{_DEEP}')) >= 0:
        end = text.index('"', at + 1)
        depth = int(text[at + 1 + len(_DEEP) : end])
        text = text[:at] + "[" * depth + "]" * depth + text[end + 1 :]
    return text.encode()


def damage(data: bytes, rng: Random) -> bytes:
    """One flip, cut, insertion, repetition, exchange or overwriting, anywhere; never the same bytes again."""
    while (changed := _damage(data, rng)) == data:
        pass
    return changed


def _damage(data: bytes, rng: Random) -> bytes:
    at, other, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 8, 64, 4096))
    before, after = data[:at], data[at + size :]
    edits: list[Callable[[], bytes]] = [
        lambda: before + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: before,
        lambda: data[at:],
        lambda: before + after,
        lambda: before + rng.randbytes(size) + data[at:],
        lambda: before + data[other : other + size] + data[at:],
        lambda: before + data[other : other + size] + after,
        lambda: before + rng.choice((b"\0", b"\xff", b"\x7f")) * size + after,
        lambda: data + data[at:],
    ]
    return rng.choice(edits)()


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `value`."""
    found, todo = [], [value]
    while todo:
        here = todo.pop()
        for key in _keys(here):
            found.append((here, key))
            if isinstance(here[key], dict | list):
                todo.append(here[key])
    return found


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def fresh(old: Any, rng: Random) -> Any:
    """Another value for `old`: mostly of its own kind, sometimes anything."""
    if rng.random() < 0.15:
        return copy.deepcopy(rng.choice(NUMBERS + TEXTS + OTHERS))
    if is_number(old):
        nudges = [
            old + rng.randint(-4, 4),
            old * 2,
            old // 2 if type(old) is int else old / 2,
            -old,
            old + 16,
            old + 64,
        ]
        return rng.choice(NUMBERS) if rng.random() < 0.4 else rng.choice(nudges)
    if isinstance(old, str):
        return rng.choice(TEXTS)
    return copy.deepcopy(rng.choice(OTHERS))


def mutate_json(value: Any, rng: Random) -> None:
    """One edit in place: a value, a key, an element; or one number wherever it stands, so that sizes still agree."""
    places = _places(value)
    if not places:
        return
    # Short paths are rare among the places and matter as much as the many long ones.
    here, key = rng.choice(places) if rng.random() < 0.8 else (value, rng.choice(_keys(value)))
    old = here[key]
    edit = rng.randrange(12)
    if edit == 0:
        del here[key]
    elif edit == 1 and isinstance(here, dict):
        here[rng.choice(["extra", "", "a" * 300, "\x1b[31m", *here])] = fresh(old, rng)
    elif edit == 1:
        here.insert(rng.randrange(len(here) + 1), copy.deepcopy(rng.choice([old, rng.choice(here)])))
    elif edit == 2:
        there, other = rng.choice(places)
        here[key] = copy.deepcopy(there[other])
    elif edit == 3 and isinstance(here, dict):
        other = rng.choice(list(here))
        here[key], here[other] = here[other], here[key]
    elif edit == 3:
        other = rng.randrange(len(here))
        here[key], here[other] = here[other], here[key]
    elif edit == 4 and isinstance(old, list):
        here[key] = old[: rng.randrange(len(old) + 1)] if rng.random() < 0.5 else old * 2
    elif edit in (5, 6) and is_number(old):
        replace_everywhere([value], old, fresh(old, rng))
    else:
        here[key] = fresh(old, rng)


def replace_everywhere(documents: list[Any], old: Any, new: Any) -> None:
    for document in documents:
        for here, key in _places(document):
            if type(here[key]) is type(old) and here[key] == old:
                here[key] = new
