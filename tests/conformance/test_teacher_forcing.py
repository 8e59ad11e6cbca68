"""What training teaches is what runs: the teacher-forced sequence of a conversation, through the batched form that
training uses, has the hidden states, choices and spoken frames of the engine that streamed the conversation."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import tmlc
from tmlc.model_zoo.interaction import load_model
from tmlc.model_zoo.interaction.tasks import Episode, TokenIds
from tmlc.model_zoo.interaction.training.parallel import hidden_states
from tmlc.model_zoo.interaction.training.sequence import Batch, OwnVoice, collate, embed, lay_out
from tmlc.runtimes.core.tick import TickOutput

TICKS = 24


@dataclass
class Recorded(Episode):
    """A conversation that took place: the tokens are those that the engine chose."""

    tokens: list[list[int]] = field(default_factory=list)

    def output_tokens(self, tick: int, ids: TokenIds) -> list[int]:
        return self.tokens[tick]


class RecordedVoice(OwnVoice):
    """The samples that the engine handed out."""

    def __init__(self, outputs: list[TickOutput]) -> None:
        self.outputs = outputs

    def mel(self, episode: Episode) -> np.ndarray:
        return np.zeros((episode.ticks, 16, 80), np.float32)

    def samples(self, mel: np.ndarray, speaks: np.ndarray) -> np.ndarray:
        return np.concatenate([out.audio for out in self.outputs])


def play(package: Path, inputs: list[tmlc.TickInput]) -> tuple[list[TickOutput], np.ndarray]:
    """(outputs, hidden states of every position) of a streamed conversation."""
    rows: list[np.ndarray] = []
    with tmlc.load(package, threads=1) as engine:
        begin = engine.model.begin
        engine.model.begin = lambda slots, sink=None: begin(slots, lambda hidden: rows.append(hidden.copy()))
        session = engine.session(seed=5)
        outputs = [session.tick(item) for item in inputs]
    return outputs, np.concatenate(rows)


@pytest.fixture(scope="module")
def streamed(unbounded, conversation) -> tuple[list[TickOutput], np.ndarray, Batch, torch.Tensor]:
    checkpoint, package = unbounded
    inputs = conversation(TICKS)
    inputs[9].inject = [261, 70, 71, 262]
    outputs, hidden = play(package, inputs)
    text = [item.text or "" for item in inputs]
    video = {t: item.video for t, item in enumerate(inputs) if item.video is not None}
    model = load_model(checkpoint)
    episode = Recorded(
        "recorded", 0, "test", TICKS, np.concatenate([item.audio for item in inputs]), video, text, {9: ""}, [],
        np.zeros(0, np.float32), [], np.array([259 not in out.tokens for out in outputs]), {},
        tokens=[out.tokens for out in outputs],
    )  # fmt: skip
    episode.injected_tokens = lambda tick, ids: list(inputs[tick].inject)
    example = lay_out(episode, model.config, RecordedVoice(outputs))
    # A shorter companion, so that the batch is padded.
    batch = collate([example, lay_out(episode, model.config, RecordedVoice(outputs), limit=100)], model)
    with torch.no_grad():
        whole = hidden_states(model.model, embed(model, batch), real=batch.real)
    return outputs, hidden, batch, whole


def test_the_conversation_speaks_writes_and_is_silent(streamed) -> None:
    outputs = streamed[0]
    assert 0 < sum(out.stats["silent"] for out in outputs) < TICKS
    assert any(out.text for out in outputs)


def test_every_hidden_state_of_the_teacher_forced_sequence_is_the_engines(streamed) -> None:
    _, hidden, _, whole = streamed
    assert len(hidden) == whole.shape[1]
    np.testing.assert_allclose(whole[0].numpy(), hidden, atol=2e-4)


def test_an_example_that_is_cut_and_padded_has_the_states_of_its_beginning(streamed) -> None:
    _, hidden, batch, whole = streamed
    short = int(batch.real[1].sum())
    assert 0 < short <= 100 < len(hidden)
    np.testing.assert_allclose(whole[1, :short].numpy(), hidden[:short], atol=2e-4)


def test_the_choices_of_the_sequence_are_those_that_the_engine_made(streamed, unbounded) -> None:
    outputs, _, batch, whole = streamed
    model = load_model(unbounded[0])
    with torch.no_grad():
        logits = model.methods()["unembed"].module(whole.flatten(0, 1)[batch.choices])
    chosen = logits.argmax(-1)
    assert torch.equal(chosen, batch.chosen)
    made = sum(len(out.tokens) for out in outputs)
    assert batch.chosen[:made].tolist() == [token for out in outputs for token in out.tokens]


def test_speech_hangs_on_the_positions_that_the_engine_speaks_from(streamed, unbounded) -> None:
    outputs, _, batch, whole = streamed
    model, spoken = load_model(unbounded[0]), [out for out in outputs if not out.stats["silent"]]
    where = batch.spoken[: 4 * len(spoken)]
    text_out = model.config.tick_config.text_out
    keys = torch.tensor([[5, out.index, text_out + j] for out in spoken for j in range(4)])
    with torch.no_grad():
        frames = model.speech(whole.flatten(0, 1)[where], keys).reshape(len(spoken), 16, 80)
        quiet = torch.full((16, 80), model.config.speech_config.silence_level)
        ticks = {out.index: frames[n] for n, out in enumerate(spoken)}
        pcm = model.vocoder(torch.cat([ticks.get(t, quiet) for t in range(TICKS)]))
    streamed_pcm = np.concatenate([out.audio for out in outputs])
    np.testing.assert_allclose(pcm.reshape(-1).clamp(-1, 1).numpy(), streamed_pcm, atol=2e-3)
