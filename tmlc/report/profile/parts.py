"""The parts of a profile that not every target, machine or call can measure: each is there, or there is a reason.

A part is computed in a module of its own, which calls `measured` or `missing`; the JSON form has every part at its top
level, null beside an entry of `not_measured` where there is a reason instead of a value.
"""

from __future__ import annotations

from typing import Any

SCHEMA = 3
"""Version of the JSON form, described by profile.schema.json. It changes when a reader of the last would be wrong."""

PARTS = (
    *("kernels", "ceilings", "profiling_cost", "memory_map", "passes", "ablation", "sessions_held", "stop_latency"),
    *("hesitation", "energy", "instructions", "noise", "scenario", "sittings", "quality", "advice"),
)


NOT_ASKED = {
    "ablation": "not asked for: profile with --ablate and --checkpoint",
    "sessions_held": "not asked for: profile with --find-sessions",
}


class Parts:
    """What was found about each of `PARTS`."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._reasons = dict.fromkeys(PARTS, "this version of tmlc profile does not measure it") | NOT_ASKED

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

    @staticmethod
    def add(view: dict[str, Any], part: str, value: Any) -> None:
        """Puts a part into a profile that is there already: what is measured behind the session, with other engines."""
        assert part in PARTS and value is not None, part
        view[part] = value
        view["not_measured"].pop(part, None)

    def to_json(self) -> dict[str, Any]:
        return {**{part: self._values.get(part) for part in PARTS}, "not_measured": dict(self._reasons)}
