"""Episodes played on a compiled engine, many at a time, as fast as it ticks: the clock is the input's.

A batch is a set of lanes. Each lane holds a session that goes through one episode, and takes the next when it is
done, so that `engine.tick_batch` is called with as many sessions as there are lanes until the last episodes end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tmlc.errors import TmlcError, UsageError
from tmlc.eval.record import Record
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks import episode as geometry
from tmlc.runtimes.background.policies import Marks
from tmlc.runtimes.background.tokens import DelegationReader
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.session import Session
from tmlc.runtimes.core.tick import TickInput, TickOutput

OTHER_ANSWER = "no"
"""What the scripted background model says to a task that it does not know."""


def check_layout(engine: Engine) -> None:
    """UsageError unless the engine's model takes and gives ticks in the geometry of the tasks (that of `nano`)."""
    layout = engine.layout
    wanted = {
        "samples of a tick": (layout.duration_ms * layout.sample_rate // 1000, geometry.TICK_SAMPLES),
        "samples that it speaks": (layout.audio_out * layout.out_hop, geometry.TICK_SAMPLES),
        "frames of a clip": (layout.clip_frames, geometry.CLIP_FRAMES),
        "rows of a frame": (layout.frame_height, geometry.FRAME_SIZE),
        "columns of a frame": (layout.frame_width, geometry.FRAME_SIZE),
        "ticks between clips": (layout.video_every, geometry.VIDEO_EVERY),
    }
    if engine.kind != "interaction" or engine.tokenizer is None:
        raise UsageError(
            "this package holds no interaction model with a tokenizer", where=engine.manifest.model.name,
            fix="evaluate a package of an interaction model, such as one compiled from `tmlc zoo create nano`",
        )  # fmt: skip
    wrong = [f"{name} {has}, not {want}" for name, (has, want) in wanted.items() if has != want]
    if wrong:
        raise UsageError(
            f"the tasks are made for another tick layout: {'; '.join(wrong)}", where=engine.manifest.model.name,
            fix="evaluate a model with the tick layout of the preset nano",
        )  # fmt: skip


@dataclass
class _Lane:
    """A session in the middle of an episode."""

    index: int
    episode: Episode
    session: Session
    reader: DelegationReader
    audio: np.ndarray
    text: list[str] = field(default_factory=list)
    asked: list[tuple[int, str]] = field(default_factory=list)
    entered: dict[int, str] = field(default_factory=dict)
    tick: int = 0
    error: str = ""


def play(
    engine: Engine, episodes: Sequence[Episode], seed: int = 0, done: Callable[[int], None] = lambda index: None
) -> list[Record]:
    """Plays every episode in a session of its own; sessions of the engine that are open already are left alone.

    Args:
        engine: with at least one free session; all free ones are used.
        episodes: in the tick layout of the engine (`check_layout`).
        seed: of the sessions' random choices (tokens are chosen greedily; the flow head draws its noise from it).
        done: told the number of each episode as it ends.

    Returns:
        In the order of `episodes`. A session that an error ended is silent from there on; `Record.error` says why.
    """
    records: dict[int, Record] = {}
    for index, record in played(engine, episodes, seed):
        records[index] = record
        done(index)
    return [records[n] for n in range(len(episodes))]


def played(engine: Engine, episodes: Sequence[Episode], seed: int = 0) -> Iterator[tuple[int, Record]]:
    """The same, each record as soon as it is there."""
    marks = Marks().around_injections(engine.tokenizer)
    waiting = list(range(len(episodes)))[::-1]
    lanes: list[_Lane] = []
    try:
        while waiting or lanes:
            while waiting and engine.slots.free:
                index = waiting.pop()
                lanes.append(_open(engine, index, episodes[index], seed))
            if not lanes:
                raise UsageError("all sessions of the engine are taken", fix="load it with more sessions")
            for lane, out in zip(lanes, _tick(engine, lanes, marks), strict=True):
                _take(lane, out)
            for lane in [lane for lane in lanes if lane.error or lane.tick == lane.episode.ticks]:
                lanes.remove(lane)
                lane.session.close()
                yield lane.index, _close(lane)
    finally:
        for lane in lanes:
            lane.session.close()


def _open(engine: Engine, index: int, episode: Episode, seed: int) -> _Lane:
    assert engine.tokenizer is not None
    reader = DelegationReader(engine.tokenizer, Marks())
    return _Lane(index, episode, engine.session(seed=seed), reader, np.zeros(len(episode.audio), np.float32))


def _tick(engine: Engine, lanes: Sequence[_Lane], marks: tuple[int, int]) -> list[TickOutput | Exception]:
    inputs = [_input(engine, lane, marks) for lane in lanes]
    if engine.batched:
        return engine.tick_batch([lane.session for lane in lanes], inputs)
    found: list[TickOutput | Exception] = []
    for lane, given in zip(lanes, inputs, strict=True):
        try:
            found.append(lane.session.tick(given))
        except TmlcError as error:
            found.append(error)
    return found


def _input(engine: Engine, lane: _Lane, marks: tuple[int, int]) -> TickInput:
    """What the user does in this tick, and what the background model says."""
    assert engine.tokenizer is not None
    episode, tick = lane.episode, lane.tick
    at = tick * geometry.TICK_SAMPLES
    inject: list[int] = []
    if tick in lane.entered:
        inject = [marks[0], *engine.tokenizer.encode(lane.entered[tick]), marks[1]]
    return TickInput(
        audio=episode.audio[at : at + geometry.TICK_SAMPLES],
        video=episode.video.get(tick),
        text=episode.text[tick] or None,
        inject=inject,
    )


def _take(lane: _Lane, out: TickOutput | Exception) -> None:
    """Keeps what a tick gave. A task that it ended is answered by the scripted background model, once, after the
    delay of the episode."""
    if isinstance(out, Exception):
        lane.error = str(out)
        return
    at = lane.tick * geometry.TICK_SAMPLES
    lane.audio[at : at + len(out.audio)] = out.audio
    said, tasks = lane.reader.push(out.tokens)
    lane.text.append(said)
    labels = lane.episode.labels
    for task in tasks:
        lane.asked.append((lane.tick, task))
        if "task" in labels and not lane.entered:
            answer = labels["answer"] if task == labels["task"] else OTHER_ANSWER
            lane.entered[lane.tick + labels["delay_ticks"]] = answer
    lane.tick += 1


def _close(lane: _Lane) -> Record:
    text = lane.text + [""] * (lane.episode.ticks - len(lane.text))
    # An answer that had not come when the episode ended has not been heard.
    entered = {tick: answer for tick, answer in lane.entered.items() if tick < lane.tick}
    return Record(lane.audio, text, lane.asked, entered, lane.error)
