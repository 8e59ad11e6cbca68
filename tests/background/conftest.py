"""A tokenizer with the marks, simulated edges, and what they took."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from tmlc.package.manifest import TickLayout
from tmlc.runtimes.background.injections import InjectionQueue
from tmlc.runtimes.core.live import Delivery, Moment, Published
from tmlc.runtimes.core.text import ByteTokenizer
from tmlc.runtimes.core.tick import TickOutput

PERIOD = 0.2
BEGIN, END, TASK, END_OF_TASK = 300, 301, 302, 303
NAMES = {"<injection>": BEGIN, "<end_of_injection>": END, "<delegation>": TASK, "<end_of_delegation>": END_OF_TASK}
LAYOUT = TickLayout(duration_ms=200, text_in=2, text_out=2)


def make_tokenizer() -> ByteTokenizer:
    return ByteTokenizer({b: b for b in range(256)}, NAMES)


class Edges:
    """Runs an inbox edge by edge, as the device thread does; keeps every delivery, and the quiet that follows."""

    def __init__(self, inbox, room: int = 64, say_room: int = 2) -> None:
        self.inbox, self.room, self.say_room = inbox, room, say_room
        self.tick, self.quiet = 0, 0.0
        self.user = self.model = False
        self.deliveries: list[Delivery] = []

    def edge(self, user: bool = False, model: bool | None = None, publish: bool = True) -> Delivery:
        """One edge: the inbox is told of the last tick's voices; then this tick has those given here."""
        self.quiet = 0.0 if self.user or self.model else self.quiet + PERIOD
        moment = Moment(
            self.tick, self.tick * PERIOD, self.user, self.model, self.quiet, self.room, self.say_room
        )
        delivery = self.inbox.take(moment)
        self.deliveries.append(delivery)
        self.user, self.model = user, bool(delivery.say) if model is None else model
        if publish:
            self.inbox.published(published(self.tick, delivery, user=user, model=self.model))
        self.tick += 1
        return delivery

    def edges(self, count: int, **voices) -> list[Delivery]:
        return [self.edge(**voices) for _ in range(count)]

    @property
    def said(self) -> str:
        return bytes(t for d in self.deliveries for t in d.say).decode()

    @property
    def thought(self) -> list[str]:
        """The texts between marks, of all edges together; each edge must close what it opens."""
        texts, now = [], None
        for delivery in self.deliveries:
            for token in delivery.inject:
                if token == BEGIN:
                    assert now is None
                    now = bytearray()
                elif token == END:
                    assert now is not None
                    texts.append(now.decode("utf-8", "replace"))
                    now = None
                else:
                    assert now is not None
                    now.append(token)
            assert now is None
        return texts


def published(tick: int, delivery: Delivery = Delivery(), tokens=(), user=False, model=False) -> Published:  # noqa: B008
    output = TickOutput(tick, list(tokens), "", np.zeros(0, np.float32), {}, {"silent": int(not tokens)})
    at = tick * PERIOD
    return Published(
        "sess", at, at, at + 0.1, output, delivery=delivery, user_speaking=user, model_speaking=model
    )


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return make_tokenizer()


@pytest.fixture
def queue(tokenizer):
    """make(playback=…, say_room=…): a queue whose events are in `queue.events`."""

    def make(**options) -> InjectionQueue:
        events = []
        queue = InjectionQueue(tokenizer, say_room=options.pop("say_room", 2), listener=events.append, **options)
        queue.events = events
        return queue

    return make


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when `condition()` is true; fails when it stays false."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
