"""The arithmetic of the bench, on sessions that were written by hand."""

import numpy as np
import pytest

from tmlc.bench.client import Histogram, Visited, voiced
from tmlc.bench.dialogues import Dialogue, Utterance
from tmlc.bench.figures import ages, changes, growth, interruptions, lost, of_histograms, slope, summary, turns
from tmlc.bench.view import judge, tables
from tmlc.report.tables import plain_text

RATE = 1000
DIALOGUE = Dialogue("one", RATE, np.zeros(10_000, np.float32), (Utterance(1.05, 2.03), Utterance(4.0, 5.5)))


def visited(rows, begin=100.0, spoken=9.0):
    """Ticks as (index, arrival after begin, samples, voiced)."""
    return Visited(0, begin, "held", begin=begin, spoken=spoken,
                   ticks=[(index, begin + at, samples, sound) for index, at, samples, sound in rows])  # fmt: skip


def on_time(count=45, delay=0.1, sound=True):
    """Edges at 0.2 s after the beginning and so on; each tick takes in all that was spoken before its edge."""
    return [(k, 0.2 * (k + 1) + delay, 200 * (k + 1), sound) for k in range(count)]


def test_a_turn_is_answered_by_the_first_tick_that_heard_its_end():
    found = turns(visited(on_time()), DIALOGUE)
    # Speech ends at 2.03 s: the edge at 2.2 s takes it in, its output comes at 2.3 s.
    assert found[0]["answering_ms"] == pytest.approx(270) and found[0]["turn_ms"] == pytest.approx(270)
    # 5.5 s: the edge at 5.6 s.
    assert found[1]["answering_ms"] == pytest.approx(200) and found[1]["end"] == 105.5


def test_a_tick_that_lacks_the_last_sample_of_an_utterance_does_not_answer_it():
    rows = [(0, 2.2, 2029, True), (1, 2.4, 2030, False), (2, 2.6, 2200, True)]
    found = turns(visited(rows), DIALOGUE)[0]
    assert found["answering_ms"] == pytest.approx(370) and found["turn_ms"] == pytest.approx(570)


def test_a_model_that_stays_silent_has_an_answering_tick_and_no_turn():
    found = turns(visited(on_time(sound=False)), DIALOGUE)
    assert all(turn["answering_ms"] is not None and turn["turn_ms"] is None for turn in found)


def test_a_session_that_was_cut_leaves_its_turn_unanswered():
    view = summary([visited(on_time(15))], [DIALOGUE], [0])
    assert view["turns"] == {"all": 2, "voiced": 1, "unanswered": 1}


def test_utterances_that_end_in_the_last_second_are_not_counted():
    assert len(turns(visited(on_time(), spoken=6.4), DIALOGUE)) == 1
    assert len(turns(visited(on_time(), spoken=6.6), DIALOGUE)) == 2


def test_the_age_of_a_tick_is_that_of_the_oldest_sample_it_took_in():
    found = ages(visited(on_time(3)), RATE)
    assert [age for _, age in found] == pytest.approx([300, 300, 300])
    gap = [on_time()[0], (3, 0.9, 800, True)]
    assert [age for _, age in ages(visited(gap), RATE)] == pytest.approx([300, 700])
    assert ages(visited([(0, 0.1, 0, True), (1, 0.3, 100, True)]), RATE) == [(100.3, pytest.approx(300))]


def test_lost_and_late_ticks_are_misses():
    rows = on_time(10)
    del rows[4:6]
    view = summary([visited(rows)], [DIALOGUE], [0])
    assert lost(visited(rows)) == 2 and view["ticks"] == {"arrived": 8, "lost": 2, "late": 1}
    assert view["misses"] == pytest.approx(3 / 10)
    assert summary([visited(on_time(10, delay=0.21))], [DIALOGUE], [0])["misses"] == 1.0
    assert summary([visited(on_time(10, delay=0.19))], [DIALOGUE], [0])["misses"] == 0.0


