"""Delegations: how they start, what of them enters the conversation, and that a hostile model costs only itself."""

import asyncio
import threading
import time

import numpy as np
import pytest

from tmlc.errors import BackgroundError, CapacityError, SessionError, UsageError
from tmlc.runtimes.background import delegations as room
from tmlc.runtimes.background.callable import CallableModel
from tmlc.runtimes.background.delegations import Limits, Stage
from tmlc.runtimes.background.injections import CUT_MARK, MAX_TOKENS
from tmlc.runtimes.background.model import BackgroundModel, Origin, Progress, Result, ToolCall
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.background.worker import MAX_RUNNING, Worker

from .conftest import END_OF_TASK, LAYOUT, TASK, Edges, published, until

FAST = Limits(timeout=0.3, progress_after=0.05)


class Beside:
    """A session's background with its events; made and closed on the loop of the test."""

    def __init__(self, tokenizer, model, limits=None, **options) -> None:
        self.shared = Background(model, limits=limits, instructions="be brief")
        self.events, self.fates = [], []
        self.session = self.shared.open(
            tokenizer, LAYOUT, on_delegation=self.events.append, on_injection=self.fates.append, **options
        )
        self.edges = Edges(self.session)

    def stages(self, delegation=None):
        return [e.stage for e in self.events if delegation is None or e.delegation.id == delegation.id]

    async def ended(self, count=1):
        final = {Stage.DONE, Stage.FAILED, Stage.TIMEOUT, Stage.CANCELLED}
        await until(lambda: sum(stage in final for stage in self.stages()) >= count)

    async def close(self):
        self.session.close()
        await self.shared.close()


def run(scene, tokenizer, model, limits=None, **options):
    """Plays `scene(beside)` on a loop of its own."""

    async def play():
        beside = Beside(tokenizer, model, limits, **options)
        try:
            await scene(beside)
        finally:
            await beside.close()

    asyncio.run(play())


class Says(BackgroundModel):
    """Yields what it was given, whatever it is."""

    def __init__(self, *events) -> None:
        self.events = events

    async def run(self, delegation, context):
        for event in self.events:
            yield event


class Hangs(BackgroundModel):
    """Never comes to an end; knows how often it was cancelled."""

    def __init__(self) -> None:
        self.started = self.cancelled = 0

    async def run(self, delegation, context):
        self.started += 1
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield Result("never")


def test_a_result_is_said_once_the_conversation_is_idle(tokenizer):
    async def scene(beside):
        delegation = beside.session.delegate("weather?")
        assert delegation.origin is Origin.CLIENT and delegation.task == "weather?"
        await beside.ended()
        beside.edges.edges(20)
        assert beside.edges.said == "rain"
        assert beside.stages() == [Stage.CREATED, Stage.DONE]
        await until(lambda: [f.fate for f in beside.fates] == ["entered", "delivered"])
        assert beside.events[-1].injection == beside.fates[0].id

    run(scene, tokenizer, CallableModel(lambda delegation, context: "rain"))


def test_the_context_is_the_conversation_at_the_tick_of_the_delegation(tokenizer):
    seen = []

    async def model(delegation, context):
        seen.append((delegation, context))
        return "ok"

    async def scene(beside):
        frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        beside.session.tick(published(0, tokens=b"he"))
        beside.session.tick(published(1, tokens=b"y"))
        beside.session.heard("what is it?")
        beside.session.saw(frame)
        frame[:] = 0
        beside.session.delegate("look")
        beside.session.heard(" too late")
        await beside.ended()
        ((delegation, context),) = seen
        assert (delegation.tick, delegation.offset_ms) == (2, 400)
        assert [(line.speaker, line.text, line.start_ms) for line in context.lines] == [
            ("model", "hey", 0),
            ("user", "what is it?", 400),
        ]
        assert context.instructions == "be brief" and context.frames[0].pixels.sum() == sum(range(12))
        assert not context.frames[0].pixels.flags.writeable

    run(scene, tokenizer, CallableModel(model))


