"""Packages that an attacker would send: damaged bytes, and lies under digests that are right again.

Everything here is a function of the generator given, so a case is known by its number alone.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from edits import NUMBERS, OTHERS, TEXTS, damage, dumps, fresh, is_number, mutate_json, replace_everywhere

from tmlc.errors import PackageError
from tmlc.package import open_package, zipfile_io
from tmlc.package.writer import MANIFEST, SEAL, WEIGHTS, seal

PLAN = "engines/cpu/plan.json"
TOKENIZER = "tokenizer.json"
PAGE = 4096
GONE = (KeyError, TypeError, IndexError, ValueError, AttributeError)  # an edit before left no such thing to change


@dataclass
class Parts:
    """A package taken apart: its files in order (the manifest apart) and what `seal` shall write around them."""

    files: dict[str, bytes]
    manifest: dict[str, Any]
    manifest_text: bytes | None = None

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    def list_files(self) -> None:
        """Sizes and digests of the files as they are now: the first half of a right seal."""
        self.manifest["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in self.files.items()
        }


def take_apart(path: Path) -> Parts:
    with open_package(path) as package:
        files = {name: package.read(name) for name in package.names() if name != MANIFEST}
        return Parts(files, json.loads(package.read(MANIFEST)))


def reseal(data: bytes) -> bytes:
    """The digest of the bytes as they are, at the end where it belongs."""
    view = memoryview(data)
    try:
        members = zipfile_io.read_members(view, "")
    except PackageError:  # no digest will help
        members = {}
    return data[: -zipfile_io.TRAILER] + zipfile_io.COMMENT + zipfile_io.digests(view, members)[0].encode()


def put_together(parts: Parts) -> bytes:
    """A single-file package whose every digest is right."""
    out = io.BytesIO()
    writer = zipfile_io.ZipWriter(out)
    for name, data in parts.files.items():
        writer.add(name, len(data), [data], PAGE if name == WEIGHTS else 1)
    text = dumps(parts.manifest) if parts.manifest_text is None else parts.manifest_text
    writer.add(MANIFEST, len(text), [text])
    writer.finish()
    return out.getvalue()


def write_folder(folder: Path, parts: Parts) -> None:
    """The same as a folder, as far as the names can be those of files."""
    text = dumps(parts.manifest) if parts.manifest_text is None else parts.manifest_text
    for name, data in {**parts.files, MANIFEST: text, SEAL: seal(text)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# ---- packages ----


def plan(parts: Parts, rng: Random) -> None:
    """The table of tensors, the methods, the calls."""
    value = parts.json(PLAN)
    documents = [value, parts.manifest]
    if rng.random() < 0.3:  # more room, so that what is moved or made larger may still fit
        value["arena_bytes"] *= 1 + rng.randrange(4)
        larger = value["slot_bytes"] + 64 * rng.randrange(64)
        value["slot_bytes"] = parts.manifest["session_bytes"] = larger
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with suppress(*GONE):
            _edit_plan(value, documents, rng)
    if rng.random() < 0.5 and isinstance(value, dict) and type(value.get("slot_bytes")) is int:
        parts.manifest["session_bytes"] = value["slot_bytes"]
    parts.files[PLAN] = dumps(value)


def _edit_plan(value: Any, documents: list[Any], rng: Random) -> None:
    tensors, method = value["tensors"], rng.choice(value["methods"])
    tensor, code = rng.choice(tensors), method["code"]
    call = rng.choice(code)
    edit = rng.randrange(14)
    if edit == 0:
        key = rng.choice(["cols", "stride", "offset"])
        replace_everywhere(documents, tensor[key], fresh(tensor[key], rng))
    elif edit == 1:
        key = rng.choice(["cols", "stride", "offset", "space", "dtype", "name"])
        tensor[key] = rng.choice(tensors).get(key, 0) if rng.random() < 0.5 else fresh(tensor[key], rng)
    elif edit == 2:
        tensor["rows"][rng.randrange(2)] = rng.choice([0, 1, 2, 4, 5, 64, 2**24, *NUMBERS])
    elif edit == 3:
        call["t"][rng.randrange(len(call["t"]))] = rng.randrange(len(tensors))
    elif edit == 4:
        used = tensors[call["t"][rng.randrange(len(call["t"]))]]
        same = [i for i, t in enumerate(tensors) if (t["cols"], t["dtype"]) == (used["cols"], used["dtype"])]
        call["t"][rng.randrange(len(call["t"]))] = rng.choice(same)
    elif edit == 5:
        spot = rng.choice([(c, k) for c in code for k in range(len(c["i"]))])
        spot[0]["i"][spot[1]] = fresh(spot[0]["i"][spot[1]], rng)
    elif edit == 6:
        spot = rng.choice([(c, k) for c in code for k in range(len(c["f"]))])
        spot[0]["f"][spot[1]] = rng.choice([0.0, -1.0, 1e-310, 1e30, -1e30, 1e299, *NUMBERS])
    elif edit == 7:
        call["op"] = rng.choice([c["op"] for m in value["methods"] for c in m["code"]])
    elif edit == 8:
        code.remove(call)
    elif edit == 9:
        code.insert(rng.randrange(len(code) + 1), copy.deepcopy(rng.choice(rng.choice(value["methods"])["code"])))
    elif edit == 10:
        other = rng.choice(code)
        call["t"], other["t"] = other["t"], call["t"]
    elif edit == 11:
        limit = rng.choice([1, 2, 3, 5, 25, 33, 64, 200, 2**20, 2**24])
        for entry in [method, *(m for m in documents[1]["methods"] if m["name"] == method["name"])]:
            entry["max_n"] = limit
    else:
        mutate_json(value, rng)


def manifest(parts: Parts, rng: Random) -> None:
    """Sizes, states, tick layout, context, methods, tokenizer, targets, and the list of files itself."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        with suppress(*GONE):
            _edit_manifest(parts, rng)
    if rng.random() < 0.1:
        parts.manifest_text = damage(dumps(parts.manifest), rng)


