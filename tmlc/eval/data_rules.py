"""What is counted and timed in a recording of Full-Duplex-Bench or a video of RepCount, and the figures of a set.

v1 (arXiv 2503.04721): take-over and response latency. v1.5 (arXiv 2507.23159): stop and response latency around an
overlap. There is no score: what v1.5 scores beyond these times, a language model judges. RepCount (TransRAC, CVPR
2022): off-by-one accuracy and mean absolute error of the count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tmlc.eval.data import Recordings
from tmlc.eval.play import check_layout, played
from tmlc.eval.recogniser import Recogniser
from tmlc.eval.record import Heard, Record, out_tick
from tmlc.eval.repcount import Counted
from tmlc.eval.rules import Verdict, milliseconds
from tmlc.eval.suite import Progress, head
from tmlc.eval.summary import figures
from tmlc.eval.voice import JOIN, RATE, segments
from tmlc.model_zoo.interaction.tasks import SpeechBank
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES
from tmlc.model_zoo.interaction.tasks.words import NUMBERS
from tmlc.runtimes.core.engine import Engine

TAKE_OVER = RATE
"""Speech of 1 s from its first to its last sound takes the turn."""
TAKE_OVER_WORDS = 3
"""More words than these do, however short."""
BACKCHANNEL_WORDS = 2
"""A backchannel has no more words (and is shorter than `TAKE_OVER`)."""
LONG_JOIN = RATE // 2
"""Gaps of a model's speech that v1.5 bridges."""

Stretch = tuple[int, int]


def voice(record: Record, join: int = JOIN) -> list[Stretch]:
    """(start, end) in samples of the user's time line of each stretch in which the model is heard; what would sound
    after the recording's end is cut off."""
    end = len(record.audio)
    found = [(a + TICK_SAMPLES, min(b + TICK_SAMPLES, end)) for a, b in segments(record.audio, join)]
    return [(a, b) for a, b in found if a < end]


def words(record: Record, start: int, end: int) -> int:
    """How many words the model wrote in the ticks whose output sounds from `start` to `end`."""
    return len("".join(record.text[max(0, out_tick(start)) : out_tick(end - 1) + 1]).split())


def takes_over(record: Record, stretches: Sequence[Stretch], most_words: int = TAKE_OVER_WORDS) -> bool:
    """Does the speech from the first to the last of the stretches take the turn?"""
    if not stretches:
        return False
    start, end = stretches[0][0], stretches[-1][1]
    return end - start >= TAKE_OVER or words(record, start, end) > most_words


def pause_handling(record: Record, times: Sequence[int]) -> Verdict:
    """The user only pauses, so that taking over is wrong."""
    verdict = Verdict(0.0)
    verdict.count("took over", takes_over(record, voice(record)))
    return verdict


def _answer(record: Record, stretches: Sequence[Stretch], end: int) -> Verdict:
    verdict = Verdict(0.0)
    if verdict.count("took over", takes_over(record, stretches)):
        verdict.times["response_ms"] = [milliseconds(max(0, stretches[0][0] - end))]
    return verdict


def turn_taking(record: Record, times: Sequence[int]) -> Verdict:
    """The turn ends at times[0]; a start before it is a latency of 0, as in v1."""
    return _answer(record, voice(record), times[0])


def interruption(record: Record, times: Sequence[int]) -> Verdict:
    """The user cuts in from times[0] to times[1]; v1 listens from there on only."""
    after = [(max(a, times[1]), b) for a, b in voice(record) if b > times[1]]
    return _answer(record, after, times[1])


def backchannel(record: Record, times: Sequence[int]) -> Verdict:
    """The user talks on; what is longer than a backchannel takes over, and then nothing counts as one, as in v1."""
    verdict, stretches = Verdict(0.0), voice(record)
    took = any(takes_over(record, [one], BACKCHANNEL_WORDS) for one in stretches)
    verdict.count("took over", took)
    verdict.times["backchannels_per_s"] = [0.0 if took else len(stretches) * RATE / len(record.audio)]
    return verdict


