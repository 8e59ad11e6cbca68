"""Checkpoints: deterministic, complete or not there at all, readable by the tools of others, and checked on load."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tmlc.errors import CheckpointError, UsageError
from tmlc.model_zoo.interaction import InteractionConfig, InteractionModel, create_checkpoint, load_model, presets
from tmlc.model_zoo.interaction import checkpoint as checkpoint_module


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("nano", 0, tmp_path_factory.mktemp("zoo") / "nano")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_presets_have_the_sizes_that_they_promise() -> None:
    found = presets()
    assert list(found) == ["nano", "small", "tml-small-276b"]
    assert 4.5e6 < found["nano"].parameters < 5.5e6
    assert 0.95e9 < found["small"].parameters < 1.05e9
    assert 1.4e8 < found["small"].active_parameters < 1.6e8
    # 263.6 B of backbone (42 layers, two of them dense, embedding and head) and 0.4 B of stems and speech.
    assert 2.63e11 < found["tml-small-276b"].parameters < 2.65e11
    assert 1.10e10 < found["tml-small-276b"].active_parameters < 1.2e10
    assert all(info.description for info in found.values())


def test_the_large_preset_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = InteractionModel(InteractionConfig.from_preset("tml-small-276b"))
    assert model.model.layers[2].mlp.experts.gate_up_proj.shape == (256, 4096, 4096)
    windows = [layer.self_attn.window for layer in model.model.layers]
    assert windows == ([512] * 5 + [0]) * 7
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_folder_has_the_hugging_face_form(nano: Path) -> None:
    assert sorted(path.name for path in nano.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]  # fmt: skip
    assert json.loads((nano / "config.json").read_text())["model_type"] == "tmlc_interaction"
    with safe_open(nano / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.get_slice("model.layers.1.self_attn.k_sconv.conv1d.weight").get_shape() == [64, 1, 4]
    assert {"model.embed_tokens.embed_norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias", "self_voice",
            "audio_tower.embed_audio_tokens.embed_audio_tokens.weight", "vision_tower.final_norm.weight",
            "speech.times", "vocoder.window", "lm_head.weight"} <= names  # fmt: skip


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(nano: Path, tmp_path: Path) -> None:
    again = create_checkpoint("nano", 0, tmp_path / "again")
    other = create_checkpoint("nano", 1, tmp_path / "other")
    assert digests(again) == digests(nano)
    assert digests(other)["model.safetensors"] != digests(nano)["model.safetensors"]


def test_a_loaded_model_is_the_random_model_of_its_seed(nano: Path) -> None:
    loaded = load_model(nano).state_dict()
    fresh = InteractionModel.random(InteractionConfig.from_preset("nano"), seed=0).state_dict()
    assert loaded.keys() == fresh.keys()
    assert all(torch.equal(loaded[name], fresh[name]) for name in fresh)


def test_shards_hold_the_same_tensors_and_are_indexed(nano: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = create_checkpoint("nano", 0, tmp_path / "cut", shard_bytes=4_000_000,
                               on_progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) >= 5 and set(index["weight_map"].values()) == {path.name for path in shards}
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert seen[-1] == (index["metadata"]["total_size"],) * 2 and seen == sorted(seen)
    one, many = load_model(nano).state_dict(), load_model(folder).state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_bfloat16_checkpoints_keep_delicate_tensors_wide(nano: Path, tmp_path: Path) -> None:
    folder = create_checkpoint("nano", 0, tmp_path / "narrow", dtype="bfloat16")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    for name in ("model.layers.1.mlp.experts.down_proj", "lm_head.weight", "speech.input.weight"):
        assert kinds[name] == torch.bfloat16
    for name in ("model.layers.1.mlp.gate.weight", "model.norm.weight", "model.layers.0.mlp_sconv.conv1d.weight",
                 "model.layers.1.self_attn.rel_logits_proj.proj", "audio_tower.mel_filters"):  # fmt: skip
        assert kinds[name] == torch.float32
    wide, narrow = load_model(nano).state_dict(), load_model(folder).state_dict()
    assert all(torch.equal(narrow[name], wide[name].to(kinds[name]).float()) for name in wide)


def test_the_tokenizer_maps_bytes_to_themselves_and_knows_the_special_tokens(nano: Path) -> None:
    tokenizer = Tokenizer.from_file(str(nano / "tokenizer.json"))
    text = "Grüße, 你好 \n\t🙂 <b>"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id("<silence>") == 259 and tokenizer.token_to_id("<end_of_tick>") == 260
    assert tokenizer.get_vocab_size() == 272
    assert tokenizer.encode("a<silence>b").ids == [97, 259, 98]


def test_special_tokens_must_not_take_the_bytes_ids(tmp_path: Path) -> None:
    raw = InteractionConfig.from_preset("nano").to_dict()
    raw["text_config"]["bos_token_id"] = 1
    with pytest.raises(UsageError, match="<bos>"):
        create_checkpoint(InteractionConfig.from_dict(raw), 0, tmp_path / "bad")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_or_a_used_folder_is_refused(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown preset"):
        create_checkpoint("nanno", 0, tmp_path / "x")
    before = digests(nano)
    with pytest.raises(UsageError, match="not empty"):
        create_checkpoint("nano", 1, nano)
    assert digests(nano) == before
    with pytest.raises(UsageError, match="dtype"):
        create_checkpoint("nano", 0, tmp_path / "x", dtype="int3")  # type: ignore[arg-type]


def test_a_checkpoint_larger_than_the_disk_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UsageError, match=r"needs 20\.0 MB"):
        create_checkpoint("nano", 0, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    drawn = checkpoint_module.initial_tensor

    def failing(name: str, *args: object) -> np.ndarray:
        if name.startswith("model.layers.2"):
            raise stop
        return drawn(name, *args)

    monkeypatch.setattr(checkpoint_module, "initial_tensor", failing)
    with pytest.raises((KeyboardInterrupt, UsageError)) as caught:
        create_checkpoint("nano", 0, tmp_path / "x")
    assert isinstance(caught.value, KeyboardInterrupt) or "disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_loading_names_what_is_missing_extra_or_misshapen(nano: Path, tmp_path: Path) -> None:
    state = load_model(nano).state_dict()
    del state["self_voice"]
    state["stranger"] = torch.zeros(2)
    state["speech.times"] = torch.zeros(3, 3)
    shutil.copy(nano / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert "self_voice is missing" in str(caught.value) and "stranger is not part" in str(caught.value)
    assert "speech.times is [3, 3] instead of [32, 192]" in str(caught.value)


def test_damaged_folders_give_one_clear_error(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_model(tmp_path)
    shutil.copy(nano / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((nano / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)


def test_reading_a_configuration_needs_no_torch(nano: Path) -> None:
    code = ("import sys; from tmlc.model_zoo.interaction import InteractionConfig as C; "
            f"C.from_folder({str(nano)!r}); sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
