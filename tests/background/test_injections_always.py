"""What holds for a queue of injections whatever happens to it: nothing lost, nothing twice, order, bounds."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmlc.errors import CapacityError
from tmlc.runtimes.background.injections import InjectionQueue
from tmlc.runtimes.background.policies import Fate, Policy

from .conftest import BEGIN, END, Edges, make_tokenizer

KEYS = st.sampled_from([None, None, "a", "b"])
PUTS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 150),
        "spoken": st.booleans(),
        "policy": st.sampled_from(list(Policy)),
        "key": KEYS,
        "how": st.sampled_from(["coalesce", "supersede"]),
        "ttl": st.sampled_from([None, None, 0.5, 3.0]),
    }
)
STEPS = st.lists(
    st.one_of(
        PUTS,
        st.tuples(st.just("edges"), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 64)),
        st.tuples(st.just("played"), st.integers(0, 10)),
        st.tuples(st.just("unplayed"), st.integers(1, 6)),
    ),
    max_size=60,
)
FINAL = {Fate.DELIVERED, Fate.EXPIRED, Fate.SUPERSEDED, Fate.DROPPED}


def text_of(number: int, size: int) -> str:
    """A text of at least `size` characters that no other text contains."""
    return f"<{number}>" + "abcdefg"[number % 7] * size


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.booleans())
def test_whatever_happens_every_injection_has_one_fate_and_its_tokens_enter_in_order(steps, playback):
    events = []
    queue = InjectionQueue(make_tokenizer(), say_room=2, playback=playback, listener=events.append)
    edges = Edges(queue)
    texts: dict[str, list[str]] = defaultdict(list)
    keys: dict[str, str | None] = {}
    for number, step in enumerate(steps):
        if isinstance(step, dict):
            policy = Policy.WHEN_IDLE if step["spoken"] and step["policy"] is Policy.SILENT else step["policy"]
            key = {step["how"]: step["key"]} if step["key"] else {}
            text = text_of(number, step["size"])
            try:
                name = queue.put(text, spoken=step["spoken"], policy=policy, ttl=step["ttl"], **key)
            except CapacityError:
                continue
            texts[name].append(text)
            keys[name] = step["key"]
        elif step[0] == "edges":
            _, count, user, model, edges.room = step
            edges.edges(count, user=user, model=model or None)
        elif step[0] == "played":
            queue.played(edges.tick - 1 - step[1])
        else:
            queue.unplayed(edges.tick - step[1], edges.tick)
    edges.room = 64
    for _ in range(2000):  # quiet enough, for long enough: all that waits enters
        if not queue.waiting:
            break
        edges.edge()
        queue.played(edges.tick)
    assert queue.waiting == 0

    fates = defaultdict(list)
    for event in events:
        fates[event.id].append(event.fate)
    assert set(fates) == set(texts)
    for name, seen in fates.items():
        assert sum(fate in FINAL for fate in seen) == 1 and seen[-1] in FINAL, (name, seen)
        begun = seen.count(Fate.ENTERED) - seen.count(Fate.CUT)  # 1: it was in the session at its end
        allowed = {Fate.DELIVERED: {1}, Fate.EXPIRED: {0}, Fate.SUPERSEDED: {0, 1}}
        assert begun in allowed[seen[-1]], (name, seen)

    # What was delivered entered whole, once more after each cut; what was not delivered did not enter whole.
    thought = "".join(edges.thought)
    said = edges.said
    for name, parts in texts.items():
        whole = "\n".join(parts)
        found = thought.count(whole) + said.count(whole)
        if fates[name][-1] is Fate.DELIVERED:
            assert 1 <= found <= 1 + fates[name].count(Fate.CUT), (whole, fates[name])
        elif fates[name][-1] is Fate.EXPIRED:
            assert found <= fates[name].count(Fate.CUT)

    # Of one key, those that were delivered were so in the order in which they came.
    order = [event.id for event in events if event.fate is Fate.DELIVERED]
    for key in ("a", "b"):
        came = [name for name in texts if keys[name] == key]
        delivered = [name for name in order if keys[name] == key]
        assert delivered == [name for name in came if name in delivered]

    for delivery in edges.deliveries:
        assert len(delivery.inject) <= 64 and len(delivery.say) <= 2
        assert delivery.inject.count(BEGIN) == delivery.inject.count(END)


@settings(max_examples=60, deadline=None)
@given(st.lists(PUTS, max_size=30), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=60, max_size=60))
def test_the_same_ticks_and_the_same_texts_give_the_same_deliveries(puts, voices):
    runs = []
    for _ in range(2):
        edges = Edges(InjectionQueue(make_tokenizer(), say_room=2))
        for number, (user, model) in enumerate(voices):
            if number < len(puts):
                put = puts[number]
                spoken = put["spoken"] and put["policy"] is not Policy.SILENT
                key = {put["how"]: put["key"]} if put["key"] else {}
                text = text_of(number, put["size"])
                edges.inbox.put(text, spoken=spoken, policy=put["policy"], ttl=put["ttl"], **key)
            edges.edge(user=user, model=model or None)
        runs.append([(delivery.inject, delivery.say, len(delivery.parts)) for delivery in edges.deliveries])
    assert runs[0] == runs[1]
