"""No damaged, foreign or hostile package is accepted, and none gets more than one clear error."""

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.errors import PackageError
from tmlc.package import open_package, zipfile_io
from tmlc.package.fields import parse_json
from tmlc.package.manifest import parse_manifest
from tmlc.package.safetensors_io import parse_header

from .conftest import make_manifest, write


def refused(path: Path, verify: bool = True) -> PackageError:
    with pytest.raises(PackageError) as caught:
        open_package(path, verify)
    assert "\n" not in caught.value.what
    return caught.value


def mutate(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + rng.randint(1, 64) :]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]
    size = rng.randint(1, 8)
    return data[:at] + rng.choice([b"\0", b"\xff"]) * size + data[at + size :]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("p") / "m.tmlc")


def test_every_altered_byte_is_noticed(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    path = tmp_path / "m"
    step = max(1, len(data) // 1500)  # every region; the first and last kilobyte in full
    places = sorted({*range(0, len(data), step), *range(1024), *range(len(data) - 1024, len(data))})
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        refused(path)


def test_every_cut_is_noticed(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    for size in [*range(0, len(data), 97), *range(len(data) - 200, len(data))]:
        (tmp_path / "m").write_bytes(data[:size])
        refused(tmp_path / "m")
    (tmp_path / "m").write_bytes(data + b"x")
    refused(tmp_path / "m")


def test_random_damage_is_refused(original: Path, tmp_path: Path) -> None:
    data, rng = original.read_bytes(), random.Random(1)
    for _ in range(1500):
        damaged = mutate(data, rng)
        if damaged != data:
            (tmp_path / "m").write_bytes(damaged)
            refused(tmp_path / "m")


def reseal(data: bytes) -> bytes:
    """What an attacker does: the digest of the damaged bytes, at the end where it belongs."""
    view = memoryview(data)
    try:
        members = zipfile_io.read_members(view, "")
    except PackageError:  # no digest will help
        members = {}
    return data[: -zipfile_io.TRAILER] + zipfile_io.COMMENT + zipfile_io.digests(view, members)[0].encode()


def test_a_file_other_than_the_manifest_lists_is_noticed_under_a_right_seal(original: Path, tmp_path: Path) -> None:
    data = bytearray(original.read_bytes())
    data[data.index(b"{}")] ^= 1  # the tokenizer
    (tmp_path / "m").write_bytes(reseal(bytes(data)))
    assert "tokenizer.json was altered" in refused(tmp_path / "m").what


def test_hostile_packages_with_a_right_digest_never_crash_the_reader(original: Path, tmp_path: Path) -> None:
    data, rng = original.read_bytes(), random.Random(2)
    opened = 0
    header = data.index(b"\0\0\0\0{") - 4
    regions = [(header, header + 900), (data.index(b"{\n"), len(data)), (0, len(data))]
    for _ in range(2500):
        low, high = rng.choice(regions)
        damaged = data[:low] + mutate(data[low:high], rng) + data[high:]
        if len(damaged) < 200:
            continue
        (tmp_path / "m").write_bytes(reseal(damaged))
        try:
            with open_package(tmp_path / "m") as package:
                for name in package.names():
                    package.read(name)
                for name in package.tensors:
                    package.tensor(name).sum()
            opened += 1
        except PackageError:
            pass
    assert opened < 1500  # most damage shows even so


def test_damage_in_any_file_of_a_folder_is_noticed(tmp_path: Path) -> None:
    folder, rng = write(tmp_path / "m", folder=True), random.Random(3)
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        data = file.read_bytes()
        for _ in range(60):
            damaged = mutate(data, rng)
            if damaged != data:
                file.write_bytes(damaged)
                refused(folder)
        file.write_bytes(data)
    open_package(folder)


def test_files_missing_added_or_linked_in_a_folder_are_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "m", folder=True)
    for file in [p.relative_to(source) for p in source.rglob("*") if p.is_file()]:
        folder = Path(shutil.copytree(source, tmp_path / f"copy-{file.name}"))
        (folder / file).unlink()
        refused(folder)
    (source / "extra.bin").write_bytes(b"")
    assert "extra.bin does not belong" in refused(source).what
    (source / "extra.bin").unlink()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("/etc/hostname")
    refused(source)


def test_what_is_not_a_package_is_said(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, I am not a package")
    assert "not a tmlc package" in refused(tmp_path / "text").what
    (tmp_path / "empty").write_bytes(b"")
    assert "not a tmlc package" in refused(tmp_path / "empty").what
    (tmp_path / "dir").mkdir()
    assert "not a tmlc package" in refused(tmp_path / "dir").what
    assert "No such file" in refused(tmp_path / "none").what


def test_a_cut_download_is_said(original: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(original.read_bytes()[:5000])
    error = refused(tmp_path / "m")
    assert "cut short" in error.what
    assert "again" in error.fix


def manifest_json(**changes: object) -> dict:
    return {**json.loads(make_manifest().to_bytes()), "targets": {}, "tokenizer": None, **changes}


def parse(value: object) -> PackageError:
    with pytest.raises(PackageError) as caught:
        parse_manifest(json.dumps(value).encode())
    return caught.value


def test_a_newer_format_is_refused_before_its_fields_are_read() -> None:
    error = parse({"format": {"major": 2, "minor": 0, "required_features": []}})
    assert "newer" in error.what
    assert "Upgrade tmlc" in error.fix


def test_an_unknown_required_feature_is_refused_by_name() -> None:
    assert "telepathy" in parse({"format": {"major": 1, "minor": 7, "required_features": ["telepathy"]}}).what


def test_a_newer_minor_version_may_add_fields() -> None:
    head = {"major": 1, "minor": 99, "required_features": [], "hint": 1}
    parse_manifest(json.dumps(manifest_json(format=head, novelty={"a": 1})).encode())
    assert "unknown field" in parse(manifest_json(novelty=1)).what


@pytest.mark.parametrize(
    "changes",
    [
        {"session_bytes": -1},
        {"session_bytes": 2**70},
        {"session_bytes": True},
        {"session_bytes": 4},  # the state no longer fits
        {"methods": None},
        {"methods": [{}]},
        {"states": 1},
        {"tolerances": {"atol": "x"}},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": 1, "sha256": "xyz"}}},
        {"tokenizer": "/etc/passwd"},
        {"tokenizer": "tokenizer.json"},
        {"targets": {"cpu": {"plan": "nowhere.json", "precision": "fp32", "layout": "k16"}}},
        {"tolerances": {"atol": 10**400}},
        {"tolerances": {"atol": 1e39}},  # not a float32
        {"pipeline": [{"pass": "x", "config": None}]},
        {"pipeline": [{"pass": "x", "near_misses": 3}]},
        {"producer": {"tmlc": "\x1b[2J"}},  # a terminal would obey
        {"producer": {"\x1b[2J": "1"}},
    ],
)
def test_impossible_manifests_are_refused(changes: dict) -> None:
    parse(manifest_json(**changes))


def test_json_tricks_are_refused() -> None:
    for text in ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\xff", ""]:
        with pytest.raises(PackageError):
            parse_manifest(text.encode("latin-1"))


@pytest.mark.parametrize("depth", [65, 500, 900, 960, 990])
def test_json_that_is_read_can_be_walked(depth: int) -> None:
    with pytest.raises(PackageError, match=r"deep|recursion"):
        parse_json(b"[" * depth + b"]" * depth, "x")
    assert parse_json(b"[" * 64 + b"]" * 64, "x")


def test_the_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        write(tmp_path / "m", session_bytes=4)
    with pytest.raises(PackageError, match="not allowed"):
        write(tmp_path / "m", tokenizer="../x")
    assert list(tmp_path.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(manifest_json())), JSON)
def test_any_value_in_any_field_is_read_or_refused(key: str, value: object) -> None:
    try:
        text = json.dumps(manifest_json(**{key: value}))
        parse_manifest(text.encode())
    except PackageError:
        pass


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["w", "v", "__pad.1"]), JSON), st.integers(0, 200))
def test_any_tensor_header_is_read_or_refused(header: dict, data: int) -> None:
    text = json.dumps(header).encode()
    with contextlib.suppress(PackageError):
        parse_header(memoryview(len(text).to_bytes(8, "little") + text + bytes(data)), "x")


def test_a_tensor_with_absurd_sizes_is_refused() -> None:
    for shape, span in (([2**61, 2**61], [0, 64]), ([16], [0, 2**61]), ([16], [64, 0]), ([-1], [0, 4])):
        text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": span}}).encode()
        with pytest.raises(PackageError):
            parse_header(memoryview(len(text).to_bytes(8, "little") + text + bytes(64)), "x")


def test_reading_a_file_that_was_exchanged_is_noticed_even_unverified(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", folder=True)
    (folder / "tokenizer.json").write_bytes(b"[]")
    with open_package(folder, verify=False) as package, pytest.raises(PackageError, match="altered"):
        package.read("tokenizer.json")


def test_manifests_survive_the_way_through_text() -> None:
    manifest = replace(make_manifest(), tokenizer=None, targets={})
    assert parse_manifest(manifest.to_bytes()) == manifest
