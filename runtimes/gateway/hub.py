"""What the connections of a server share: its sessions, the names of its model, pictures, errors for the wire."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import numpy as np

from tmlc.errors import InputError, TmlcError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.gateway.fields import WireError, as_wire
from tmlc.runtimes.gateway.frames import FrameDecoder, ImageLimits
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.sessions import LiveSession, Opening, Sessions

SESSION_SECONDS = 24 * 3600
log = logging.getLogger(__name__)


class Hub:
    """Made once for a server, on its event loop.

    Args:
        sessions: of the server.
        model: the name that clients ask for; aliases: further ones.
        image_limits: of pictures.
        session_seconds: what clients are told of how long a session lives.
    """

    def __init__(
        self,
        sessions: Sessions,
        observer: Observer,
        model: str,
        aliases: tuple[str, ...] = (),
        image_limits: ImageLimits | None = None,
        session_seconds: float = SESSION_SECONDS,
    ) -> None:
        self.sessions, self.observer, self.model, self.aliases = sessions, observer, model, aliases
        self.session_seconds = session_seconds
        self.created = int(time.time())
        self.image_limits = image_limits or ImageLimits()
        layout = self.layout
        sees = layout.video_positions > 0
        self._frames = FrameDecoder(layout.frame_height, layout.frame_width, self.image_limits) if sees else None

    @property
    def layout(self) -> TickLayout:
        return self.sessions.scheduler.engine.layout

    def check_model(self, name: str, param: str) -> None:
        """Raises WireError for a model that is not served here."""
        if name != self.model and name not in self.aliases:
            raise WireError(f"the model {name!r} does not exist here: ask for {self.model}", "model_not_found", param)

    def models(self) -> list[dict[str, Any]]:
        """The served names as OpenAI lists models."""
        names = (self.model, *self.aliases)
        return [{"id": name, "object": "model", "created": self.created, "owned_by": "tmlc"} for name in names]

    def open(self, opening: Opening) -> LiveSession:
        """A new session. Raises WireError when it is refused."""
        try:
            return self.sessions.open(opening)
        except TmlcError as error:
            raise as_wire(error) from error

    def explain(self, error: Exception) -> WireError:
        """Any error for a client; what is not ours says nothing of its inside."""
        if isinstance(error, WireError):
            return error
        return (
            as_wire(error)
            if isinstance(error, TmlcError)
            else WireError("internal error", "server_error", kind="server_error")
        )

    async def warm(self) -> None:
        """Starts what the first client would wait for."""
        if self._frames is not None:
            try:
                await self._frames.start()
            except InputError as error:  # the first picture tries again, and tells its client
                log.warning("%s", error.what)

    async def frame(self, data: bytes, param: str) -> np.ndarray:
        """A picture as the model sees it. Raises WireError."""
        if self._frames is None:
            raise WireError("this model does not see", "not_supported", param)
        try:
            return await self._frames.decode(data)
        except InputError as error:
            self.observer.dropped("input_video", 1)
            wire = as_wire(error)
            wire.param = param
            raise wire from None

    def playback(self, session: LiveSession, event: dict[str, Any]) -> None:
        """The client says what it has played: `played_ms` of the output, or ticks `unplayed: [first, last]`."""
        played, unplayed = event.get("played_ms"), event.get("unplayed")
        if isinstance(played, int | float) and not isinstance(played, bool) and 0 <= played < 1e12:
            session.beside.played(ms=float(played))
        elif isinstance(unplayed, list) and len(unplayed) == 2 and all(map(_is_tick, unplayed)):
            session.beside.unplayed(unplayed[0], unplayed[1])
        else:
            raise WireError("playback is played_ms or unplayed: [first tick, last tick]", "invalid_value", "played_ms")

    async def close(self) -> None:
        """Writes what is to be kept; ends workers and the background."""
        await self.sessions.flush()
        if self._frames is not None:
            await asyncio.to_thread(self._frames.close)
        await self.sessions.background.close()


def _is_tick(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53
