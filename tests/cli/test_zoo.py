"""`tmlc zoo`."""

import json
import math
import shutil

import pytest

from tmlc.errors import UsageError
from tmlc.model_zoo.interaction import shipped
from tmlc.model_zoo.interaction.config import PRESETS


def test_list_gives_every_model_with_its_size(tmlc_cli):
    out = tmlc_cli("zoo", "list").stdout
    assert all(name in out for name in (*PRESETS, *shipped.SHIPPED))
    rows = {row["name"]: row for row in tmlc_cli("zoo", "list", "--json").json}
    assert list(rows) == [*PRESETS, *shipped.SHIPPED]
    assert {rows[name]["weights"] for name in PRESETS} == {"random"}
    assert 4e6 < rows["nano"]["parameters"] < 6e6
    assert rows["small"]["active_parameters"] < rows["small"]["parameters"] / 5


@pytest.fixture(scope="module")
def nano(tmlc_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "nano"
    tmlc_cli("zoo", "create", "nano", "--seed", "0", "-o", folder)
    return folder


def test_create_writes_a_checkpoint_that_inspect_reads(tmlc_cli, nano):
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in nano.iterdir()}
    view = tmlc_cli("inspect", nano, "--json").json
    assert view["model_type"] == "tmlc_interaction"
    assert view["parameters"] == sum(math.prod(t["shape"]) for t in view["tensors"].values())


def test_the_seed_decides_every_byte(tmlc_cli, nano, tmp_path):
    made = tmlc_cli("zoo", "create", "nano", "--seed", "0", "-o", tmp_path / "same", "--json").json
    assert made["seed"] == 0 and made["shards"] >= 1
    for path in nano.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    tmlc_cli("zoo", "create", "nano", "--seed", "1", "-o", tmp_path / "other")
    name = next(p.name for p in nano.iterdir() if p.suffix == ".safetensors")
    assert (tmp_path / "other" / name).read_bytes() != (nano / name).read_bytes()


def test_shards_are_as_small_as_asked(tmlc_cli, tmp_path):
    made = tmlc_cli("zoo", "create", "nano", "--shard-mb", "5", "-o", tmp_path / "nano", "--json").json
    assert made["shards"] > 2
    index = json.loads((tmp_path / "nano" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == made["shards"]


def test_nothing_is_overwritten_without_force(tmlc_cli, tmp_path):
    target = tmp_path / "nano"
    tmlc_cli("zoo", "create", "nano", "-o", target)
    (target / "mine.txt").write_text("precious")
    assert "already exists" in tmlc_cli("zoo", "create", "nano", "-o", target, code=2).stderr
    assert (target / "mine.txt").read_text() == "precious"
    tmlc_cli("zoo", "create", "nano", "-o", target, "--force")
    assert (target / "config.json").is_file() and not (target / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["nano"]


def test_force_replaces_a_link_and_not_what_it_leads_to(tmlc_cli, tmp_path, nano):
    shutil.copytree(nano, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    tmlc_cli("zoo", "create", "nano", "--seed", "1", "-o", tmp_path / "link", "--force")
    assert files_of(tmp_path / "real") == files_of(nano) != files_of(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_an_unknown_model_is_told_all_that_there_are(tmlc_cli, tmp_path):
    text = tmlc_cli("zoo", "create", "giant", "-o", tmp_path / "x", code=2).stderr
    assert all(name in text for name in (*PRESETS, *shipped.SHIPPED))


def test_too_little_room_is_told_in_figures(tmlc_cli, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = tmlc_cli("zoo", "create", "nano", "-o", tmp_path / "x", code=2).stderr
    assert "needs 20.0 MB and 5.0 MB are free" in text


def test_force_never_removes_a_folder_that_is_no_checkpoint(tmlc_cli, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert "not a checkpoint" in tmlc_cli("zoo", "create", "nano", "-o", tmp_path, "--force", code=2).stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_matrices_can_be_stored_in_bf16(tmlc_cli, tmp_path):
    tmlc_cli("zoo", "create", "nano", "--dtype", "bfloat16", "-o", tmp_path / "nano")
    tensors = tmlc_cli("inspect", tmp_path / "nano", "--json").json["tensors"]
    assert tensors["lm_head.weight"]["dtype"] == "BF16" and tensors["model.norm.weight"]["dtype"] == "F32"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_trained_checkpoint_is_copied_as_it_is(tmlc_cli, nano, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "checkpoints")
    kept = tmp_path / "checkpoints" / "interaction-nano"
    shutil.copytree(nano, kept)
    (kept / "README.md").write_text("the model card")
    made = tmlc_cli("zoo", "create", "interaction-nano", "-o", tmp_path / "out", "--json").json
    assert made["weights"] == "trained" and made["seed"] is None and made["parameters"] > 4e6
    assert files_of(tmp_path / "out") == files_of(kept)
    assert "trained weights" in tmlc_cli("zoo", "create", "interaction-nano", "-o", tmp_path / "out", "--force").stdout
    rows = {row["name"]: row for row in tmlc_cli("zoo", "list", "--json").json}
    assert rows["interaction-nano"]["weights"] == "trained" and rows["interaction-nano"]["layers"] == 4
    for option in (["--seed", "0"], ["--dtype", "bfloat16"], ["--shard-mb", "5"]):
        result = tmlc_cli("zoo", "create", "interaction-nano", "-o", tmp_path / "other", *option, code=2)
        assert option[0] in result.stderr and "copied as they are" in result.stderr


def test_trained_weights_that_are_not_here_are_an_error_and_leave_nothing(tmlc_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "checkpoints")
    result = tmlc_cli("zoo", "create", "interaction-nano", "-o", tmp_path / "out", code=2)
    assert "model.safetensors" in result.stderr and "docs/training.md" in result.stderr
    rows = {row["name"]: row for row in tmlc_cli("zoo", "list", "--json").json}
    assert rows["interaction-nano"]["weights"] == "not here" and rows["interaction-nano"]["parameters"] is None
    assert "not here" in tmlc_cli("zoo", "list").stdout
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="comes with tmlc"):
        shipped.shipped("nano")