def test_the_model_delegates_by_its_tokens_and_the_task_is_not_said(tokenizer):
    async def scene(beside):
        first = beside.session.tick(published(0, tokens=[*b"o", TASK, *b"find "]))
        second = beside.session.tick(published(1, tokens=[*b"it", END_OF_TASK, *b"k"]))
        assert first.text + second.text == "ok" and not first.delegations
        assert [(d.task, d.origin, d.tick) for d in second.delegations] == [("find it", Origin.TOKEN, 2)]
        await beside.ended()
        assert beside.session.tick(published(2, tokens=[TASK, END_OF_TASK, *b"!"])).delegations == ()

    run(scene, tokenizer, CallableModel(lambda delegation, context: delegation.task))


def test_a_task_without_end_is_bounded(tokenizer):
    async def scene(beside):
        beside.session.tick(published(0, tokens=[TASK, *b"x" * 100_000]))
        noted = beside.session.tick(published(1, tokens=[END_OF_TASK]))
        assert 0 < len(noted.delegations[0].task) <= 2048

    run(scene, tokenizer, CallableModel(lambda delegation, context: "ok"))


def test_four_live_and_the_fifth_is_refused(tokenizer):
    async def scene(beside):
        for n in range(4):
            beside.session.delegate(f"task {n}")
        with pytest.raises(CapacityError, match="live already"):
            beside.session.delegate("one too many")
        noted = beside.session.tick(published(0, tokens=[TASK, *b"more", END_OF_TASK]))
        assert noted.delegations == () and beside.session.refused == 1
        assert beside.session.delegations.cancel(beside.events[0].delegation.id)
        beside.session.delegate("now there is room")

    run(scene, tokenizer, Hangs())


def test_a_newer_one_with_its_key_cancels_the_older(tokenizer):
    model = Hangs()

    async def scene(beside):
        old = beside.session.delegate("old", key="k")
        await until(lambda: model.started == 1)
        new = beside.session.delegate("new", key="k")
        assert beside.stages(old) == [Stage.CREATED, Stage.CANCELLED]
        assert beside.session.delegations.live == (new,)
        await until(lambda: model.cancelled == 1)

    run(scene, tokenizer, model)


def test_closing_the_session_cancels_all_and_nothing_enters_any_more(tokenizer):
    model = Hangs()

    async def scene(beside):
        for n in range(3):
            beside.session.delegate(f"task {n}")
        await until(lambda: model.started == 3)
        beside.session.close()
        assert beside.stages().count(Stage.CANCELLED) == 3
        await until(lambda: model.cancelled == 3)
        with pytest.raises(SessionError, match="closed\n  open a new session"):
            beside.session.delegate("more")
        assert beside.edges.edge().inject == ()

    run(scene, tokenizer, model)


def test_one_that_hangs_is_given_up_and_the_conversation_is_told_meanwhile(tokenizer):
    model = Hangs()

    async def scene(beside):
        beside.session.delegate("hard one")
        await until(lambda: beside.stages().count(Stage.PROGRESS))
        beside.edges.edges(1)
        assert beside.edges.thought == [Limits().progress_text]
        await beside.ended()
        assert beside.stages().count(Stage.PROGRESS) == 1  # there was no other news
        assert beside.stages()[-1] is Stage.TIMEOUT and not beside.session.delegations.live
        beside.edges.edges(4)
        assert beside.edges.thought[-1].startswith("The background model gave no answer to: hard one")
        await until(lambda: model.cancelled == 1)

    run(scene, tokenizer, model, FAST)