def _edit_manifest(parts: Parts, rng: Random) -> None:
    value = parts.manifest
    tick, edit = value["tick"], rng.randrange(6)
    if edit == 0:
        mutate_json(value, rng)
    elif edit == 1:
        key = rng.choice(list(tick))
        tick[key] = fresh(tick[key], rng)
    elif edit == 2:
        tick |= {key: type(tick[key])(0) for key in rng.sample(list(tick), 3) if is_number(tick[key])}
    elif edit == 3:
        value["model"]["kind"] = rng.choice(["tokens", "interaction"])
        if rng.random() < 0.5:
            tick |= {"audio_in": rng.choice([0, 0, 1]), "audio_out": 0, "video_positions": rng.choice([0, 0, 6])}
    elif edit == 4:
        member = rng.choice([*parts.files, *TEXTS])
        if rng.random() < 0.5:
            value["tokenizer"] = member
        else:
            rng.choice(list(value["targets"].values()))["plan"] = member
    else:
        key = rng.choice([k for k in value if isinstance(value[k], dict | list)])
        mutate_json(value[key] or value, rng)


def header(parts: Parts, rng: Random) -> None:
    """The tensor tables of the weights and of the golden data."""
    name = rng.choice([WEIGHTS, WEIGHTS, "golden/golden.safetensors"])
    data = parts.files[name]
    length = int.from_bytes(data[:8], "little")
    value, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [k for k in value if k != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        entry, other = value.get(rng.choice(tensors)), value.get(rng.choice(tensors))
        edit = rng.randrange(6)
        if not isinstance(entry, dict) or not isinstance(other, dict) or edit == 0:
            mutate_json(value, rng)
        elif edit == 1:
            key = rng.choice(["dtype", "shape", "data_offsets"])
            entry[key], other[key] = other.get(key), entry.get(key)
        elif edit == 2:
            entry["dtype"] = rng.choice(["F32", "I32", "BF16", "F16", "U8", "I64", "F64", "BOOL", "F8_E4M3"])
        elif edit == 3:
            entry["shape"] = rng.choice([[], [0], [1], [2**31, 2**31], [2**61, 8], [-1], [1] * 9, [10**30], [True]])
        elif edit == 4:
            entry["data_offsets"] = [rng.choice(NUMBERS[:-3]), rng.choice(NUMBERS[:-3])]
        else:
            value[rng.choice(tensors)] = value.pop(rng.choice(tensors), None)
    text = dumps(value)
    if rng.random() < 0.15:  # a name twice, which no dict can hold
        text = text[:1] + dumps({rng.choice(tensors): rng.choice(list(value.values()))})[1:-1] + b"," + text[1:]
    text += b" " * (-(8 + len(text)) % rng.choice([PAGE, PAGE, PAGE, 64, 8, 1]))
    size = (
        len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**32, 2**63, 2**64 - 1])
    )
    parts.files[name] = size.to_bytes(8, "little") + text + rest


