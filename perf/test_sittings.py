"""What moves from one sitting to the next: the process, the load, or the time? Three kinds in turns, of one package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.report.profile.sittings import STEP, TICKS, WARM, Sittings, undisturbed
from tmlc.report.scenario.inputs import busy_case
from tmlc.report.scenario.show import Show

ROUNDS = 20


@pytest.mark.parametrize("huge_pages", [False, True], ids=["usual pages", "large pages"])
def test_what_moves_between_sittings(nano: Path, figure: Callable[..., None], huge_pages: bool) -> None:
    settings = {"threads": 1, "huge_pages": huge_pages}
    quiet: dict[str, list[float]] = {"fresh processes": [], "fresh loads": [], "sessions of one engine": []}
    medians: list[float] = []
    with tmlc.load(nano, **settings) as engine:
        shape = tick_shape(engine.manifest)
        case = busy_case(engine, shape, (WARM + TICKS) * shape.seconds).model_copy(update={"warm_up": WARM})
        fresh = Sittings(nano, settings, case, shape, 0, None, ROUNDS)

        def played(one: Any) -> list[float]:
            return [tick.step_ms for tick in Show(one, case, shape).ticks()][1:]

        for _ in range(ROUNDS):
            fresh.measure()
            with tmlc.load(nano, **settings) as other:
                quiet["fresh loads"].append(undisturbed(played(other)))
            steps = played(engine)
            quiet["sessions of one engine"].append(undisturbed(steps))
            medians.append(float(np.median(steps)))
        quiet["fresh processes"] = fresh.to_json()["figures"][STEP]
    pages = "large pages" if huge_pages else "usual pages"
    for name, values in quiet.items():
        figure(f"{pages}: undisturbed steps of {name} differ by", 100 * float(np.std(np.log(values))), "%")
    figure(f"{pages}: median steps of sessions of one engine differ by", 100 * float(np.std(np.log(medians))), "%")
    apart = [float(np.median(v)) for v in (quiet["fresh processes"], quiet["sessions of one engine"])]
    figure(f"{pages}: fresh processes against sessions of one engine", 100 * (apart[0] / apart[1] - 1), "%")