def overlap(record: Record, times: Sequence[int]) -> Verdict:
    """Something is said over the model from times[0] to times[1].

    Stop latency: from times[0] until the model, which was speaking then, falls silent. Response latency: from times[1]
    until it next begins to speak.
    """
    begin, end = times
    verdict, stretches = Verdict(0.0), voice(record, LONG_JOIN)
    speaking = [b for a, b in stretches if a < begin < b]
    if verdict.count("was speaking", bool(speaking)):
        stopped = speaking[0] < len(record.audio)
        if verdict.count("fell silent", stopped):
            verdict.times["stop_ms"] = [milliseconds(speaking[0] - begin)]
    verdict.count("began during it", any(begin <= a < end for a, _ in stretches))
    later = [a for a, _ in stretches if a >= end]
    if verdict.count("began after it", bool(later)):
        verdict.times["response_ms"] = [milliseconds(later[0] - end)]
    return verdict


DATA_RULES: dict[str, Callable[[Record, Sequence[int]], Verdict]] = {
    "candor_pause_handling": pause_handling,
    "synthetic_pause_handling": pause_handling,
    "candor_turn_taking": turn_taking,
    "icc_backchannel": backchannel,
    "synthetic_user_interruption": interruption,
    "user_interruption": overlap,
    "user_backchannel": overlap,
    "talking_to_other": overlap,
    "background_speech": overlap,
}


def repetitions(heard: Heard, count: int) -> Verdict:
    """The last number that is said is the model's count, none is 0. OBO: within one of the true count. MAE: the error
    by the true count, and by 0.1 more, as TransRAC's own code has it, so that a count of 0 divides."""
    said = [NUMBERS.index(word.word) + 1 for word in heard.words if word.word in NUMBERS]
    last = said[-1] if said else 0
    verdict = Verdict(0.0)
    verdict.count("spoke a number", bool(said))
    within = verdict.count("off by one (OBO)", abs(last - count) <= 1)
    if count <= len(NUMBERS):
        verdict.count(f"off by one, of counts up to {len(NUMBERS)}", within)
    verdict.means["absolute error (MAE)"] = [abs(last - count) / (count + 0.1)]
    return verdict


def evaluate_data(
    engine: Engine,
    sets: Sequence[Recordings | Counted],
    seed: int,
    report: Progress = lambda stage, done, total: None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Plays every recording of the sets, each in a session of its own.

    Args:
        engine: all its free sessions are ticked together.
        sets: of `find_sets`.
        seed: of the sessions' random choices.
        report: progress.
        model: the package, for the report.

    Returns:
        What `tmlc eval --data DIR --json` prints; docs/eval.md describes it.
    """
    check_layout(engine)
    view = head(engine, model, seed) | {"sets": {}}
    spent = seconds = 0.0
    for recordings in sets:
        judge, verdicts, errors = _judge(recordings), [], 0
        begun = time.perf_counter()
        for index, record in played(engine, recordings, seed):
            verdicts.append((index, judge(index, record)))
            errors += bool(record.error)
            seconds += len(record.audio) / RATE
            report(recordings.name, len(verdicts), len(recordings))
        spent += time.perf_counter() - begun
        ordered = [verdict for _, verdict in sorted(verdicts, key=lambda pair: pair[0])]
        view["sets"][recordings.name] = {"recordings": len(recordings), "errors": errors} | figures(ordered)
    return view | {"seconds": seconds, "times_real_time": seconds / spent if spent else None}


def _judge(recordings: Recordings | Counted) -> Callable[[int, Record], Verdict]:
    """The rule of a set, for the record of one of its recordings."""
    if isinstance(recordings, Counted):
        recogniser, counts = Recogniser(SpeechBank.load()), recordings.counts
        return lambda index, record: repetitions(Heard(record, recogniser), counts[index])
    rule, times = DATA_RULES[recordings.name], recordings.times
    return lambda index, record: rule(record, [round(at * RATE) for at in times[index]])
