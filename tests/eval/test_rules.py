"""Each rule gives full marks to the ideal model, none to those that do not listen, and takes off for what just
misses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tmlc.model_zoo.interaction.tasks import TASKS
from tmlc.model_zoo.interaction.tasks.words import NUMBERS

spec = importlib.util.spec_from_file_location("players", Path(__file__).with_name("players.py"))
players = importlib.util.module_from_spec(spec)
spec.loader.exec_module(players)

CHANCE = {"turn_taking": 0.4, "barge_in": 0.2, "rep_count": 0.5, "background_speech": 0.1}
"""What random words may reach: they now and then fall into the 1.5 s after a turn, or within one of a count. 0.05
else."""


def scores(judge, bank, task, player, seeds):
    return [judge(e, player(e)).score for e in (TASKS[task].episode(seed, "test", bank) for seed in seeds)]


@pytest.mark.parametrize("task", TASKS)
def test_the_ideal_model_gets_full_marks_and_the_deaf_ones_none(task, judge, bank):
    assert scores(judge, bank, task, players.ideal, range(1)) == [1.0]
    assert scores(judge, bank, task, players.silent, range(4)) == [0.0] * 4
    if task in ("turn_taking", "barge_in", "backchannel"):
        assert scores(judge, bank, task, players.always, range(1)) == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_over_many_episodes_too_and_random_words_score_as_chance_has_it(task, judge, bank):
    assert min(scores(judge, bank, task, players.ideal, range(60))) == 1.0
    assert max(scores(judge, bank, task, players.silent, range(60))) == 0.0
    assert max(scores(judge, bank, task, players.always, range(20))) == 0.0
    for player in (players.at_random, players.chatterbox):
        by_chance = scores(judge, bank, task, lambda e, player=player: player(e, bank), range(60))
        assert np.mean(by_chance) <= CHANCE.get(task, 0.12)


def test_an_answer_that_comes_too_late_is_none(judge, find):
    episode = find("turn_taking")
    turns = len(episode.labels["turns"])
    last = judge(episode, players.ideal(episode, late=8, from_word=turns - 1))
    assert last.score == (turns - 1) / turns and "no answer" in last.why[0]


def test_a_start_in_a_pause_loses_the_turn(judge, bank, find):
    episode = find("turn_taking", lambda labels: labels["turns"][0]["pauses"])
    turn = episode.labels["turns"][0]
    early = int(turn["pauses"][0][0] // 3200)
    record = players.ideal(episode)
    yes = bank.says("yes")
    record.audio[early * 3200 :][: len(yes)] += yes
    verdict = judge(episode, record)
    assert verdict.score < 1 and "in a pause" in verdict.why[0]


def test_a_model_that_goes_on_two_ticks_longer_has_not_stopped_in_time(judge, bank, find):
    episode = find("barge_in", lambda labels: labels["kind"] != "say")
    cut = max(said.end_sample for said in episode.say[:-1]) // 3200
    record = players.ideal(episode)
    assert judge(episode, record).score == 1
    seven = bank.says("seven")
    record.audio[cut * 3200 :][: len(seven)] += seven
    verdict = judge(episode, record)
    assert verdict.score == 0 and "ms to stop" in verdict.why[0]


def test_who_stops_at_an_mhm_has_lost_the_backchannel(judge, find):
    episode = find("backchannel", lambda labels: labels["heard"])
    record = players.ideal(episode)
    record.audio[episode.labels["heard"][0][0] :] = 0
    assert judge(episode, record).score == 0


@pytest.mark.parametrize("task", ["talking_to_other", "background_speech"])
def test_who_answers_what_was_meant_for_another_scores_nothing(task, judge, bank, find):
    episode = find(task, lambda labels: labels["turns"])
    record = players.ideal(episode)
    tick = episode.labels["ignore"][0][1] // 3200 + 1
    record.audio[tick * 3200 :][: len(bank.says("yes"))] += bank.says("yes")
    verdict = judge(episode, record)
    assert verdict.score == 0 and "not meant" in verdict.why[0]


def test_a_word_counts_within_one_tick_of_when_it_is_due(judge, find):
    episode = find("time_speak", lambda labels: len(labels["due_ticks"]) == 4)
    assert [judge(episode, players.ideal(episode, late=n)).score for n in (-1, 1)] == [1, 1]
    assert judge(episode, players.ideal(episode, late=2)).score == 0


def test_a_cue_is_answered_within_two_ticks(judge, find):
    episode = find("cue_speak", lambda labels: labels["seen"])
    assert [judge(episode, players.ideal(episode, late=n)).score for n in (2, 3)] == [1, 0]


def test_the_wrong_word_at_the_right_time_is_a_miss(judge, bank, find):
    episode = find("cue_speak", lambda labels: labels["word"] != "six")
    record = players.saying(episode, bank, [("six", tick) for tick in episode.labels["cue_ticks"]])
    assert judge(episode, record).score == 0


@pytest.mark.parametrize(("off", "passes"), [(-2, 0), (1, 1), (2, 0)])
def test_a_count_may_be_off_by_one(off, passes, judge, bank, find):
    episode = find("rep_count", lambda labels: labels["count"] in (4, 5, 6))
    last = episode.labels["count"] + off
    record = players.saying(episode, bank, [(NUMBERS[n], 4 * n + 3) for n in range(last)])
    assert judge(episode, record).score == passes


def test_start_and_stop_are_scored_by_their_overlap_with_the_event(judge, bank, find):
    episode = find("start_stop")
    first, last = episode.labels["event_ticks"]
    exact = judge(episode, players.saying(episode, bank, [("start", first), ("stop", last)]))
    late = judge(episode, players.saying(episode, bank, [("start", first + 5), ("stop", last)]))
    assert exact.score == 1 and late.score == pytest.approx((last - first - 5) / (last - first))


def test_a_delegation_needs_the_task_the_talk_and_the_result(judge, find):
    episode = find("delegate")
    assert judge(episode, players.ideal(episode)).score == 1
    wrong = players.ideal(episode)
    wrong.asked = [(wrong.asked[0][0], "ten" if episode.labels["task"] != "ten" else "one")]
    mute = players.ideal(episode)
    mute.audio[episode.say[-1].start_sample :] = 0
    deaf = players.ideal(episode)
    deaf.audio[episode.say[1].start_sample : episode.say[-1].start_sample] = 0
    for record in (wrong, mute, deaf):
        assert judge(episode, record).score == 0
