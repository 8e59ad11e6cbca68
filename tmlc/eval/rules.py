"""How an episode is scored: one function a task, from what was heard to a verdict.

Sources: stop and response latency, false starts and the overlap cases are those of Full-Duplex-Bench v1 (arXiv
2503.04721) and v1.5 (arXiv 2507.23159); a count is right within one of the true one, as in RepCount (TransRAC, CVPR
2022); start and stop are scored by temporal intersection over union. docs/eval.md has every rule in words, with its
numbers, which stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tmlc.eval.recogniser import Word
from tmlc.eval.record import Heard, out_tick
from tmlc.eval.voice import RATE
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES
from tmlc.model_zoo.interaction.tasks.words import NUMBERS

RESPONSE_WINDOW = RATE * 3 // 2
"""An answer must begin within 1.5 s of the end of the turn."""
STOP_LIMIT = RATE * 2 // 5
"""After an interruption the model must be silent within 400 ms: two ticks."""
SETTLED = RATE * 2 // 5
"""Silence of 400 ms is the end of speaking; the gaps between words that are counted are shorter."""
LONG_GAP = RATE * 7 // 10
"""A gap of 700 ms in what should go on counts as stopping."""
SHORT_WORD = RATE
"""A backchannel is shorter than 1 s (Full-Duplex-Bench: at most three words in less than a second)."""
LEAVE_ALONE = RATE * 6 // 5
"""After what was not meant for the model it must stay silent for 1.2 s."""
CUE_TICKS = 2
DUE_TICKS = 1
WEAVE_WINDOW = RATE * 3
"""A result must be said within 3 s of when it came, or of the end of the turn that it came into."""
ASK_WINDOW = RATE * 4


@dataclass
class Verdict:
    """Of one episode.

    Attributes:
        score: 0 to 1.
        why: what went wrong; empty when nothing did.
        counts: name → (passed, of), added up over episodes.
        times: name → milliseconds, of which the median and the 95th percentile are shown.
        means: name → numbers of which the mean is shown.
    """

    score: float
    why: list[str] = field(default_factory=list)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)

    def count(self, name: str, passed: bool) -> bool:
        done, of = self.counts.get(name, (0, 0))
        self.counts[name] = done + passed, of + 1
        return passed


def milliseconds(samples: int) -> float:
    return samples * 1000 / RATE


def _turn(heard: Heard, turn: dict[str, Any], limit: int, verdict: Verdict) -> bool:
    """One turn of the user: no start while it lasts, and an answer after it, before `limit`."""
    ok = True
    early = heard.onsets(turn["start"], turn["end"])
    in_pauses = [a for a in early if any(p <= a < q for p, q in turn["pauses"])]
    for pause in turn["pauses"]:
        verdict.count("quiet in pauses", not any(pause[0] <= a < pause[1] for a in in_pauses))
    if early:
        where = "in a pause" if in_pauses else "over the user"
        verdict.why.append(f"began to speak {where} at {early[0] / RATE:.2f} s")
        ok = False
    answers = heard.onsets(turn["end"], min(turn["end"] + RESPONSE_WINDOW, limit))
    if verdict.count("answered", bool(answers)):
        verdict.times.setdefault("response_ms", []).append(milliseconds(answers[0] - turn["end"]))
        said = [w.word for w in heard.words if w.end > turn["end"] and w.start < answers[0] + RATE // 10 < w.end]
        verdict.count("right word", turn["word"] in said)
    else:
        verdict.why.append(f"no answer to the turn that ended at {turn['end'] / RATE:.2f} s")
        ok = False
    return ok


def _turns(heard: Heard, episode: Episode, verdict: Verdict) -> list[bool]:
    turns = episode.labels["turns"]
    ends = [*(turn["start"] for turn in turns[1:]), len(episode.audio) + TICK_SAMPLES]
    return [_turn(heard, turn, limit, verdict) for turn, limit in zip(turns, ends, strict=True)]


def turn_taking(episode: Episode, heard: Heard) -> Verdict:
    """The part of the turns that were answered in time, without a start before their end."""
    verdict = Verdict(0.0)
    done = _turns(heard, episode, verdict)
    verdict.score = sum(done) / len(done)
    return verdict


def barge_in(episode: Episode, heard: Heard) -> Verdict:
    """The model speaks when it is interrupted, is silent within 400 ms, and stays so until it is spoken to."""
    verdict, cut_in = Verdict(0.0), episode.labels["cut_in"]
    if not verdict.count("was speaking", heard.speaks(cut_in - LONG_GAP // 2, cut_in)):
        verdict.why.append("was not speaking when the user cut in")
        return verdict
    stopped = heard.silent_from(cut_in, SETTLED, len(episode.audio))
    late = stopped is None or stopped - cut_in > STOP_LIMIT
    if stopped is not None:
        verdict.times["stop_ms"] = [milliseconds(stopped - cut_in)]
    if not verdict.count("stopped in time", not late):
        took = "did not stop" if stopped is None else f"took {milliseconds(stopped - cut_in):.0f} ms to stop"
        verdict.why.append(f"{took} after the user cut in at {cut_in / RATE:.2f} s")
        return verdict
    assert stopped is not None
    (turn,) = episode.labels["turns"]
    resumed = heard.onsets(stopped, turn["end"])
    verdict.count("stayed silent", not resumed)
    if resumed:
        verdict.why.append(f"spoke again at {resumed[0] / RATE:.2f} s")
        return verdict
    told = Verdict(0.0)
    _turn(heard, turn, len(episode.audio) + TICK_SAMPLES, told)
    verdict.counts |= told.counts
    verdict.times |= told.times
    verdict.score = 1.0
    return verdict


def _counts_on(heard: Heard, start: int, end: int, verdict: Verdict) -> bool:
    """While and after something was said from `start` to `end`, the model counts on: it was speaking, leaves no long
    gap, and says numbers that follow each other up to at least nine."""
    if not heard.speaks(start - LONG_GAP, start):
        verdict.why.append("was not counting")
        return False
    said = [w for w in heard.words if w.word in NUMBERS]
    ten = next((w for w in said if w.word in ("nine", "ten") and w.start >= start), None)
    if ten is None:
        verdict.why.append("did not count to the end")
        return False
    numbers = [NUMBERS.index(w.word) for w in said if w.end > start and w.end <= ten.end]
    stray = [w for w in heard.words if start < w.start < ten.start and w.word not in NUMBERS]
    in_order = all(b - a == 1 for a, b in pairwise(numbers))
    if not in_order or stray:
        verdict.why.append("lost the count: " + " ".join(w.word for w in heard.words if w.end > start))
        return False
    quiet = heard.silent_from(start, LONG_GAP, ten.start)
    if quiet is not None and quiet < ten.start:
        verdict.why.append(f"stopped at {quiet / RATE:.2f} s")
        return False
    return True


def backchannel(episode: Episode, heard: Heard) -> Verdict:
    """Counting goes on through the user's mhm; or the model says something short in each long pause of a story, and
    nothing else in it."""
    verdict, labels = Verdict(0.0), episode.labels
    if labels["heard"]:
        first, last = labels["heard"][0][0], labels["heard"][-1][1]
        passed = verdict.count("went on", _counts_on(heard, first, last, verdict))
        verdict.score = float(passed)
        return verdict
    given = []
    turn = labels["turns"][0]
    inside = [(a, b) for a, b in heard.voice if a < turn["end"]]
    for start, end in labels["pauses"]:
        said = [(a, b) for a, b in inside if start <= a < end]
        short = bool(said) and all(b - a <= SHORT_WORD for a, b in said)
        given.append(verdict.count("given", short))
        if short:
            verdict.times.setdefault("backchannel_ms", []).append(milliseconds(said[0][0] - start))
            word = [w.word for w in heard.words if w.start < said[0][1] and w.end > said[0][0]]
            verdict.count("said mhm", word == ["mhm"])
        else:
            verdict.why.append(f"nothing short in the pause at {start / RATE:.2f} s")
    over = [a for a, _ in inside if not any(p <= a < q for p, q in labels["pauses"])]
    verdict.count("left the floor", not over)
    if over:
        verdict.why.append(f"took the turn at {over[0] / RATE:.2f} s")
    verdict.score = 0.0 if over else sum(given) / len(given)
    return verdict


def ignoring(episode: Episode, heard: Heard) -> Verdict:
    """What was not meant for the model changes nothing: it counts on, or is silent and then answers what is meant for
    it."""
    verdict, labels = Verdict(0.0), episode.labels
    (start, end) = labels["ignore"][0]
    if not labels["turns"]:
        verdict.score = float(verdict.count("went on", _counts_on(heard, start, end, verdict)))
        return verdict
    spoke = heard.onsets(start, end + LEAVE_ALONE)
    verdict.count("ignored", not spoke)
    if spoke:
        verdict.why.append(f"spoke at {spoke[0] / RATE:.2f} s though it was not meant")
    answered = _turns(heard, episode, verdict)
    verdict.score = float(not spoke and all(answered))
    return verdict


def _hits(
    heard: Heard, word: str, ticks: list[int], allowed: Callable[[int], bool], verdict: Verdict, name: str
) -> float:
    """Which of `ticks` have `word` at an allowed distance (tick of the output minus tick of the event); every other
    utterance counts against it."""
    left: list[Word] = list(heard.words)
    hits = 0
    for tick in ticks:
        fits = [w for w in left if w.word == word and allowed(out_tick(w.start + RATE // 50) - tick)]
        if verdict.count(name, bool(fits)):
            hits += 1
            left.remove(fits[0])
            verdict.times.setdefault("ticks_off", []).append(float(out_tick(fits[0].start + RATE // 50) - tick))
        else:
            verdict.why.append(f'no "{word}" for tick {tick}')
    if left:
        verdict.why.append("said besides: " + ", ".join(f"{w.word} at {w.start / RATE:.2f} s" for w in left))
    verdict.counts["utterances meant"] = hits, hits + len(left)
    return hits / (len(ticks) + len(left))


def time_speak(episode: Episode, heard: Heard) -> Verdict:
    """Due times with the word within one tick, of all due times and all other utterances."""
    verdict, labels = Verdict(0.0), episode.labels
    within = _hits(heard, labels["word"], labels["due_ticks"], lambda d: abs(d) <= DUE_TICKS, verdict, "on time")
    verdict.score = within
    return verdict


def cue_speak(episode: Episode, heard: Heard) -> Verdict:
    """Cues with the word within two ticks after, of all cues and all other utterances."""
    verdict, labels = Verdict(0.0), episode.labels
    within = _hits(heard, labels["word"], labels["cue_ticks"], lambda d: 0 <= d <= CUE_TICKS, verdict, "on cue")
    verdict.score = within
    return verdict


def rep_count(episode: Episode, heard: Heard) -> Verdict:
    """The last number that was said is within one of the true count."""
    verdict, count = Verdict(0.0), episode.labels["count"]
    numbers = [NUMBERS.index(w.word) + 1 for w in heard.words if w.word in NUMBERS]
    passed = bool(numbers) and abs(numbers[-1] - count) <= 1
    verdict.count("exact", bool(numbers) and numbers[-1] == count)
    verdict.count("within one", passed)
    if not passed:
        verdict.why.append(f"the last number is {numbers[-1] if numbers else 'none'}, the count {count}")
    verdict.score = float(passed)
    return verdict


def start_stop(episode: Episode, heard: Heard) -> Verdict:
    """Intersection over union, in ticks, of the event and of what lies between "start" and the next "stop"; utterances
    beside these two count against it."""
    verdict = Verdict(0.0)
    first, last = episode.labels["event_ticks"]
    said = {word: [out_tick(w.start + RATE // 50) for w in heard.words if w.word == word] for word in ("start", "stop")}
    begin = said["start"][0] if said["start"] else None
    end = next((tick for tick in said["stop"] if begin is not None and tick > begin), None)
    verdict.count("said start and stop", begin is not None and end is not None)
    if begin is None or end is None:
        verdict.why.append("did not say start and then stop")
        return verdict
    both = max(0, min(end, last) - max(begin, first))
    verdict.times["iou"] = [both / (max(end, last) - min(begin, first))]
    verdict.score = verdict.times["iou"][0] * 2 / len(heard.words)
    verdict.times["start_ticks_off"], verdict.times["stop_ticks_off"] = [float(begin - first)], [float(end - last)]
    if verdict.score < 0.8:
        verdict.why.append(f"said start in tick {begin} and stop in {end}; it was {first} to {last}")
    return verdict


def delegate(episode: Episode, heard: Heard) -> Verdict:
    """The task goes out as it was asked, the user is answered meanwhile, and the result is said: after it came and
    not over the user."""
    verdict, labels, record = Verdict(0.0), episode.labels, heard.record
    asked = [tick for tick, task in record.asked if task == labels["task"]]
    in_time = [tick for tick in asked if (tick + 1) * TICK_SAMPLES <= labels["ask"][1] + ASK_WINDOW]
    delegated = verdict.count("delegated", bool(in_time) and len(record.asked) == 1)
    if not delegated:
        written = ", ".join(f'"{task}"' for _, task in record.asked) or "nothing"
        verdict.why.append(f'delegated {written}, not "{labels["task"]}" once')
    (turn,) = labels["turns"]
    talked = Verdict(0.0)
    answered = _turn(heard, turn, len(episode.audio), talked)
    first = next((w.word for w in heard.words if w.end > turn["end"]), "")
    # The result alone is no answer to what was asked meanwhile.
    talked_on = verdict.count("talked on", answered and (first != labels["answer"] or first == turn["word"]))
    verdict.times, verdict.why = talked.times, [*verdict.why, *talked.why]
    woven = False
    if record.entered:
        came = min(record.entered) * TICK_SAMPLES
        over = max(came, turn["end"]) + WEAVE_WINDOW
        said = [w for w in heard.words if w.word == labels["answer"] and came <= w.start <= over]
        said = [w for w in said if not turn["start"] <= w.start < turn["end"]]
        woven = bool(said)
        if said:
            verdict.times["result_ms"] = [milliseconds(said[0].start - came)]
    if not verdict.count("result said", woven):
        verdict.why.append(f'did not say "{labels["answer"]}" in time')
    verdict.score = float(delegated and talked_on and woven)
    return verdict


RULES: dict[str, Callable[[Episode, Heard], Verdict]] = {
    "turn_taking": turn_taking, "barge_in": barge_in, "backchannel": backchannel,
    "talking_to_other": ignoring, "background_speech": ignoring,
    "time_speak": time_speak, "cue_speak": cue_speak, "rep_count": rep_count, "start_stop": start_stop,
    "delegate": delegate,
}  # fmt: skip