def test_jitter_is_measured_against_the_grid_also_over_a_gap():
    rows = [(0, 0.2, 200, True), (1, 0.41, 400, True), (4, 1.0, 1000, True)]
    assert changes(visited(rows)) == pytest.approx([10, 10])


def test_an_interruption_ends_with_the_first_silent_tick_that_heard_it():
    rows = on_time()
    rows[6] = (6, 1.5, 1400, False)
    assert interruptions(visited(rows), DIALOGUE) == [pytest.approx(450), None]
    assert interruptions(visited(on_time(sound=False)), DIALOGUE) == []


def test_growth_compares_the_ends_of_a_bench():
    steady = [(float(at), 250.0) for at in range(300)]
    assert growth(steady) == {"window_seconds": 60.0, "first_ms": 250.0, "last_ms": 250.0, "ratio": 1.0}
    assert growth([(at, 100.0 + at) for at in range(300)])["ratio"] > 2
    assert growth([])["ratio"] is None


def test_the_servers_memory_counts_from_when_it_has_warmed_up():
    samples = [(5.0 * k, 100.0 + min(30.0, 5.0 * k)) for k in range(400)]
    found = slope(samples)
    assert found == {"warm_seconds": 300.0, "start_mb": 100.0, "warm_mb": 130.0, "end_mb": 130.0,
                     "mb_per_minute": pytest.approx(0.0, abs=1e-9)}  # fmt: skip
    assert slope([(at, 100.0 + at / 60) for at, _ in samples])["mb_per_minute"] == pytest.approx(1.0)
    assert slope([]) is None and slope([(0.0, 1.0), (5.0, 1.0), (10.0, 1.0)]) is None


def test_dialogues_go_on_from_their_beginning():
    whole = Dialogue("two", RATE, np.arange(3000, dtype=np.float32), (Utterance(1.0, 2.0),))
    assert [u.end for u in whole.until(9.0)] == [2.0, 5.0, 8.0]
    assert whole.piece(2990, 20).tolist() == [*range(2990, 3000), *range(10)]


def test_histograms_of_processes_are_joined():
    one, two = Histogram(), Histogram()
    for ms in range(1, 100):
        one.add(ms / 1000 - 1e-6)
    two.add(1.5)
    found = of_histograms([one.to_json(), two.to_json()])
    assert found == {"count": 100, "p50": pytest.approx(50.0), "p99": pytest.approx(99.0), "max": 1500.0}


def test_a_hop_with_sound_makes_a_tick_voiced():
    audio = np.zeros(3200, np.float32)
    assert not voiced(audio, 16000) and not voiced(np.full(3200, 0.009, np.float32), 16000)
    audio[2400:] = 0.02
    assert voiced(audio, 16000)


def test_what_was_allowed_and_exceeded_is_said():
    view = summary([visited(on_time())], [DIALOGUE], [0]) | {"generator": {"bottleneck": False}}
    assert judge(view, 400.0, 0.001) == [] and judge(view, None, None) == []
    assert "p99 is 270 ms" in judge(view, 260.0, None)[0]
    nobody = summary([], [], []) | {"generator": {"bottleneck": True}}
    assert nobody["attempts"]["all"] == 0 and len(judge(nobody, 400.0, 0.5)) == 3


def test_the_table_shows_a_bench_in_which_nothing_came():
    parts = {"p50": 0.0, "p99": 50.0}
    generator = {"send_late_ms": parts, "loop_lag_ms": parts, "cpu_seconds": 1.0, "bottleneck": True}
    load = {"sessions": 3, "arrivals": "fixed", "seconds": 9.0, "piece": 20}
    view = summary([], [], []) | {"generator": generator, "load": load, "server_metrics": {"tmlc_ticks": 3.0},
                                  "server_memory": slope([(5.0 * k, 100.0) for k in range(9)]),
                                  "server": {"url": "http://127.0.0.1:1/v1", "dialect": "live"}}  # fmt: skip
    text = plain_text(tables(view))
    assert "+0.000 MB a minute" in text
    assert "IT was the bottleneck" in text and "tmlc_ticks" in text and "turn latency" in text
