"""Detectors that an operator registers: Python that looks at the conversation after each tick and says what it sees.

They run beside the ticks, in threads of the worker, one call of each at a time and session: while a slow one looks,
the ticks that it misses are left out and counted. What it sees reaches the rules at the next edge, once each time that
its answer turns from no to yes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tmlc.errors import CapacityError
from tmlc.runtimes.background.model import Context
from tmlc.runtimes.background.worker import Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a detector is shown: a tick that was done, the voices in it, the conversation up to it."""

    tick: int
    user_speaking: bool
    model_speaking: bool
    context: Context


Detector = Callable[[Sight], bool]


class Watch:
    """The detectors of one session. `look` on the event loop, `seen` on the device thread.

    Attributes:
        skipped: calls left out because the last one had not come back, or because the worker is full.
        failed: calls that raised.
    """

    def __init__(self, detectors: Mapping[str, Detector], worker: Worker) -> None:
        self._detectors, self._worker = dict(detectors), worker
        self._looking: set[str] = set()
        self._was: dict[str, bool] = {}
        self._found: deque[str] = deque(maxlen=64)
        self.skipped = self.failed = 0

    def __bool__(self) -> bool:
        return bool(self._detectors)

    def look(self, sight: Sight) -> None:
        """Shows every detector that is free what there is to see."""
        for name, detector in self._detectors.items():
            if name in self._looking:
                self.skipped += 1
                continue
            self._looking.add(name)
            try:
                self._worker.submit(self._ask(name, detector, sight))
            except CapacityError:
                self._looking.discard(name)
                self.skipped += 1

    async def _ask(self, name: str, detector: Detector, sight: Sight) -> None:
        try:
            found = bool(await asyncio.get_running_loop().run_in_executor(None, detector, sight))
        except Exception as error:  # a detector's fault is no yes
            self.failed += 1
            log.warning("the detector %s raised %s", name, type(error).__name__)
            found = False
        finally:
            self._looking.discard(name)
        if found and not self._was.get(name):
            self._found.append(name)
        self._was[name] = found

    def seen(self) -> list[str]:
        """The detectors that have turned to yes since the last call."""
        names = []
        while self._found:
            names.append(self._found.popleft())
        return names
