"""A package that was written can be opened, is read in place, and is the same bytes each time."""

import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from tmlc.errors import REPORT, PackageError
from tmlc.package import PackageWriter, open_package, zipfile_io
from tmlc.package.golden import GoldenCall, read_golden, write_golden

from .conftest import DTYPES, PLAN, TENSORS, make_manifest, write


def test_what_was_written_is_read(package_path: Path) -> None:
    with open_package(package_path) as package:
        assert package.names() == sorted([PLAN, "manifest.json", "tokenizer.json", "weights.safetensors"])
        assert package.json(PLAN) == {"version": 1}
        assert package.manifest.methods == make_manifest().methods
        assert package.manifest.tick == make_manifest().tick
        assert package.manifest.pipeline == make_manifest().pipeline
        for name, array in TENSORS.items():
            assert package.tensors[name].dtype == DTYPES[name]
            assert np.array_equal(package.tensor(name), array)


def test_weights_are_mapped_aligned_and_read_only(package_path: Path) -> None:
    package = open_package(package_path)
    assert package.weights.ctypes.data % 64 == 0
    assert all(entry.offset % 64 == 0 for entry in package.tensors.values())
    assert not package.weights.flags.writeable
    norm = package.tensor("norm")
    package.close()
    assert np.array_equal(norm, TENSORS["norm"])  # an array that was handed out outlives the package


def test_both_forms_have_one_digest(tmp_path: Path) -> None:
    digests = {open_package(write(tmp_path / str(folder), folder)).digest for folder in (False, True)}
    assert len(digests) == 1


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def seal_as_documented(path: Path) -> str:
    """The sha256 of all bytes before the comment, each member's data replaced by its own sha256."""
    data, digest, at = path.read_bytes(), hashlib.sha256(), 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            inside = archive.read(info)
            begin = data.index(inside, info.header_offset + 30 + len(info.filename))
            digest.update(data[at:begin] + hashlib.sha256(inside).digest())
            at = begin + len(inside)
        digest.update(data[at : len(data) - len(archive.comment)])
    return digest.hexdigest()


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.tmlc")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        tensors = archive.read("weights.safetensors")
    read = dict(deserialize(tensors))
    assert bytes(read["norm"]["data"]) == TENSORS["norm"].tobytes()
    assert read["head"]["dtype"] == "BF16"
    assert archive.comment[-64:].decode() == seal_as_documented(path)


def test_sizes_beyond_32_bits_use_the_wide_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile_io, "ZIP64_FROM", 100)
    path = write(tmp_path / "m.tmlc")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with open_package(path) as package:
        assert np.array_equal(package.tensor("head"), TENSORS["head"])


def test_tensors_are_made_one_at_a_time_and_may_come_in_pieces(tmp_path: Path) -> None:
    alive: list[str] = []

    def produce(name: str):
        assert alive == []
        alive.append(name)
        yield np.zeros(3, np.float32)
        yield np.ones(3, np.float32)
        alive.remove(name)

    with PackageWriter(tmp_path / "m") as writer:
        writer.add_json(PLAN, {})
        writer.add_bytes("tokenizer.json", b"{}")
        writer.add_weights([(name, "f32", (2, 3), lambda name=name: produce(name)) for name in "abc"])
        writer.finish(make_manifest())
    assert open_package(tmp_path / "m").tensor("b").tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("x"), ValueError),
        (OSError(errno.EIO, "broken"), PackageError),
    ],
)
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, folder: bool, error: BaseException, raised: type[BaseException]
) -> None:
    def fail() -> bytes:
        raise error

    out = tmp_path / "new" / "deep" / "m.tmlc"
    with pytest.raises(raised), PackageWriter(out, folder) as writer:
        writer.add_bytes("a", b"1")
        writer.add_weights([("w", "f32", (1,), fail)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [False, True])
def test_leaving_without_finish_keeps_the_old_package(tmp_path: Path, folder: bool) -> None:
    path = write(tmp_path / "m.tmlc", folder)
    before = open_package(path).digest
    with PackageWriter(path, folder) as writer:
        writer.add_bytes("a", b"1")
    assert open_package(path).digest == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_a_package_is_replaced_by_a_new_one(tmp_path: Path, folder: bool) -> None:
    write(tmp_path / "m.tmlc", folder)
    path = write(tmp_path / "m.tmlc", folder, producer={"tmlc": "9"})
    assert open_package(path).manifest.producer == {"tmlc": "9"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("x")
    for folder in (False, True):
        with pytest.raises(PackageError, match="is a folder"):
            write(tmp_path / "m", folder)
    assert (tmp_path / "m" / "thesis.tex").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, folder: bool) -> None:
    """The kernel's own limit on file size stands for the full disk: the write really fails half way."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from tmlc.errors import PackageError
from tmlc.package import PackageWriter
try:
    with PackageWriter({str(tmp_path / "m.tmlc")!r}, {folder}) as writer:
        writer.add_weights([(str(i), "u8", (60_000,), lambda: bytes(60_000)) for i in range(4)])
except PackageError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the disk is full" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_producer_that_gives_the_wrong_size_is_refused(tmp_path: Path) -> None:
    for size in (3, 5):
        with pytest.raises(PackageError, match="w has") as caught, PackageWriter(tmp_path / "m") as writer:
            writer.add_weights([("w", "u8", (4,), lambda size=size: bytes(size))])
        assert caught.value.fix == REPORT
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="'w' is taken") as caught, PackageWriter(tmp_path / "m") as writer:
        writer.add_weights([("w", "u8", (4,), lambda: bytes(4))] * 2)
    assert "Rename the weight" in caught.value.fix
    for name in ("a", "manifest.json"):
        with PackageWriter(tmp_path / "m") as writer:
            writer.add_bytes("a", b"1")
            with pytest.raises(PackageError, match="in the package already") as caught:
                writer.add_bytes(name, b"2")
        assert "manifest.json and SHA256 are written by `finish`" in caught.value.fix
    with pytest.raises(PackageError, match="came to 3 bytes, expected 2") as caught, open(tmp_path / "z", "wb") as file:
        zipfile_io.ZipWriter(file).add("a", 2, [b"123"])
    assert caught.value.fix == REPORT


def test_golden_calls_survive(tmp_path: Path) -> None:
    call = GoldenCall(1, "decode", 2, (np.ones((2, 8), np.float32),), (np.zeros((2, 1), np.int32),))
    with PackageWriter(tmp_path / "m") as writer:
        writer.add_json(PLAN, {})
        writer.add_bytes("tokenizer.json", b"{}")
        writer.add_weights([])
        write_golden(writer, [call])
        writer.finish(make_manifest())
    (read,) = read_golden(open_package(tmp_path / "m"))
    assert (read.sequence, read.method, read.n) == (1, "decode", 2)
    assert np.array_equal(read.inputs[0], call.inputs[0])
    assert read.outputs[0].dtype == np.int32


def test_the_reader_needs_nothing_of_the_compiler() -> None:
    code = (
        "import sys, tmlc.package, tmlc.package.golden; "
        "print({'torch', 'pydantic', 'safetensors', 'tmlc.ir'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
