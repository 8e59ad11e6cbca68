"""The transcript that waits for a client: told once, whatever was written when its connection was cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.runtimes.gateway.held import Held


def test_what_waits_is_told_with_its_ticks_and_then_gone():
    held = Held()
    for number, text in ((3, "a"), (4, ""), (5, "b")):
        held.add(number, number - 1, text)
    assert held and held.ticks == (2, 5) and held.tell(5, sent=2) == "ab" and not held


def test_the_oldest_words_are_forgotten_at_the_bound():
    held = Held()
    for number in range(100):
        held.add(number, number, f"{number:02d}" * 100)
    assert len(held.text) == 8192 and held.text.endswith("99") and held.ticks == (59, 100)


@settings(max_examples=200, deadline=None)
@given(
    plan=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=40),
    kept=st.integers(1, 40),
)
def test_whoever_is_cut_when_and_how_often_hears_every_word_once(plan, kept):
    """`plan`: of each tick, whether transcripts may go out, and (3) whether the connection is cut there, with the newer
    half of what waits unwritten. `kept`: events that are there to be sent again."""
    held, written, queue, ticks, sent = Held(), "", [], [], 0
    for number, (tells, what) in enumerate([*plan, (True, 0)], 1):
        ticks.append((number, chr(64 + number)))
        held.add(number, number, ticks[-1][1])
        if what == 3:
            lost = len(queue) // 2  # the client never got these
            for event, text in queue[: len(queue) - lost]:
                written, sent = written + text, event
            again = [one for one in ticks if one[0] > sent][-kept:]
            held.resume(sent, {event for event, _ in again})
            queue = []
            for event, letter in again:
                held.add(event, event, letter)
                queue.append((event, held.tell(event, sent) if tells else ""))
        else:
            queue.append((number, held.tell(number, sent) if tells else ""))
    whole = written + "".join(text for _, text in queue)
    assert whole == "".join(letter for _, letter in ticks)
