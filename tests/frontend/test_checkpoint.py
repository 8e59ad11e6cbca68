"""The checkpoint reader refuses damaged folders with one clear line, and reads sound ones lazily."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tmlc.errors import CheckpointError
from tmlc.frontend.checkpoint import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Two shards with three tensors, an index, a config."""
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "s1.safetensors"
    )
    save_file({"c": torch.full((2,), 1.5, dtype=torch.float16)}, tmp_path / "s2.safetensors")
    weight_map = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    return tmp_path


def refuses(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_a_sound_folder_reads_like_a_mapping(folder):
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint) == ["a", "b", "c"] and "a" in checkpoint and len(checkpoint) == 3
    assert torch.equal(checkpoint.get("a"), torch.arange(6.0).reshape(2, 3))
    assert checkpoint["b"].dtype == torch.bfloat16
    assert checkpoint.config == {"model_type": "x"}


def test_float16_is_widened_exactly(folder):
    assert torch.equal(open_checkpoint(folder).get("c"), torch.full((2,), 1.5))


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).tensors["a"].shape == (2,)


def test_the_digest_covers_config_index_and_shards_and_notices_a_change(folder):
    before = open_checkpoint(folder).digest()
    assert set(before) == {"config.json", "model.safetensors.index.json", "s1.safetensors", "s2.safetensors"}
    (folder / "config.json").write_text('{"model_type": "y"}')
    after = open_checkpoint(folder).digest()
    assert {n for n in before if before[n] != after[n]} == {"config.json"}


def test_no_folder(tmp_path):
    refuses(tmp_path / "absent", "no checkpoint folder", "absent")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuses(folder, "config.json")


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    refuses(folder, "config.json")


def test_config_that_is_not_an_object(folder):
    (folder / "config.json").write_text("[1]")
    refuses(folder, "not a JSON object")


def test_no_shards(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, "neither")


def test_a_missing_shard_is_named(folder):
    (folder / "s2.safetensors").unlink()
    refuses(folder, "s2.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_shard_is_refused(folder, keep):
    data = (folder / "s1.safetensors").read_bytes()
    (folder / "s1.safetensors").write_bytes(data[:keep])
    refuses(folder, "s1.safetensors")


def test_bytes_after_the_end_are_refused(folder):
    data = (folder / "s1.safetensors").read_bytes()
    (folder / "s1.safetensors").write_bytes(data + b"x")
    refuses(folder, "after its end")


def test_a_shard_that_is_something_else_is_refused(folder):
    (folder / "s1.safetensors").write_bytes(b"PK\x03\x04" * 20)
    refuses(folder, "s1.safetensors")


def test_a_tensor_listed_but_absent_is_named(folder):
    edit_index(folder, lambda index: index["weight_map"].update(d="s2.safetensors"))
    refuses(folder, "d (in s2.safetensors)")


def test_a_tensor_present_but_not_listed_is_named(folder):
    edit_index(folder, lambda index: index["weight_map"].pop("b"))
    refuses(folder, "'b'")


def test_a_shard_outside_the_folder_is_refused(folder):
    shutil.copy(folder / "s2.safetensors", folder.parent / "s2.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update(c="../s2.safetensors"))
    refuses(folder, "not a file name")


def test_an_index_without_a_map_is_refused(folder):
    edit_index(folder, lambda index: index.pop("weight_map"))
    refuses(folder, "weight_map")


def test_float64_is_refused_and_named(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.float64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, "'w'", "F64")


def test_nan_and_infinity_are_named_and_counted(tmp_path):
    tensors = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")]), "worse": torch.tensor([float("inf")])}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"bad \(1 NaN of 2\), worse \(1 infinite of 1\)"):
        checkpoint.scan_finite()
    checkpoint.scan_finite(["good"])


def test_many_problems_are_counted_not_listed(tmp_path):
    save_file({f"w{i}": torch.ones(1) for i in range(9)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"w0, w1, w2 and 6 more \(9 in all\)"):
        open_checkpoint(tmp_path).require({}, lambda name: False)


def test_wrong_shapes_dtypes_and_missing_tensors_are_told_apart(folder):
    checkpoint = open_checkpoint(folder)
    full = {"a": ((2, 3), True), "b": ((4,), True), "c": ((2,), True)}
    checkpoint.require(full, lambda name: False)
    checkpoint.require({"a": ((2, 3), True)}, lambda name: name in "bc")
    for wrong, words in [
        ({**full, "z": ((1,), True)}, "missing tensors: z"),
        ({"a": ((2, 3), True), "b": ((4,), True)}, "does not have: c"),
        ({**full, "a": ((3, 2), True)}, r"a is \[2, 3\], config.json says \[3, 2\]"),
        ({**full, "a": ((2, 3), False)}, "wrong dtypes: a is F32"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            checkpoint.require(wrong, lambda name: False)
