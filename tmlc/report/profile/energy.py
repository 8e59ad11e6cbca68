"""Energy of the processor's packages, where the system tells it: the powercap files of Linux (RAPL, Intel and AMD)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
IDLE_SECONDS = 1.0


class Meter:
    """Reads the energy counters of all packages; they wrap around.

    Raises:
        OSError: there are none, or they must not be read; the message says so.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if not zones:
            raise OSError("this machine does not tell its energy: no powercap zones of the processor's packages")
        self._files = [zone / "energy_uj" for zone in zones]
        try:
            self._ranges = [int((zone / "max_energy_range_uj").read_text(encoding="ascii")) for zone in zones]
            self._last = self._read()
        except (OSError, ValueError) as error:
            raise OSError(f"the energy counters cannot be read: {error}") from error
        self._joules = 0.0

    def _read(self) -> list[int]:
        return [int(file.read_text(encoding="ascii")) for file in self._files]

    def joules(self) -> float:
        """Energy since the meter was made. Asked at least once per wrap (about a minute at 1 kW), it misses nothing."""
        now = self._read()
        for k, (value, last, most) in enumerate(zip(now, self._last, self._ranges, strict=True)):
            self._joules += ((value - last) % (most + 1)) / 1e6
            self._last[k] = value
        return self._joules

    def idle_watts(self, seconds: float = IDLE_SECONDS) -> float:
        """Power while this process waits; whatever else the machine does is in it."""
        before = self.joules()
        time.sleep(seconds)
        return (self.joules() - before) / seconds


def energy(joules: float, seconds: float, ticks: int, idle_watts: float | None) -> dict[str, Any]:
    """The record `energy` of a profile: of all packages, over the whole time in which ticks were played."""
    return {
        "source": "powercap",
        "joules": joules,
        "watts": joules / seconds,
        "joules_per_tick": joules / ticks,
        "idle_watts": idle_watts,
    }
