"""How many sessions a key may hold: a place is taken when a session begins and given back when it ends.

A session whose client has left keeps its place, as it keeps its slot; so opening and dropping wins nothing. Going on
with a session that lives takes no other place. Sockets are bounded beside, at twice the sessions: one that comes back
may be there before the server has seen the old one die.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tmlc.errors import CapacityError, UsageError
from tmlc.runtimes.core.live import Ended
from tmlc.runtimes.gateway.caps import PASS
from tmlc.runtimes.gateway.sessions import LiveSession, Opening, Sessions

RETRY_SECONDS = 5.0


class Places:
    """The sessions and sockets of each key. Every session of a server without keys counts as one key's.

    Args:
        most: sessions of one key.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._sessions, self._sockets = Counter[str](), Counter[str]()

    def free(self, name: str) -> bool:
        """May the key have one session more?"""
        return self._sessions[name] < self.most

    def take(self, name: str) -> bool:
        """A session of the key begins; False: it may not."""
        return _more(self._sessions, name, self.most)

    def give(self, name: str) -> None:
        """A session of the key has ended."""
        _less(self._sessions, name)

    def connect(self, name: str) -> bool:
        """A socket of the key comes; False: it has too many."""
        return _more(self._sockets, name, 2 * self.most)

    def disconnect(self, name: str) -> None:
        _less(self._sockets, name)


def _more(held: Counter[str], name: str, most: int) -> bool:
    if held[name] >= most:
        return False
    held[name] += 1
    return True


def _less(held: Counter[str], name: str) -> None:
    held[name] -= 1
    if held[name] <= 0:
        del held[name]


class KeyedSessions(Sessions):
    """Sessions that belong to keys: the one that `PASS` names while a session is opened.

    Args:
        places: of the keys. The others: see `Sessions`.
    """

    def __init__(self, places: Places, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.places = places
        self._owners: dict[str, str] = {}

    def open(self, opening: Opening, blob: bytes | None = None, last_event: int = 0) -> LiveSession:
        """As `Sessions.open`.

        Raises CapacityError: the key has as many sessions as it may. UsageError: its secret is for another model.
        """
        came = PASS.get()
        if came.model is not None and model_of(opening) != came.model:
            raise UsageError("the client secret was made for another model", fix=f"ask for {came.model}")
        if not self.places.take(came.name):
            raise self._full()
        try:
            session = super().open(opening, blob, last_event)
        except BaseException:
            self.places.give(came.name)
            raise
        self._owners[session.id] = came.name
        return session

    async def _restored(self, token: str, dialect: str) -> LiveSession:
        """A session that does not live any more takes a place again; asked before its token is used up."""
        if not self.places.free(PASS.get().name):
            raise self._full()
        return await super()._restored(token, dialect)

    def forget(self, session: LiveSession, ended: Ended) -> None:
        """It has ended: its place is free."""
        owner = self._owners.pop(session.id, None)
        if owner is not None:
            self.places.give(owner)
        super().forget(session, ended)

    def _full(self) -> CapacityError:
        self.observer.refused("sessions_per_key")
        error = CapacityError(f"this key has {self.places.most} sessions already", fix="end one of them first")
        error.retry_after = RETRY_SECONDS
        return error


def model_of(opening: Opening) -> str | None:
    """The model that the client asked for, which both dialects keep in what they write to disk."""
    for part in ("resolved", "session"):
        found = opening.config.get(part)
        if isinstance(found, dict) and isinstance(found.get("model"), str):
            return str(found["model"])
    return None
