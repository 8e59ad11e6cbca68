"""Snapshots that an attacker would send: a header, states or a length that lie, under a digest that is right again."""

from __future__ import annotations

import hashlib
import json
import struct
from random import Random

from edits import NUMBERS, damage, dumps, mutate_json

SNAPSHOT_MAGIC = b"TMLCSNP1"


def snapshot(blob: bytes, rng: Random) -> bytes:
    """A snapshot under a right digest whose header, states or length lie."""
    body = blob[:-32]
    (length,) = struct.unpack_from("<I", body, 8)
    head, rest = json.loads(body[12 : 12 + length]), bytearray(body[12 + length :])
    raw = None
    for _ in range(rng.choice((1, 1, 2, 3))):
        edit = rng.randrange(8)
        if edit == 0:
            mutate_json(head, rng)
        elif edit == 1:
            key = rng.choice(["seed", "tick", "positions", "last_clip", "temperature"])
            head[key] = rng.choice([*NUMBERS, 1e5, 0.7])
        elif edit == 2:
            key, most = rng.choice(["queue", "decoder"]), rng.choice([256, 272, 2**31])
            head[key] = [rng.randrange(most) for _ in range(rng.choice([1, 9, 70000]))]
        elif edit == 3:
            rest = bytearray(damage(bytes(rest), rng))
        elif edit in (4, 5):  # numbers in the states, aligned: positions, keys and values
            for _ in range(rng.choice((1, 8, 200))):
                at = rng.randrange(len(rest) // 8) * 8
                rest[at : at + 8] = struct.pack(
                    "<q", rng.choice([n for n in NUMBERS if type(n) is int and -(2**63) <= n < 2**63])
                )
        elif edit == 6:
            word = rng.choice([0x7FC00000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF, 1, 0x42C80000])
            begin = rng.randrange(len(rest) // 4) * 4
            size = min(len(rest) - begin, rng.choice([4, 4096, len(rest)]))
            rest[begin : begin + size] = struct.pack("<I", word) * (size // 4) + b"\0" * (size % 4)
        else:
            raw = damage(dumps(head), rng)
    text = dumps(head) if raw is None else raw
    size = len(text) if rng.random() < 0.95 else rng.choice([0, len(text) - 1, 2**31, 2**32 - 1])
    body = SNAPSHOT_MAGIC + struct.pack("<I", size) + text + bytes(rest)
    return body + hashlib.sha256(body).digest()
