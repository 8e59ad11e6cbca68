"""What lies in an engine's memory: every weight and state by name, and what all calls share."""

from __future__ import annotations

import re
from typing import Any

from tmlc.package.manifest import Manifest
from tmlc.package.reader import Package

_LAYER = re.compile(r"\blayers?\.(\d+)\b")
_CACHE = re.compile(r"\w+\.(\d+)\.[kv]_cache")
PADDING = "(alignment)"


def memory_map(package: Package) -> list[dict[str, Any]]:
    """The part `memory_map` of a profile; `weights`, `states`, `arena` and `scratch` add up to the same of `bytes`
    (`states` to `slot`: of one session)."""
    manifest: Manifest = package.manifest
    memory = manifest.memory
    entries = [_entry("weights", name, tensor.nbytes) for name, tensor in sorted(package.tensors.items())]
    entries += _rest("weights", memory.weight_bytes, entries)
    states = [_entry("states", state.name, state.bytes) for state in manifest.states]
    entries += states + _rest("states", manifest.session_bytes, states)
    return [*entries, _entry("arena", "arena", memory.arena_bytes), _entry("scratch", "scratch", memory.scratch_bytes)]


def _entry(what: str, name: str, nbytes: int) -> dict[str, Any]:
    match = _LAYER.search(name) if what == "weights" else _CACHE.fullmatch(name)
    return {"what": what, "name": name, "layer": int(match[1]) if match else None, "bytes": int(nbytes)}


def _rest(what: str, total: int, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What lies between the tensors, so that the parts add up."""
    left = total - sum(entry["bytes"] for entry in entries)
    return [{"what": what, "name": PADDING, "layer": None, "bytes": left}] if left else []
