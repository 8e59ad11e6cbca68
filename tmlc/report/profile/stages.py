"""The stages of a tick, from when each call of a method began and ended."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

INPUTS = frozenset({"embed_audio", "embed_text", "embed_video"})
"""Methods that what came in goes through before it is decoded."""
FRAME, APPEND, ENCODE = "frame_input", "append", "encode_output"


class MethodCall(NamedTuple):
    """One call of a method, in ns of `time.perf_counter_ns`."""

    method: str
    begin: int
    end: int


def tick_stages(calls: Sequence[MethodCall], started: int, ended: int, waited_ms: float) -> dict[str, float]:
    """Milliseconds of each stage of one tick; what is left of it is Python between the calls.

    - `frame_input`: until the first call: the input is checked, cut to the tick and copied (without the wait for the
      device, which comes first).
    - `append`: the decode calls that take in what came; `decode[0]`, `decode[1]`, …: those after it, each a step.
    - other methods by their name (`speak` is the flow head, `vocode` the vocoder), all their calls together.
    - `encode_output`: after the last call: text from tokens, samples checked.
    """
    stages = {FRAME: 0.0}
    steps, taking_in = 0, True
    # What ran while this session waited was another's tick.
    own = [call for call in calls if call.begin >= started + waited_ms * 1e6 and call.end <= ended]
    for call in own:
        taking_in = taking_in and (call.method == "decode" or call.method in INPUTS)
        name = call.method
        if name == "decode":
            name = APPEND if taking_in else f"decode[{steps}]"
            steps += not taking_in
        stages[name] = stages.get(name, 0.0) + (call.end - call.begin) / 1e6
    if own:
        stages[FRAME] = (own[0].begin - started) / 1e6 - waited_ms
        stages[ENCODE] = (ended - own[-1].end) / 1e6
    return stages


def in_order(stages: Iterable[str]) -> list[str]:
    """Names of stages: framing first, encoding last, steps by number behind the append, the others as they came."""

    def key(item: tuple[int, str]) -> tuple[int, int, int]:
        place, name = item
        step = re.fullmatch(r"decode\[(\d+)\]", name)
        rank = 0 if name == FRAME else 4 if name == ENCODE else 1 if name in INPUTS else 2
        return (2, 0, 0) if name == APPEND else (2, 1, int(step[1])) if step else (3 if rank == 2 else rank, place, 0)

    return [name for _, name in sorted(enumerate(stages), key=key)]
