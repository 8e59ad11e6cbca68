"""Training: it learns, it can be interrupted anywhere, and what it writes is a checkpoint."""

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tmlc
from tmlc.errors import CheckpointError, TmlcError
from tmlc.model_zoo.interaction import InteractionConfig, InteractionModel, load_model, train
from tmlc.model_zoo.interaction.tasks import TASKS, SpeechBank
from tmlc.model_zoo.interaction.tasks.episode import EVENTS
from tmlc.model_zoo.interaction.tasks.words import MODEL_WORDS
from tmlc.model_zoo.interaction.train import Plan
from tmlc.model_zoo.interaction.training import state as states
from tmlc.model_zoo.interaction.training.curves import draw
from tmlc.model_zoo.interaction.training.late import late, runs
from tmlc.model_zoo.interaction.training.sequence import OwnVoice, lay_out, token_ids
from tmlc.model_zoo.interaction.training.stages import Mixture, ModelStage, Settings, Share, VocoderStage
from tmlc.model_zoo.interaction.training.vocoder import synthesise
from tmlc.model_zoo.interaction.training.workers import Workers


def small() -> InteractionConfig:
    """Nano's ticks and media, with a narrow backbone of two layers."""
    raw = InteractionConfig.from_preset("nano").to_dict()
    raw["text_config"] |= dict(
        hidden_size=32, num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"],
        mlp_layer_types=["dense", "sparse"], num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=16, intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    raw["speech_config"] |= dict(flow_width=32, flow_layers=1, vocoder_width=32, vocoder_layers=2)
    return InteractionConfig.from_dict(raw)


def plan(seed: int = 0, steps: int = 4, size: int = 1) -> Plan:
    settings = Settings(seed=seed, steps=steps, size=size, rate=4e-3, warm_up=2, average=0.5)
    return Plan(settings, settings, Mixture(tasks=("barge_in", "cue_speak", "delegate"), limit=300, group=2))


@pytest.fixture(scope="module")
def bank() -> SpeechBank:
    return SpeechBank.load()


@pytest.fixture(scope="module", autouse=True)
def every_step(tmp_path_factory):
    """Logs and saves every step."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "LOG_EVERY", 1)
    patch.setattr(train, "SAVE_SECONDS", -1.0)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, InteractionModel]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train.train(folder, small(), plan())


def same(a: InteractionModel, b: InteractionModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_both_losses_fall(tmp_path: Path) -> None:
    train.train(tmp_path, small(), plan(steps=16, size=2))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage, parts in (("vocoder", ("spectral",)), ("model", ("text", "flow"))):
        for part in parts:
            values = [row[part] for row in rows if row["stage"] == stage and part in row]
            assert len(values) == 16
            assert np.mean(values[-3:]) < 0.7 * np.mean(values[:3]), (part, values)


@pytest.mark.parametrize(("stage", "calls"), [("VocoderStage", 2), ("ModelStage", 3)])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(trained, tmp_path: Path, monkeypatch, stage, calls) -> None:
    kind, left = getattr(train, stage), [calls]
    loss = kind.loss

    def killed(self, step: int):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(kind, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path, small(), plan())
    monkeypatch.undo()
    monkeypatch.setattr(train, "SAVE_SECONDS", 1e9)
    assert same(train.train(tmp_path, small(), plan()), trained[1])
    for name in ("vocoder.state", "model.state"):
        _, (once, again) = name, (states.read(folder / name)[1] for folder in (trained[0], tmp_path))
        assert once.keys() == again.keys()
        assert all(torch.equal(once[key], again[key]) for key in once)


@pytest.mark.parametrize("stop_after", [2, 4])
def test_workers_share_a_batch_out_and_can_be_interrupted(bank, tmp_path: Path, stop_after: int) -> None:
    both = replace(plan(size=2), workers=2)
    whole = train.train(tmp_path / "whole", small(), both)
    left = iter([True] * stop_after + [False] + [True] * 20)
    train.train(tmp_path / "cut", small(), both, lambda: next(left))
    assert same(train.train(tmp_path / "cut", small(), both), whole)


def test_the_gradient_of_workers_is_the_mean_of_their_shares(bank) -> None:
    plan = (Settings(size=2), bank, Mixture(limit=200, group=1))
    wanted: dict[str, torch.Tensor] = {}
    for index in range(2):
        stage = ModelStage(InteractionModel.random(small(), 0), *plan, Share(index, 2))
        stage.loss(0)[0].backward()
        for name, tensor in stage.tensors.items():
            if tensor.grad is not None:
                wanted[name] = wanted.get(name, 0) + tensor.grad / 2
    with closing(Workers(partial(ModelStage, InteractionModel.random(small(), 0), *plan), 2)) as workers:
        workers.step(0)
        for name, gradient in wanted.items():
            torch.testing.assert_close(workers.stage.tensors[name].grad, gradient, msg=name)


def test_a_worker_that_ended_is_told(bank) -> None:
    make = partial(VocoderStage, InteractionModel.random(small(), 0), Settings(size=2), bank)
    with closing(Workers(make, 2)) as workers:
        (process,) = workers._processes
        process.kill()
        process.join()
        with pytest.raises(TmlcError, match="worker process has ended"):
            workers.step(0)
            workers.step(1)


def test_another_seed_is_another_run(trained, tmp_path: Path) -> None:
    assert not same(train.train(tmp_path, small(), plan(seed=1)), trained[1])


def test_a_run_of_another_model_is_refused(trained) -> None:
    raw = small().to_dict()
    raw["speech_config"]["vocoder_width"] = 48
    with pytest.raises(CheckpointError, match="another shape"):
        train.train(trained[0], InteractionConfig.from_dict(raw), plan())


def test_a_damaged_state_is_refused(trained, tmp_path: Path) -> None:
    (tmp_path / "vocoder.state").write_bytes((trained[0] / "vocoder.state").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train.train(tmp_path, small(), plan())


@pytest.mark.parametrize("task", TASKS)
def test_the_sequence_of_an_episode_chooses_and_speaks_what_the_episode_asks_for(task: str, bank, trained) -> None:
    config = small()
    episode = TASKS[task].episode(3, "train", bank)
    example = lay_out(episode, config, OwnVoice(trained[1].vocoder, config))
    ids = token_ids(config)
    asked = [episode.output_tokens(t, ids) for t in range(episode.ticks)]
    assert example.chosen == [token for tokens in asked for token in tokens]
    assert len(example.spoken) == 4 * episode.speaks.sum() == len(example.mel)
    assert len(example.own) == len(example.own_pcm) == len(example.heard) == len(example.heard_pcm) == 4 * episode.ticks
    assert len(example.seen) == 16 * len(episode.video)
    places = sorted([*example.text, *example.heard, *example.own, *example.seen])
    assert places == list(range(example.length))
    assert len(example.noticed) == len(example.events) and (example.events or task == "time_speak")
    assert set(example.noticed) <= {*example.heard, *example.seen}
    typed = "".join(episode.text).encode()
    assert typed in bytes(token for token in example.ids if token < 256) or task == "cue_speak"


def test_an_utterance_that_begins_late_is_the_same_and_its_missed_tick_does_not_count(bank, trained) -> None:
    config, voice = small(), OwnVoice(trained[1].vocoder, small())
    episode = TASKS["turn_taking"].episode(4, "train", bank)
    moved, ticks = late(episode, 1.0, np.random.default_rng(0))
    assert ticks
    for start, stop in runs(episode.speaks):
        by = int(start in ticks)
        assert moved.target_text[start + by : stop + by] == episode.target_text[start:stop]
        length = (stop - start) * 3200
        there = moved.target_audio[(start + by) * 3200 :][:length]
        np.testing.assert_array_equal(there, episode.target_audio[start * 3200 :][:length])
    assert moved.speaks.sum() == episode.speaks.sum()
    example = lay_out(moved, config, voice, forgiven=ticks)
    silence = config.tick_config.silence_token_id
    free = [token for token, weight in zip(example.chosen, example.weights, strict=True) if not weight]
    assert free == [silence] * len(ticks)


def test_a_word_is_named_in_the_position_in_which_it_is_over_and_in_the_next(bank, trained) -> None:
    config, episode = small(), TASKS["turn_taking"].episode(4, "train", bank)
    example = lay_out(episode, config, OwnVoice(trained[1].vocoder, config))
    (first,) = [e for e in episode.events if e.sample == episode.labels["turns"][0]["end"]]
    assert first.name == episode.labels["turns"][0]["word"] == EVENTS[example.events[2 * episode.events.index(first)]]
    at = example.heard.index(example.noticed[2 * episode.events.index(first)])
    assert at * 800 <= first.sample < (at + 1) * 800


def test_a_word_of_the_models_is_named_in_all_its_ticks_and_not_when_it_is_cut_short(bank, trained) -> None:
    config, voice = small(), OwnVoice(trained[1].vocoder, small())
    episode = TASKS["barge_in"].episode(2, "train", bank)
    example = lay_out(episode, config, voice)
    named: dict[str, int] = {}
    for word in example.words:
        named[MODEL_WORDS[word]] = named.get(MODEL_WORDS[word], 0) + 1
    written = b"".join(text or b"|" for text in episode.target_text).decode().replace("|", " ").split()
    whole = [word for word in written if word in MODEL_WORDS]
    assert set(named) == set(whole) and len(whole) >= 2
    for word, count in named.items():  # 4 positions that speak in each tick, and 1 to 2 choices
        ticks = whole.count(word) * -(-(len(word) + 1) // 2)
        assert 5 * ticks <= count <= 7 * ticks, word
    assert set(example.meant) <= {*example.choices, *example.spoken}


def test_what_a_clip_shows_is_named_at_its_last_patch(bank, trained) -> None:
    config = small()
    seed = next(n for n in range(20) if TASKS["rep_count"].episode(n, "train", bank).labels["seen"])
    episode = TASKS["rep_count"].episode(seed, "train", bank)
    example = lay_out(episode, config, OwnVoice(trained[1].vocoder, config))
    named = {place: EVENTS[event] for place, event in zip(example.noticed, example.events, strict=True)}
    ends = example.seen[15::16]
    assert {"jump", "rest"} == {named[place] for place in ends if place in named}
    assert sum(name == "jump" for name in named.values()) == episode.labels["count"]


def test_speech_that_the_user_cut_short_is_never_late(bank) -> None:
    for seed in range(12):
        episode = TASKS["barge_in"].episode(seed, "train", bank)
        moved, ticks = late(episode, 1.0, np.random.default_rng(0))
        counting = episode.labels["counting_tick"]
        assert counting not in ticks and moved.speaks[counting]


def test_what_the_model_hears_of_itself_is_what_the_vocoder_makes(bank, trained) -> None:
    config, vocoder = small(), trained[1].vocoder
    voice = OwnVoice(vocoder, config)
    for task, seed in (("barge_in", 1), ("turn_taking", 2), ("turn_taking", 3)):
        episode = TASKS[task].episode(seed, "train", bank)
        mel = voice.mel(episode)
        with torch.no_grad():
            whole = vocoder(torch.from_numpy(mel.reshape(-1, mel.shape[-1]))).reshape(-1).clamp(-1, 1)
        np.testing.assert_allclose(voice.samples(mel, episode.speaks), whole.numpy(), atol=1e-5)


def test_the_vocoder_of_a_batch_is_that_of_the_model(trained) -> None:
    mel = torch.randn(2, 12, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = torch.stack([trained[1].vocoder(row).reshape(-1) for row in mel])
        torch.testing.assert_close(synthesise(trained[1].vocoder, mel), each)


def test_the_router_is_moved_towards_experts_that_are_chosen_less(bank) -> None:
    stage = ModelStage(InteractionModel.random(small(), 0), Settings(size=1), bank, Mixture(limit=200, group=1))
    (router,) = stage._routers
    before = router.get_buffer("e_score_correction_bias").clone()
    stage.loss(0)
    stage.after()
    (counts,) = stage._load.counts
    moved = router.get_buffer("e_score_correction_bias") - before
    assert moved[counts.argmax()] < 0 < moved[counts.argmin()]


def test_the_curves_of_a_run_are_drawn(trained, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(trained[0] / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_export_is_a_checkpoint_with_the_averaged_weights(trained, tmp_path: Path) -> None:
    folder, model = trained
    exported = load_model(train.export(folder, small(), tmp_path / "out"))
    for (name, a), b in zip(exported.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0.0, msg=name)


def test_a_model_card_says_what_was_trained_and_measured(trained, tmp_path: Path) -> None:
    task = {"score": 0.875, "interval": [0.75, 0.9375], "episodes": 40}
    scores = {
        "tasks": {"barge_in": task}, "words": {"rate": 0.96, "interval": [0.9, 1.0], "of": 200}, "seed": 7,
        "clicks": {"edges": 900, "clicks": 3, "stand_out": False}, "digest": "ab" * 32, "target": "cpu",
        "precision": "fp32",
    }  # fmt: skip
    card = (train.export(trained[0], small(), tmp_path / "out", scores) / "README.md").read_text()
    assert "| barge_in | 87.5 % | 75.0–93.8 % |" in card
    assert "96.0 % of 200" in card and "model: 4 steps of 1 episodes" in card
    assert "3 of 900; all edges together do not stand out" in card
    assert "turn_taking" not in card


@pytest.mark.slow
def test_an_export_compiles_and_speaks(trained, tmp_path: Path) -> None:
    train.export(trained[0], small(), tmp_path / "out")
    tmlc.compile(tmp_path / "out", tmp_path / "out.tmlc", precision="fp32", check=True)
    with tmlc.load(tmp_path / "out.tmlc", threads=1) as engine:
        session = engine.session()
        assert session.tick(tmlc.TickInput(say=[65, 66])).audio.shape == (3200,)


def test_a_task_that_there_is_not_is_wrong_usage(tmp_path: Path, capsys) -> None:
    assert train.main([str(tmp_path / "run"), "--tasks", "barge_in,juggling"]) == 2
    assert "juggling" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_told_to_stop_keeps_what_it_has(trained, tmp_path: Path) -> None:
    left = iter([True, True, False])
    train.train(tmp_path, small(), plan(), lambda: next(left))
    header, _ = states.read(tmp_path / "vocoder.state")
    assert header["step"] == "2" and not (tmp_path / "model.state").exists()
    assert same(train.train(tmp_path, small(), plan()), trained[1])
