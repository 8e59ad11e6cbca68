"""Time and cues: when rules fire, what they put in, and that the same ticks always give the same."""

import asyncio
import threading

import pytest
from pydantic import ValidationError

from tmlc.errors import UsageError
from tmlc.runtimes.background.callable import CallableModel
from tmlc.runtimes.background.model import Origin
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.rules import Rule, RuleClock, milliseconds
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.live import Moment

from .conftest import END_OF_TASK, LAYOUT, PERIOD, TASK, Edges, published, until


def rule(on, **fields) -> Rule:
    """rule("every 4 s", …), as the settings write {every: 4 s, …}."""
    kind, _, rest = on.partition(" ")
    return Rule.model_validate({kind: rest} | (fields or {"inject": "x"}))


def moment(tick, user=False, model=False, quiet=0.0) -> Moment:
    return Moment(tick, 1000.0 + tick * PERIOD, user, model, quiet, say_room=2)


@pytest.fixture
def fires(tokenizer):
    """fires(on, moments): the ticks at which a rule fires."""

    def run(on, moments, cues=(), **fields):
        clock = RuleClock([rule(on, **fields)], tokenizer, 200)
        return [fired.tick for m in moments for fired in clock.due(m, cues)]

    return run


@pytest.mark.parametrize(
    ("text", "ms"), [("4 s", 4000), ("500 ms", 500), ("1.5min", 90_000), ("1 h", 3_600_000), (" 0.2 s ", 200)]
)
def test_durations_have_a_unit(text, ms):
    assert milliseconds(text) == ms


def test_every_and_at_follow_the_time_of_the_session(fires):
    ticks = [moment(k) for k in range(100)]
    assert fires("every 4 s", ticks) == [20, 40, 60, 80]
    assert fires("every 1.1 s", ticks)[:4] == [6, 11, 17, 22]  # the first edge at or after 1.1, 2.2, 3.3, 4.4 s
    assert fires("at 10 s", ticks) == [50]
    assert fires("at 0 s", ticks) == [0]
    assert fires("every 4 s", ticks, inject="x", once=True) == [20]


def test_a_tick_that_is_jumped_over_fires_once_at_the_next_edge(fires):
    assert fires("every 1 s", [moment(k) for k in (0, 1, 4, 17, 18, 20)]) == [17, 20]
    assert fires("at 1 s", [moment(k) for k in (0, 3, 9, 10)]) == [9]


def test_a_session_that_goes_on_does_not_repeat_its_past(fires):
    assert fires("at 10 s", [moment(k) for k in range(60, 80)]) == []
    assert fires("every 4 s", [moment(k) for k in range(61, 100)]) == [80]


def test_cues_fire_when_something_changes(fires):
    voices = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 0), (0, 0)]
    ticks = [moment(k, bool(user), bool(model)) for k, (user, model) in enumerate(voices)]
    assert fires("when user_started", ticks) == [1, 5]
    assert fires("when user_stopped", ticks) == [3, 6]
    assert fires("when model_started", ticks) == [2]
    assert fires("when model_stopped", ticks) == [4]


def test_silence_is_noticed_once_each_time(fires):
    quiet = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 0.0, 0.2, 0.6000000000000001, 1.0000000000000002, 1.2]
    assert fires("when silence_for 1 s", [moment(k, quiet=q) for k, q in enumerate(quiet)]) == [4, 10]


def test_a_registered_detector_fires_by_its_name(tokenizer):
    clock = RuleClock([rule("when door_open")], tokenizer, 200)
    assert not clock.due(moment(0)) and clock.due(moment(1), ["door_open"]) and not clock.due(moment(2), ["other"])


def test_the_time_can_be_part_of_the_text(tokenizer):
    clock = RuleClock([rule("at 75 s", inject="<end_of_injection>{time} or {seconds} s {else}")], tokenizer, 200)
    (fired,) = [f for k in range(400) for f in clock.due(moment(k))]
    assert bytes(fired.tokens).decode() == "<end_of_injection>1:15 or 75 s {else}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": "4 s"},
        {"every": "4 s", "inject": "x", "delegate": "y"},
        {"every": "4", "inject": "x"},
        {"every": "0.1 s", "inject": "x"},
        {"every": "-4 s", "inject": "x"},
        {"each": "4 s", "inject": "x"},
        {"when": "", "inject": "x"},
        {"when": "silence_for", "inject": "x"},
        {"when": "user_stopped 5 s", "inject": "x"},
        {"every": 4, "inject": "x"},
        {"inject": "x"},
        {"every": "4 s", "at": "4 s", "inject": "x"},
        {"at": "1 s", "inject": ""},
        {"at": "1 s", "inject": "  "},
        {"at": "1 s", "inject": "x" * 501},
        {"at": "1 s", "inject": "x", "spoken": "yes"},
        {"at": "1 s", "inject": "x", "spoken": True, "policy": "silent"},
        {"at": "1 s", "inject": "x", "policy": "now"},
        {"at": "1 s", "inject": "x", "unknown": 1},
        {"at": "1 s", "inject": "x", "expire": 5},
        {"at": "1 s", "inject": "x", "expire": "0 s"},
        {"at": "1 s", "inject": "x", "coalesce": "a", "supersede": "b"},
        {"at": "1 s", "inject": "x", "supersede": "\0a"},
        {"at": "1 s", "delegate": "x", "expire": "5 s"},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        Rule.model_validate(wrong)