def weights(parts: Parts, rng: Random) -> None:
    """The numbers themselves: not finite, tiny, huge, or noise; whole tensors, ranges, single values."""
    data = bytearray(parts.files[WEIGHTS])
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    words = [
        0x7FC00000,
        0xFFC00000,
        0x7F800000,
        0xFF800000,
        0x7F7FFFFF,
        0xFF7FFFFF,
        1,
        0x80000000,
        0xFFFFFFFF,
        0x501502F9,
    ]
    for _ in range(rng.choice((1, 1, 2, 5))):
        spans = [v["data_offsets"] for k, v in table.items() if k != "__metadata__"]
        begin, end = rng.choice([*spans, *spans, [0, len(data) - start]])
        if rng.random() < 0.5 and end - begin >= 8:
            begin += rng.randrange((end - begin) // 4) * 4
            end = min(end, begin + rng.choice([4, 64, 1024]))
        size = end - begin
        pattern = struct.pack("<I", rng.choice(words)) * (size // 4 + 1)
        data[start + begin : start + end] = rng.randbytes(size) if rng.random() < 0.2 else pattern[:size]
    parts.files[WEIGHTS] = bytes(data)


def tokenizer(parts: Parts, rng: Random) -> None:
    """The vocabulary and everything around it, also of kinds that only the `tokenizers` package reads."""
    value = parts.json(TOKENIZER)
    vocab = dict(value["model"]["vocab"])
    small = {"a": 0, "h": 1, "e": 2, "l": 3, "[UNK]": 4}
    kinds: list[Any] = [
        {"type": "WordLevel", "vocab": rng.choice([small, {}, {"h": 2**32 - 1}, {"a": 999}]), "unk_token": "none"},
        {"type": "WordPiece", "vocab": small, "unk_token": rng.choice(["[UNK]", "no"]), "continuing_subword_prefix": "",
         "max_input_chars_per_word": rng.choice([0, 1, 100, 2**63])},
        {"type": "Unigram", "vocab": rng.choice([[], [["h", -1.0]], [["h", 1e308], ["", 0.0]]]),
         "unk_id": rng.choice([None, 0, 9])},
        {"type": "BPE", "vocab": small, "merges": rng.choice([["h e"], [["h", "e"]], ["x y"], ["h"], [["h"]]])},
        {"type": "BPE", "vocab": vocab, "merges": ["h e"], "dropout": rng.choice([0.5, 2, -1])},
    ]  # fmt: skip
    around = {
        "normalizer": [
            {"type": "Replace", "pattern": {"String": rng.choice(["", "h"])}, "content": "hh" * 50},
            {"type": "Precompiled", "precompiled_charsmap": rng.choice(["", "AAAA", "/////w==", "CAAAAP////8AAAAA"])},
            {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"}]},
        ],
        "pre_tokenizer": [
            {"type": "Split", "pattern": {"Regex": rng.choice(["(a*)*b", "(", "", ".{0,99999}", "(?R)"])},
             "behavior": "Isolated", "invert": False},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ],
        "decoder": [
            {"type": "Strip", "content": " ", "start": rng.choice([0, 2**40]), "stop": rng.choice([0, 2**40])},
            {"type": "ByteFallback"},
            {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
            {"type": "CTC", "pad_token": "h", "word_delimiter_token": "", "cleanup": True},
        ],
        "truncation": [
            {"direction": "Right", "max_length": rng.choice([0, 1]), "strategy": "LongestFirst", "stride": 9}
        ],
        "padding": [{"strategy": {"Fixed": rng.choice([0, 64, 5000])}, "direction": "Left", "pad_to_multiple_of": 0,
                     "pad_id": rng.choice([0, 2**32 - 1]), "pad_type_id": 0, "pad_token": "x"}],
    }  # fmt: skip
    for _ in range(rng.choice((1, 2, 3))):
        edit = rng.randrange(4)
        if edit == 0:
            value["model"] = rng.choice(kinds)
        elif edit == 1:
            key = rng.choice(list(around))
            value[key] = rng.choice(around[key])
        elif edit == 2:
            ids = list(vocab.values())
            vocab |= {rng.choice(list(vocab)): rng.choice([rng.choice(ids), *NUMBERS, [], {}, None, "1"])}
            value["model"]["vocab"] = rng.choice([vocab, list(vocab.items()), [[[], 1]]])
        else:
            mutate_json(value, rng)
        if not isinstance(value.get("model"), dict):
            break
    parts.files[TOKENIZER] = dumps(value) if rng.random() < 0.9 else damage(dumps(value), rng)


def golden(parts: Parts, rng: Random) -> None:
    """The recorded calls that `tmlc verify` replays, and the records that `tmlc inspect` shows."""
    if rng.random() < 0.2:
        parts.manifest["pipeline"] = [
            {"pass": rng.choice(NUMBERS[:30] + TEXTS + OTHERS[:8]), "config": rng.choice([None, 1, {}])}
        ]
        parts.files["program.ir"] = damage(parts.files["program.ir"], rng)
        return
    value = parts.json("golden/golden.json")
    for _ in range(rng.choice((1, 1, 2))):
        mutate_json(value, rng)
        if not value:
            break
    parts.files["golden/golden.json"] = dumps(value)


# ---- the container ----


def container(data: bytes, parts: Parts, rng: Random) -> bytes:
    """A zip that lies: names, sizes, places, counts, methods, flags, 64-bit fields."""
    edit = rng.randrange(8)
    if edit < 3:
        return reseal(_lie_in_a_record(bytearray(data), rng))
    if edit < 6:
        return _strange_member(parts, rng)
    if edit == 6:
        return _wide_end(data, rng)
    return _compressed(parts, rng)


def _records(data: bytes) -> tuple[list[int], list[int], int]:
    """Offsets of the local headers, of the directory's entries, and of the end record."""
    end = len(data) - zipfile_io.TRAILER - 22
    count, _, at = struct.unpack_from("<HII", data, end + 10)
    local, central = [], []
    for _ in range(count):
        n_name, n_extra = struct.unpack_from("<HH", data, at + 28)
        local.append(struct.unpack_from("<I", data, at + 42)[0])
        central.append(at)
        at += 46 + n_name + n_extra
    return local, central, end


def _lie_in_a_record(data: bytearray, rng: Random) -> bytes:
    local, central, end = _records(data)
    fields = {  # offset and width of every number
        "local": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
        "central": [(4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2),
                    (36, 2), (38, 4), (42, 4)],
        "end": [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
    }  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.choice(["local", "central", "central", "end"])
        base = rng.choice(local) if kind == "local" else rng.choice(central) if kind == "central" else end
        at, width = rng.choice(fields[kind])
        old = int.from_bytes(data[base + at : base + at + width], "little")
        known = [*local, *(struct.unpack_from("<I", data, c + 24)[0] for c in central)]
        new = rng.choice([0, 1, 8, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 0xA1FF0000, old + 1, old - 1, *known])
        data[base + at : base + at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
        if kind == "central" and rng.random() < 0.3:  # both sizes agree on the lie
            data[base + 20 : base + 24] = data[base + 24 : base + 28]
    if rng.random() < 0.2:  # bytes of a name, in the directory and where it lies, or in one of them
        k = rng.randrange(len(local))
        name = rng.choice([b"../", b"/et", b"a\0b", b"..\\", b"\xff\xfe\xfd"])
        data[central[k] + 46 : central[k] + 49] = name
        if rng.random() < 0.7:
            data[local[k] + 30 : local[k] + 33] = name
    return bytes(data)


def _strange_member(parts: Parts, rng: Random) -> bytes:
    out = io.BytesIO()
    writer = zipfile_io.ZipWriter(out)
    names = [
        "../x",
        "/x",
        "a//b",
        "a/./b",
        "a/../b",
        "x/",
        "\\x",
        "C:/x",
        "",
        " ",
        "é",
        "a" * 300,
        "CON",
        MANIFEST,
        *parts.files,
    ]
    name, data = rng.choice(names), rng.choice([b"", b"{}", b"x" * 5000])
    if rng.random() < 0.7:
        parts.manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    members = [*parts.files.items(), (MANIFEST, dumps(parts.manifest))]
    members.insert(rng.randrange(len(members) + 1), (name, data))
    if rng.random() < 0.3:
        del members[rng.randrange(len(members))]
    if rng.random() < 0.05:
        members += [(f"f{k}", b"") for k in range(5000)]
    for name, data in members:
        writer.add(
            name, len(data), [data], rng.choice([1, PAGE, 65000 if len(data) < 9999 else 64]) if name == WEIGHTS else 1
        )
    if rng.random() < 0.3:  # an entry that says it is a link, or a folder
        entry = writer.central[-1]
        writer.central[-1] = entry[:38] + struct.pack("<I", rng.choice([0o120777, 0o040755]) << 16) + entry[42:]
    if rng.random() < 0.3:
        rng.shuffle(writer.central)
    writer.finish()
    return out.getvalue()


def _wide_end(data: bytes, rng: Random) -> bytes:
    """64-bit end records that nobody needs, right or wrong."""
    _, central, end = _records(data)
    count, size, start = len(central), end - central[0], central[0]
    lie = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, start, end])
    values = [count, count, size, start]
    if rng.random() < 0.7:
        values[rng.randrange(4)] = lie
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", rng.choice([44, 0, 2**64 - 1]), 45, 45, 0, 0, *values)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, rng.choice([end, end, end, lie]), rng.choice([1, 1, 1, 0]))
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, min(size, 2**32 - 1), 2**32 - 1, zipfile_io.TRAILER)
    return reseal(data[:end] + end64 + locator + last + bytes(zipfile_io.TRAILER))


def _compressed(parts: Parts, rng: Random) -> bytes:
    """One member deflated, as an ordinary zip tool would write it; sometimes a bomb."""
    out = io.BytesIO()
    writer = zipfile_io.ZipWriter(out)
    chosen = rng.choice(list(parts.files))
    for name, data in [*parts.files.items(), (MANIFEST, dumps(parts.manifest))]:
        if name != chosen:
            writer.add(name, len(data), [data], PAGE if name == WEIGHTS else 1)
            continue
        raw = bytes(2**26) if rng.random() < 0.1 else data
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(raw) + packer.flush()
        writer.add(name, len(packed), [packed])
        entry = bytearray(writer.central[-1])
        struct.pack_into("<H", entry, 10, 8)
        struct.pack_into("<I", entry, 24, len(raw))
        writer.central[-1] = bytes(entry)
    writer.finish()
    return out.getvalue()


RESEALED: dict[str, Callable[[Parts, Random], None]] = {
    f.__name__: f for f in (plan, manifest, header, weights, tokenizer, golden)
}


def write_case(kind: str, original: bytes, parts: Parts, rng: Random, path: Path) -> None:
    """Writes a mutated package, a file or a folder; `parts` is not changed."""
    parts = Parts(dict(parts.files), copy.deepcopy(parts.manifest))
    if kind in ("damage", "container"):
        path.write_bytes(damage(original, rng) if kind == "damage" else container(original, parts, rng))
        return
    # The list of files must be right after the files changed, and may itself be lied in.
    if kind != "manifest":
        RESEALED[kind](parts, rng)
        parts.list_files()
    else:
        manifest(parts, rng)
    if rng.random() < 0.2:
        write_folder(path, parts)
    else:
        path.write_bytes(put_together(parts))
