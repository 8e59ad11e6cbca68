"""The parts of a profile that not every target, machine or call can measure: each is there, or there is a reason.

A part is computed in a module of its own, which calls `measured` or `missing`; the JSON form has every part at its top
level, null beside an entry of `not_measured` where there is a reason instead of a value.
"""

from __future__ import annotations

from typing import Any

SCHEMA = 2
"""Version of the JSON form, described by profile.schema.json. It changes when a reader of the last would be wrong."""

PARTS = (
    *("kernels", "ceilings", "profiling_cost", "memory_map", "passes", "ablation", "sessions_held", "stop_latency"),
    *("hesitation", "energy", "instructions", "noise", "scenario", "quality", "advice"),
)


class Parts:
    """What was found about each of `PARTS`."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._reasons = dict.fromkeys(PARTS, "this version of tmlc profile does not measure it")

    def measured(self, part: str, value: Any) -> None:
        """`value` is JSON, and not None."""
        assert part in PARTS and value is not None, part
        self._values[part] = value
        self._reasons.pop(part, None)

    def missing(self, part: str, why: str) -> None:
        """`why`: one sentence that says what it would take."""
        assert part in PARTS, part
        self._values.pop(part, None)
        self._reasons[part] = why

    def to_json(self) -> dict[str, Any]:
        return {**{part: self._values.get(part) for part in PARTS}, "not_measured": dict(self._reasons)}