def test_a_rule_can_be_written_out_and_read_again():
    for text in ("every 4 s", "at 500 ms", "when silence_for 5 s", "when user_stopped"):
        once = rule(text, inject="x", expire="2 s")
        assert Rule.model_validate_json(once.model_dump_json()) == once


def play(tokenizer, scene, **shared):
    async def main():
        background = Background(**shared)
        session = background.open(tokenizer, LAYOUT)
        try:
            await scene(session, Edges(session))
        finally:
            session.close()
            await background.close()

    asyncio.run(main())


def test_the_same_ticks_give_the_same_deliveries(tokenizer):
    rules = [
        rule("every 1 s", inject="{time}", supersede="t"),
        rule("when user_stopped", inject="your turn", spoken=True, policy="next_gap"),
        rule("when silence_for 2 s", inject="still there?", spoken=True),
        rule("at 3 s", inject="three", policy="interrupt", spoken=True),
    ]
    runs = []

    async def scene(session, edges):
        for k in range(120):
            edges.edge(user=k % 40 < 7)
        runs.append([(d.inject, d.say) for d in edges.deliveries])
        assert "0:01" in edges.thought and "0:23" in edges.thought
        assert "three" in edges.said and "your turn" in edges.said

    for _ in range(2):
        play(tokenizer, scene, rules=rules)
    assert runs[0] == runs[1]


def test_a_rule_can_delegate_and_a_newer_one_takes_its_place(tokenizer):
    seen = []

    def model(delegation, context):
        seen.append(delegation)
        return "done"

    async def scene(session, edges):
        edges.edges(6)
        await until(lambda: seen)
        assert (seen[0].origin, seen[0].task, seen[0].key) == (Origin.RULE, "think", "k")
        await until(lambda: not session.delegations.live)
        edges.edges(20)
        assert edges.said == "done"

    rules = [rule("at 1 s", delegate="think", spoken=True, policy="next_gap", supersede="k")]
    play(tokenizer, scene, model=CallableModel(model), rules=rules)


def test_rules_that_cannot_work_are_refused_before_any_session(tokenizer):
    with pytest.raises(UsageError, match="door_open"):
        Background(rules=[rule("when door_open")])
    with pytest.raises(UsageError, match="built-in"):
        Background(detectors={"user_started": lambda sight: True})
    Background(rules=[rule("when door_open")], detectors={"door_open": lambda sight: True})


def test_a_task_without_a_model_goes_to_the_client_or_is_counted(tokenizer):
    tasks = []

    async def scene(session, edges):
        edges.edges(6)
        await until(lambda: session.refused == 1)
        session.on_task = tasks.append
        edges.edges(5)
        await until(lambda: tasks == ["x"])
        session.tick(published(11, tokens=[TASK, *b"y", END_OF_TASK]))
        assert tasks == ["x", "y"] and session.refused == 1

    play(tokenizer, scene, rules=[rule("every 1 s", delegate="x")])


def test_a_full_queue_costs_the_rule_and_not_the_tick(tokenizer):
    async def scene(session, edges):
        for _ in range(64):
            session.inject("x" * 10, spoken=True, policy=Policy.NEXT_GAP)
        edges.edges(20, user=True)
        assert session.refused >= 18

    play(tokenizer, scene, rules=[rule("every 200 ms")])


def test_a_detector_is_asked_after_each_tick_and_its_yes_enters_once(tokenizer):
    asked = []

    def door(sight):
        asked.append(sight.tick)
        if sight.tick == 9:
            raise RuntimeError("broken")
        return sight.context.lines[-1].text.endswith("open")

    async def scene(session, edges):
        for k, said in enumerate([b"it is ", b"open", b"", b" no", b" open"]):
            edges.edge()
            session.tick(published(k, tokens=said))
            await until(lambda k=k: asked[-1:] == [k] and not session.watch._looking)
        session.tick(published(9, tokens=b""))
        await until(lambda: session.watch.failed == 1)
        edges.edges(2)
        assert edges.thought == ["door", "door"]

    play(tokenizer, scene, rules=[rule("when door", inject="door")], detectors={"door": door})


def test_a_detector_that_hangs_is_asked_once_and_holds_nothing_up(tokenizer):
    free = threading.Event()

    async def scene(session, edges):
        for k in range(10):
            session.tick(published(k))
            edges.edge()
        assert session.watch.skipped == 9
        free.set()

    try:
        play(tokenizer, scene, detectors={"slow": lambda sight: free.wait(20)})
    finally:
        free.set()