def test_progress_of_its_own_is_what_is_told_after_silence(tokenizer):
    async def model(delegation, context):
        yield Progress("half way")
        yield ToolCall("search", '{"q": 1}')
        await asyncio.sleep(0.2)
        yield Result("there")

    async def scene(beside):
        beside.session.delegate("go")
        await beside.ended()
        stages = beside.stages()
        assert stages[:3] == [Stage.CREATED, Stage.PROGRESS, Stage.TOOL] and stages[-1] is Stage.DONE
        told = [e for e in beside.events if e.stage is Stage.PROGRESS and e.injection]
        assert told and all(e.text == "half way" for e in told)
        beside.edges.edges(20)
        assert beside.edges.said == "there" and beside.edges.thought == [""]  # the result took its place

    run(scene, tokenizer, CallableModel(model), Limits(progress_after=0.05))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Says(), "without a result"),
        (Says(42), "int"),
        (Says(None), "NoneType"),
        (Says("text"), "the model gave str and neither Progress, ToolCall nor Result. give a text as Result(text)"),
        (Says(Result(b"bytes")), "the model gave bytes where a text belongs. make a str of it"),
        (Says(Result("x", spoken="yes")), "it is spoken. give Result.spoken as True, False or None"),
        (Says(Result("x", policy="loudly")), "ValueError"),
        (Says(Progress(7)), "int"),
        (Says(ToolCall("x", {})), "dict"),
        (Says(Progress("only"), Progress("this")), "without a result"),
        (CallableModel(lambda delegation, context: 1 / 0), "ZeroDivisionError"),
        (CallableModel(lambda delegation: "wrong arguments"), "TypeError"),
        (CallableModel(lambda delegation, context: exit(3)), "SystemExit"),
        (CallableModel(lambda delegation, context: None), "NoneType"),
    ],
)
def test_a_model_that_lies_or_raises_fails_its_own_delegation(tokenizer, model, why):
    async def scene(beside):
        beside.session.delegate("go")
        await beside.ended()
        assert beside.stages()[-1] is Stage.FAILED and why in beside.events[-1].text
        beside.edges.edges(20)
        assert beside.edges.said == "" and len(beside.edges.thought) == 1

    run(scene, tokenizer, model)


def test_why_a_model_failed_is_logged_without_what_might_quote_the_conversation(tokenizer, caplog):
    def refused(delegation, context):
        raise BackgroundError("the endpoint answered 401", fix="give a key")

    def quotes(delegation, context):
        raise ValueError(delegation.task)

    async def scene(beside):
        beside.session.delegate("my secret")
        await beside.ended()

    for model, said in ((refused, "BackgroundError: the endpoint answered 401. give a key"), (quotes, "ValueError")):
        caplog.clear()
        run(scene, tokenizer, CallableModel(model))
        assert caplog.messages == [f"a background model failed: {said}"] and caplog.records[0].levelname == "WARNING"


class NotEvenAGenerator(BackgroundModel):
    async def run(self, delegation, context):
        return Result("not yielded")


class CancelsItself(BackgroundModel):
    async def run(self, delegation, context):
        raise asyncio.CancelledError
        yield Result("")


class Unprintable(BackgroundModel):
    async def run(self, delegation, context):
        class Worse(Exception):
            def __str__(self):
                raise ValueError("no")

        raise Worse
        yield Result("")


@pytest.mark.parametrize("model", [NotEvenAGenerator(), CancelsItself(), Unprintable()])
def test_stranger_ways_to_fail_are_failures_too(tokenizer, model):
    async def scene(beside):
        beside.session.delegate("go")
        await beside.ended()
        assert beside.stages() == [Stage.CREATED, Stage.FAILED]

    run(scene, tokenizer, model)


def test_what_comes_after_the_result_is_dropped(tokenizer):
    async def scene(beside):
        beside.session.delegate("go")
        await beside.ended()
        beside.edges.edges(20)
        assert beside.edges.said == "one" and beside.stages() == [Stage.CREATED, Stage.DONE]

    run(scene, tokenizer, Says(Result("one"), Result("two"), 42))


def test_ten_megabytes_are_cut_marked_and_counted(tokenizer):
    async def scene(beside):
        beside.session.delegate("go", spoken=False, policy=Policy.SILENT)
        await beside.ended()
        beside.edges.edges(60)
        tokens = [t for d in beside.edges.deliveries for t in d.inject if t < 256]
        assert len(tokens) <= MAX_TOKENS and bytes(tokens).decode().endswith(CUT_MARK)
        assert beside.session.queue.cut_texts == 1 and len(beside.events[-1].text) <= room.MAX_PROGRESS

    run(scene, tokenizer, CallableModel(lambda delegation, context: "x" * 10_000_000))


