"""Kernels that are compiled while a package is loaded are kept in a folder of the user's own, whole."""

import os
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import tmlc
from tmlc.errors import UsageError
from tmlc.package.reader import open_package
from tmlc.runtimes.tensorrt import kernel_cache as room
from tmlc.runtimes.tensorrt.backend import TensorRTBackend
from tmlc.runtimes.tensorrt.cuda import CudaDevice
from tmlc.runtimes.tensorrt.kernel_cache import KernelFile

from .stand_in import StandIn
from .test_streaming import SHORT

KEY = ("package", "A GPU", "sm89", "tensorrt_rtx", "1.7.1.116")


@pytest.fixture(scope="module")
def opened(checkpoints, stand_in):
    """(folder, changes of the GPU) -> the stand-in after a load of a tiny package with this folder."""
    path, networks = stand_in.entry(checkpoints["inkling"], dict(precision="fp16", **SHORT))

    def load(folder: Path | None, **gpu: str) -> StandIn:
        device = StandIn(networks)
        device.__dict__ |= gpu
        with open_package(path) as package:
            backend = TensorRTBackend(package, "tensorrt:sm89", device, folder)
            backend.slots(1)
            backend.close()
        return device

    return load


def test_what_one_load_compiles_the_next_one_finds(opened, tmp_path) -> None:
    folder = tmp_path / "not" / "there yet"
    first = opened(folder)
    assert first.known is None and {b"decode for driver 1;", b"embed_text for driver 1;"} <= set(first.compiled)
    (kept,) = folder.iterdir()
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    second = opened(folder)
    assert second.compiled == [] and second.known == first.kernels()
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before, "nothing new, so nothing is written"


def test_without_a_folder_nothing_is_kept(opened) -> None:
    assert not opened(None).keeps


def test_each_gpu_library_and_package_has_a_file_of_its_own(opened, tmp_path) -> None:
    opened(tmp_path / "k")
    other = opened(tmp_path / "k", name="another GPU")
    assert other.known is None and len(list((tmp_path / "k").iterdir())) == 2
    paths = {KernelFile(tmp_path / "k", *KEY[:at], "x", *KEY[at + 1 :]).path for at in range(len(KEY))}
    assert len(paths | {KernelFile(tmp_path / "k", *KEY).path}) == len(KEY) + 1


def test_a_file_that_is_not_whole_is_made_anew(opened, tmp_path) -> None:
    folder = tmp_path / "k"
    opened(folder)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-3])
    assert opened(folder).known is None
    assert kept.read_bytes() == whole and list(folder.iterdir()) == [kept]


def test_no_part_of_a_damaged_file_reaches_tensorrt(tmp_path, monkeypatch) -> None:
    file = KernelFile(tmp_path / "k", *KEY)
    assert file.read() is None
    file.write(b"kernels")
    whole = file.path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"?", whole + b"?", b"PK" + whole, whole[:20], b""):
        file.path.write_bytes(damaged)
        assert file.read() is None
    file.path.write_bytes(whole)
    assert file.read() == b"kernels"
    monkeypatch.setattr(room, "LARGEST", len(whole) - 1)
    assert file.read() is None


def test_kernels_that_do_not_fit_the_driver_are_replaced(opened, tmp_path) -> None:
    opened(tmp_path / "k")
    second = opened(tmp_path / "k", driver="driver 2")
    assert second.known is None and second.compiled
    assert opened(tmp_path / "k", driver="driver 2").known == second.kernels()
    assert len(list((tmp_path / "k").iterdir())) == 1


def test_the_file_and_the_folder_are_the_users_alone(tmp_path) -> None:
    file = KernelFile(tmp_path / "k", *KEY)
    file.write(b"old")
    file.write(b"new")
    assert file.read() == b"new" and stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    file = KernelFile(tmp_path / "k", *KEY)
    file.write(b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written to: No space left"):
        file.write(b"new")
    assert file.read() == b"old" and list(file.path.parent.iterdir()) == [file.path]


def test_a_folder_that_others_can_change_is_refused(tmp_path, monkeypatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError, match=r"others can write to .* kernels are code") as error:
        KernelFile(shared, *KEY)
    assert "chmod go-w" in error.value.fix
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be used"):
        KernelFile(tmp_path / "file", *KEY)
    user = os.getuid()
    monkeypatch.setattr(room.os, "getuid", lambda: user + 1)
    with pytest.raises(UsageError, match="another user's"):
        KernelFile(tmp_path / "mine", *KEY)


def test_what_compiles_nothing_at_load_refuses_the_folder(opened, checkpoints, on_cpu, tmp_path, monkeypatch) -> None:
    cpu = on_cpu(checkpoints["inkling"], **SHORT)
    path = cpu._package.path
    cpu.close()
    with pytest.raises(UsageError, match="target cpu compiles no kernels when it is loaded") as error:
        tmlc.load(path, kernel_cache=tmp_path / "k")
    assert error.value.fix == "load without kernel_cache" and not (tmp_path / "k").exists()
    import tmlc.runtimes.tensorrt.backend as backend

    read = backend.read_plan
    monkeypatch.setattr(backend, "read_plan", lambda *given: replace(read(*given), library="tensorrt"))
    with pytest.raises(UsageError, match="engines of tensorrt hold their kernels"):
        opened(tmp_path / "k")


class Cache:
    """What TensorRT for RTX gives as a cache of kernels."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def deserialize(self, blob: bytes) -> bool:
        self.given.append(blob)
        return True

    def serialize(self) -> bytes:
        return b"after"


@pytest.mark.parametrize("known", [b"before", None])
def test_the_contexts_of_all_engines_share_one_cache(known: bytes | None) -> None:
    device = CudaDevice.__new__(CudaDevice)
    device._keep, device._known, device._cache, device._enter = False, None, None, lambda: None
    caches: list[Cache] = []

    def create() -> Cache:
        caches.append(Cache())
        return caches[-1]

    config = SimpleNamespace(create_runtime_cache=create)
    assert device.runtime_cache(config) is None and device.kernels() == b""
    device.keep_kernels(known)
    assert device.runtime_cache(config) is device.runtime_cache(config) is caches[0] and len(caches) == 1
    assert caches[0].given == ([known] if known else []) and device.kernels() == b"after"


def test_the_library_has_every_call_that_keeping_kernels_makes() -> None:
    """Names only: a cache belongs to an engine, and none can be opened here."""
    import tensorrt_rtx

    config, cache = tensorrt_rtx.IRuntimeConfig, tensorrt_rtx.IRuntimeCache
    assert all(hasattr(config, name) for name in ("create_runtime_cache", "set_runtime_cache"))
    assert all(hasattr(cache, name) for name in ("deserialize", "serialize"))
