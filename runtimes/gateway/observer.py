"""What the gateway tells whoever watches it: metrics, traces, logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tmlc.runtimes.core.live import Published


class Observer:
    """Every method is called on the event loop, must return at once, and does nothing here."""

    def session_opened(self, session: str, dialect: str) -> None:
        """A session was admitted."""

    def session_ended(self, session: str, reason: str) -> None:
        """A session left the scheduler (`EndReason`)."""

    def session_resumed(self, session: str) -> None:
        """A client took a session over again."""

    def refused(self, reason: str) -> None:
        """A request was refused: "capacity", "key", "origin", "rate", "sessions_per_key" …"""

    def tick(self, out: Published) -> None:
        """One tick of one session was done."""

    def handed_out(self, session: str, tick: int, when: float) -> None:
        """The audio of a tick was written to the socket, at `when` of time.monotonic."""

    def interrupted(self, session: str, seconds: float) -> None:
        """The model fell silent so long after the user's voice had begun over its own."""

    def dropped(self, stream: str, count: int) -> None:
        """A bounded stream overflowed: "input_audio", "input_video", "input_text" or "output"."""

    def delegation(self, session: str, event: str, seconds: float) -> None:
        """A delegation was created, done, failed, given up or cancelled."""

    def injected(self, session: str, policy: str) -> None:
        """An injection was delivered."""

    def message(self, dialect: str, direction: str, kind: str) -> None:
        """An event went over a socket: direction "in" or "out"."""

    def loop_lag(self, seconds: float) -> None:
        """The event loop came so much later than it had asked for."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, all_of_them: Sequence[Observer]) -> None:
        for name in (name for name in vars(Observer) if not name.startswith("_")):
            setattr(self, name, _each([getattr(one, name) for one in all_of_them]))


def _each(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def call(*args: object) -> None:
        for method in methods:
            method(*args)

    return call