def test_a_flood_is_ended_and_hardly_leaves_its_thread(tokenizer):
    async def model(delegation, context):
        while True:
            yield Progress("again")

    async def scene(beside):
        beside.session.delegate("go")
        await beside.ended()
        assert beside.stages()[-1] is Stage.FAILED and "events" in beside.events[-1].text
        assert beside.stages().count(Stage.PROGRESS) < 200
        assert beside.session.delegations.dropped > room.MAX_EVENTS - 200

    run(scene, tokenizer, CallableModel(model))


def test_a_model_that_blocks_its_thread_blocks_neither_the_loop_nor_later_delegations(tokenizer):
    free = threading.Event()

    async def model(delegation, context):
        if delegation.task == "block":
            free.wait(30)  # does not await: the thread of the models stands still
        return "ok"

    async def scene(beside):
        beside.shared.worker = beside.session.delegations._worker = Worker(stuck_seconds=0.1)
        beside.session.delegate("block")
        beats = 0
        while Stage.TIMEOUT not in beside.stages():
            await asyncio.sleep(0.01)
            beats += 1
        assert beats > 5  # this loop went on
        later = beside.session.delegate("go on")
        await beside.ended(2)
        assert beside.stages(later)[-1] is Stage.DONE and beside.shared.worker.abandoned == 1
        free.set()

    try:
        run(scene, tokenizer, CallableModel(model), Limits(timeout=0.3))
    finally:
        free.set()


def test_threads_that_do_not_come_back_are_bounded(tokenizer):
    free = threading.Event()

    async def scene(beside):
        beside.session.delegate("a")
        beside.session.delegate("b")
        await until(lambda: len(beside.events) >= 3)
        assert beside.stages()[-1] is Stage.FAILED and "not come back" in beside.events[-1].text
        assert beside.events[-1].text.endswith("or CallableModel a larger max_threads")
        free.set()
        await beside.ended(2)
        assert Stage.DONE in beside.stages()

    run(scene, tokenizer, CallableModel(lambda delegation, context: free.wait(30) and "ok", max_threads=1))


def test_models_that_swallow_their_cancellation_are_bounded():
    free = threading.Event()

    async def stubborn():
        while not free.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    worker = Worker()
    futures = [worker.submit(stubborn()) for _ in range(MAX_RUNNING)]
    for future in futures:
        future.cancel()
    with pytest.raises(CapacityError, match=r"come back .*\n  a model must await"):
        worker.submit(stubborn())
    free.set()
    for _ in range(2000):
        if worker.running == 0:
            break
        time.sleep(0.01)
    assert worker.running == 0
    worker.close()
    with pytest.raises(CapacityError, match="closed\n  make a new Background"):
        worker.submit(stubborn())


def test_without_a_model_injections_work_and_delegations_are_refused(tokenizer):
    async def scene(beside):
        with pytest.raises(UsageError, match="no background model"):
            beside.session.delegate("go")
        beside.session.inject("x", policy=Policy.SILENT)
        beside.edges.edge()
        assert beside.edges.thought == ["x"]

    run(scene, tokenizer, None)


def test_playback_is_reported_by_tick_or_by_milliseconds(tokenizer):
    async def scene(beside):
        session = beside.session
        session.inject("hey", spoken=True, policy=Policy.NEXT_GAP)
        beside.edges.edges(2)
        session.played(ms=399.0)
        assert session.queue.waiting == 1
        session.played(ms=400.0)
        assert session.queue.waiting == 0
        for wrong in ({}, {"tick": 1, "ms": 2.0}):
            with pytest.raises(UsageError, match="milliseconds\n  give one of the two"):
                session.played(**wrong)

    run(scene, tokenizer, None, playback=True)


@pytest.mark.parametrize("task", ["", "  \n", 7])
def test_a_delegation_needs_a_task(tokenizer, task):
    async def scene(beside):
        with pytest.raises(UsageError, match=r"needs a task .*\n  say in it what is to be done"):
            beside.session.delegate(task)

    run(scene, tokenizer, Hangs())
