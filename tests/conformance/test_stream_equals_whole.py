"""N ticks on the compiled engine against one stateless pass of the PyTorch model over the same sequence.

The engine's own choices (tokens, and the samples it hears of itself) are fed to the stateless model, which must then
have made the same choices: every token, and every sample to 1e-4.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tmlc
from tmlc.model_zoo.interaction import load_model

TICKS = 40
TOLERANCE = 1e-4


@dataclass
class Played:
    """What the ticks did, as one sequence of positions."""

    outputs: list[tmlc.TickOutput]
    pcm: np.ndarray
    clips: list[np.ndarray]
    kinds: list[tuple[str, int]]
    choices: list[tuple[int, int]]
    spoken: list[tuple[int, tuple[int, int, int]]]
    silence_level: float


def play(session: tmlc.Session, inputs: list[tmlc.TickInput]) -> Played:
    """Plays `inputs`, and writes down independently of the engine which positions each tick must have appended."""
    tick = session.engine.manifest.tick
    eot, silence = tick.end_of_tick_token_id, tick.silence_token_id
    pcm = np.stack([item.audio for item in inputs]).reshape(-1, 800)
    played = Played([], pcm, [], [], [], [], tick.silence_level)
    queue: list[int] = []
    last_clip = -tick.video_every
    for index, item in enumerate(inputs):
        out = session.tick(item)
        played.outputs.append(out)
        kinds = played.kinds
        kinds += [("heard", index * 4 + j) for j in range(4)]
        if item.video is not None and index - last_clip >= tick.video_every:
            kinds += [("seen", len(played.clips) * 6 + j) for j in range(6)]
            played.clips.append(item.video)
            last_clip = index
        queue += list((item.text or "").encode())
        kinds += [("token", token) for token in queue[: tick.text_in]]
        del queue[: tick.text_in]
        assert 1 <= len(out.tokens) <= tick.text_out
        for token in out.tokens:
            played.choices.append((len(kinds) - 1, token))
            kinds.append(("token", token))
        if out.tokens[-1] != eot:
            kinds.append(("token", eot))
        for j in range(4):
            kinds.append(("spoken", index * 4 + j))
            row = -1 if silence in out.tokens else len(kinds) - 1
            played.spoken.append((row, (session.seed, index, tick.text_out + j)))
    return played


def rows(module, *tensors) -> np.ndarray:
    with torch.no_grad():
        return module(*(torch.from_numpy(np.ascontiguousarray(tensor)) for tensor in tensors)).numpy()


@pytest.fixture(scope="module")
def played(unbounded, conversation):
    checkpoint, package = unbounded
    with tmlc.load(package, threads=1) as engine, engine.session(seed=11) as session:
        result = play(session, conversation(TICKS))
    methods = {name: method.module for name, method in load_model(checkpoint).methods().items()}
    spoken = np.concatenate([out.audio for out in result.outputs]).reshape(-1, 800)
    heard_of_itself = np.concatenate([np.zeros((1, 800), np.float32), spoken[:-1]])
    tokens = np.array([[value] for kind, value in result.kinds if kind == "token"], np.int64)
    streams = {
        "heard": rows(methods["embed_audio"], result.pcm),
        "seen": rows(methods["embed_video"], np.concatenate(result.clips).reshape(-1, 24 * 3)),
        "spoken": rows(methods["embed_speech"], heard_of_itself),
    }
    text = iter(rows(methods["embed_text"], tokens))
    x = np.stack([next(text) if kind == "token" else streams[kind][value] for kind, value in result.kinds])
    return result, methods, rows(methods["decode"], x), spoken


def test_the_conversation_exercises_every_path(played):
    result, *_ = played
    tokens = [out.tokens for out in result.outputs]
    assert any(259 in chosen for chosen in tokens), "no silent tick"
    assert any(chosen[-1] == 260 for chosen in tokens), "no tick that the model ended early"
    assert any(259 not in chosen and 260 not in chosen for chosen in tokens), "no tick full of text"
    assert len(result.clips) >= 5


def test_every_token_is_the_one_the_stateless_model_chooses(played):
    result, methods, hidden, _ = played
    at = [row for row, _ in result.choices]
    logits = rows(methods["unembed"], hidden[at])
    assert logits.argmax(1).tolist() == [token for _, token in result.choices]


def test_every_sample_is_the_one_the_stateless_model_speaks(played):
    result, methods, hidden, spoken = played
    mel = np.full((len(result.spoken), 4, 80), result.silence_level, np.float32)
    loud = [i for i, (row, _) in enumerate(result.spoken) if row >= 0]
    keys = np.array([result.spoken[i][1] for i in loud], np.int64)
    mel[loud] = rows(methods["speak"], hidden[[result.spoken[i][0] for i in loud]], keys).reshape(-1, 4, 80)
    pcm = rows(methods["vocode"], mel.reshape(-1, 80))
    assert np.abs(spoken).max() > 1e-3, "an engine that says nothing proves nothing"
    assert np.abs(np.clip(pcm, -1, 1) - spoken).max() <= TOLERANCE
