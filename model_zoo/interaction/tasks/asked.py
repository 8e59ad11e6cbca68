"""Tasks that are asked for in writing: to speak at certain times, at a cue, to count, to tell a start and an end."""

from __future__ import annotations

from .episode import TICK_SAMPLES, VIDEO_EVERY, Task
from .scenes import Scene
from .spoken import ASKED
from .stage import HEARD, Stage, react
from .words import NUMBERS, SAMPLE_RATE, STORY

TICKS_A_SECOND = 5
AT_SECONDS = (6, 8, 10)
"""Of "WORD at Ns"; the session is still within the model's context then."""


def time_speak(stage: Stage) -> None:
    """ "WORD every Ns", "WORD in Ns": time runs from the tick in which the last letter was typed. "WORD at Ns": it runs
    from the beginning of the session."""
    word, way = stage.pick(ASKED), str(stage.rng.choice(["every", "in", "at"], p=[0.6, 0.2, 0.2]))
    seconds = int(stage.rng.choice(AT_SECONDS)) if way == "at" else int(stage.rng.integers(2, 5))
    asked = stage.type(f"{word} {way} {seconds}s", int(stage.rng.integers(1, 6)))
    begin = 0 if way == "at" else asked
    due = [begin + seconds * TICKS_A_SECOND * n for n in range(1, 5 if way == "every" else 2)]
    due = [tick for tick in due if tick <= begin + 12 * TICKS_A_SECOND]
    for tick in due:
        stage.say(word, tick)
    # Until shortly before it would be due once more; a word that is said once must not be said again.
    rest = seconds * TICKS_A_SECOND - 3 if way == "every" else 5 * TICKS_A_SECOND
    stage.lasts((due[-1] + rest) * TICK_SAMPLES)
    stage.labels |= {"word": word, "due_ticks": due, "asked_tick": asked, "seconds": seconds, "way": way}


def cue_speak(stage: Stage) -> None:
    """ "WORD at beep" or "WORD at flash", while the user talks all the time."""
    word, seen = stage.pick(ASKED), bool(stage.rng.random() < 0.5)
    begin = stage.type(f"{word} at {'flash' if seen else 'beep'}", int(stage.rng.integers(1, 6)))
    cues = _moments(stage, begin, int(stage.rng.integers(2, 4)), seen, 1.6, 2.8)
    end = max(cues) + SAMPLE_RATE
    scene = Scene(stage.rng)
    ticks = [cue // TICK_SAMPLES if seen else react(cue) for cue in cues]
    for cue, tick in zip(cues, ticks, strict=True):
        if seen:
            stage.show(tick, "flash", scene.flash())
        else:
            beep(stage, cue)
        stage.say(word, tick)
    if seen:
        _rest(stage, scene, end, ticks)
    at = (begin + 1) * TICK_SAMPLES
    while at < end:
        at = stage.user(stage.pick(STORY), at) + stage.between(0.02, 0.25)
    stage.labels |= {"word": word, "cues": cues, "cue_ticks": [cue // TICK_SAMPLES for cue in cues], "seen": seen}


def rep_count(stage: Stage) -> None:
    """ "count beeps" or "count jumps"; the model says each number when it has come."""
    seen = bool(stage.rng.random() < 0.5)
    begin = stage.type(f"count {'jumps' if seen else 'beeps'}", int(stage.rng.integers(1, 6)))
    count = int(stage.rng.integers(2, 7 if seen else 9))
    events = _moments(stage, begin, count, seen, 1.0, 1.7)
    scene = Scene(stage.rng)
    ticks = [event // TICK_SAMPLES if seen else react(event) for event in events]
    for number, event, tick in zip(NUMBERS, events, ticks, strict=False):
        if seen:
            stage.show(tick, "jump", scene.jump())
        else:
            beep(stage, event)
        stage.say(number, tick)
    if seen:
        _rest(stage, scene, events[-1] + 2 * SAMPLE_RATE, ticks)
    stage.lasts(events[-1] + 2 * SAMPLE_RATE)
    stage.labels |= {"count": count, "events": events, "seen": seen}


def start_stop(stage: Stage) -> None:
    """ "tell moves" or "tell hum"; the model says start when it begins and stop when it has ended."""
    seen = bool(stage.rng.random() < 0.5)
    begin = stage.type(f"tell {'moves' if seen else 'hum'}", int(stage.rng.integers(1, 6)))
    first = _next_clip(begin + int(stage.rng.integers(4, 12))) if seen else begin + int(stage.rng.integers(4, 14))
    last = first + (5 * int(stage.rng.integers(4, 8)) if seen else int(stage.rng.integers(20, 36)))
    if seen:
        scene = Scene(stage.rng)
        for tick in range(0, last + 11, VIDEO_EVERY):
            moving = first <= tick < last
            stage.show(tick, "move" if moving else "rest", scene.move() if moving else scene.rest())
    else:
        # Both edges early enough in their tick to be told in the same one.
        on = first * TICK_SAMPLES + stage.between(0.0, 0.07)
        off = last * TICK_SAMPLES + stage.between(0.0, 0.05)
        stage.tone(float(stage.rng.uniform(140, 260)), on, off - on, level=0.06, overtones=3)
        for sample in range(on + 1600, off, 1600):
            stage.notice("hum", sample)
    stage.say("start", first)
    stage.say("stop", last)
    stage.lasts((last + 8) * TICK_SAMPLES)
    stage.labels |= {"event_ticks": [first, last], "seen": seen}


def beep(stage: Stage, at: int) -> None:
    stage.tone(float(stage.rng.uniform(900, 1300)), at, SAMPLE_RATE // 5)
    stage.notice("beep", at + HEARD)


def _moments(stage: Stage, begin: int, count: int, seen: bool, low: float, high: float) -> list[int]:
    """Samples at which events begin, `low` to `high` seconds apart; with `seen`, at the start of a tick with a clip."""
    at, found = (begin + 1) * TICK_SAMPLES + stage.between(0.6, 1.4), []
    for _ in range(count):
        tick = _next_clip(-(-at // TICK_SAMPLES))
        found.append(tick * TICK_SAMPLES if seen else at)
        at = found[-1] + stage.between(low, high)
    return found


def _next_clip(tick: int) -> int:
    """The first tick from `tick` on with a clip."""
    return -(-tick // VIDEO_EVERY) * VIDEO_EVERY


def _rest(stage: Stage, scene: Scene, end: int, besides: list[int]) -> None:
    """Clips in which nothing happens, up to sample `end`, but for those ticks."""
    for tick in range(0, end // TICK_SAMPLES + 1, VIDEO_EVERY):
        if tick not in besides:
            stage.show(tick, "rest", scene.rest())


TASKS = (
    Task("time_speak", "says a word at the times that it was asked for", time_speak),
    Task("cue_speak", "says a word at a sound or a sight, while the user speaks", cue_speak),
    Task("rep_count", "counts beeps or jumps as they come", rep_count),
    Task("start_stop", "says when something starts and when it has ended", start_stop),
)
