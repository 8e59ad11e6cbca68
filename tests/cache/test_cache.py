"""The compile cache: what is unchanged is handed out, what has changed is named, what is damaged is made again."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import tmlc.cache.store as store
from tmlc.cache import CompileCache, CompileKey, DigestMemo, cache_folder, compile_key
from tmlc.cli.main import cli
from tmlc.package import open_package


def tmlc(*args, cache, code=0):
    result = CliRunner().invoke(cli, [*map(str, args), "--json"], env={"TMLC_CACHE": str(cache)})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return json.loads(result.stdout)


@pytest.fixture
def no_compiler(monkeypatch):
    """A hit must not compile."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr("tmlc.compiler.compile", refuse)


@pytest.fixture
def fake_compiler(monkeypatch, compiled):
    """A compiler that copies the package that is there: look-ups are tested, not compilations."""
    from types import SimpleNamespace

    calls = []

    def compile(checkpoint, out, **options):
        calls.append(options)
        shutil.copyfile(compiled[2], out)
        view = {"out": str(out), "passes": [], "seconds": {}, "checkpoint": str(checkpoint)}
        return SimpleNamespace(to_json=lambda: view, out=out)

    monkeypatch.setattr("tmlc.compiler.compile", compile)
    return calls


def test_a_second_compilation_is_the_same_package_within_two_seconds_and_without_torch(compiled, tmp_path, python):
    checkpoint, cache, package = compiled
    code = (
        "import os, sys\n"
        "os.environ['TMLC_CACHE'] = sys.argv[1]\n"
        "from tmlc.cli.main import cli\n"
        "try: cli.main(['compile', sys.argv[2], '-o', sys.argv[3], '--json'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    started = time.perf_counter()
    view = json.loads(python(code, cache, checkpoint, tmp_path / "again.tmlc"))
    assert time.perf_counter() - started < 2.0
    assert view["cache"]["outcome"] == "hit" and view["out"] == str(tmp_path / "again.tmlc")
    assert [r["pass"] for r in view["passes"]][-1] == "memory.verify"
    assert (tmp_path / "again.tmlc").read_bytes() == package.read_bytes()


def test_the_same_files_elsewhere_are_a_hit(copies, tmp_path, no_compiler):
    checkpoint, cache, package = copies
    view = tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=cache)
    assert view["cache"]["outcome"] == "hit"
    assert (tmp_path / "x.tmlc").read_bytes() == package.read_bytes()


def test_a_hit_replaces_only_with_force_and_leaves_no_other_file(copies, tmp_path, no_compiler):
    checkpoint, cache, package = copies
    out = tmp_path / "out" / "x.tmlc"
    tmlc("compile", checkpoint, "-o", out, cache=cache)
    tmlc("compile", checkpoint, "-o", out, cache=cache, code=2)
    tmlc("compile", checkpoint, "-o", out, "--force", cache=cache)
    out.unlink()
    out.write_text("older")
    tmlc("compile", checkpoint, "-o", out, "--force", cache=cache)
    assert out.read_bytes() == package.read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["x.tmlc"]


def test_a_package_as_a_folder_comes_back_as_a_folder(copies, tmp_path, monkeypatch):
    checkpoint, cache, package = copies
    first = tmlc("compile", checkpoint, "-o", tmp_path / "a.tmlc", "--folder", cache=cache)
    monkeypatch.setattr("tmlc.compiler.compile", None)
    for _ in range(2):
        again = tmlc("compile", checkpoint, "-o", tmp_path / "b.tmlc", "--folder", "--force", cache=cache)
        assert (first["cache"]["outcome"], again["cache"]["outcome"]) == ("miss", "hit")
    with open_package(tmp_path / "b.tmlc") as one, open_package(package) as two:
        assert one.digest == two.digest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("precious")
    tmlc("compile", checkpoint, "-o", tmp_path / "mine", "--folder", "--force", cache=cache, code=2)
    assert (tmp_path / "mine" / "note").read_text() == "precious"


@pytest.mark.parametrize("folder", [[], ["--folder"]])
def test_a_full_disk_is_told_by_the_place_that_was_asked_for(copies, tmp_path, monkeypatch, folder):
    checkpoint, cache, _ = copies
    tmlc("compile", checkpoint, "-o", tmp_path / "a.tmlc", *folder, cache=cache)

    def full(source, target):
        raise OSError(28, "No space left on device", str(source))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    said = tmlc("compile", checkpoint, "-o", tmp_path / "new" / "b.tmlc", *folder, cache=cache, code=2)["error"]
    assert said["where"] == str(tmp_path / "new" / "b.tmlc") and "full" in said["what"]
    assert not (tmp_path / "new").exists()


def damage_byte(package):
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    stat = package.stat()
    package.write_bytes(data)
    os.utime(package, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(package):
    os.truncate(package, package.stat().st_size - 10)


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        cut,
        lambda package: package.unlink(),
        lambda package: (package.parent / "entry.json").write_text("{"),
        lambda package: (package.parent / "entry.json").unlink(),
        lambda package: (package.parent / "entry.json").write_text('{"parts": {}, "files": {}, "report": {}}'),
    ],
)
def test_a_damaged_entry_is_noticed_and_made_again(copies, tmp_path, fake_compiler, damage):
    checkpoint, cache, _ = copies
    (entry,) = (cache / "packages").iterdir()
    damage(entry / "package.tmlc")
    view = tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=cache)
    assert view["cache"]["outcome"] == "miss" and "damaged" in view["cache"]["reason"]
    again = tmlc("compile", checkpoint, "-o", tmp_path / "y.tmlc", cache=cache)
    assert again["cache"]["outcome"] == "hit" and len(fake_compiler) == 1


def test_writing_into_a_package_that_was_handed_out_does_not_spoil_the_next_one(copies, tmp_path, fake_compiler):
    """Packages are hard links; a change in place shows in the entry's size or time."""
    checkpoint, cache, package = copies
    tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=cache)
    with (tmp_path / "x.tmlc").open("r+b") as file:
        file.write(b"spoiled")
    tmlc("compile", checkpoint, "-o", tmp_path / "y.tmlc", cache=cache)
    assert (tmp_path / "y.tmlc").read_bytes() == package.read_bytes()


CHANGES = [
    (["--precision", "bf16"], ["precision"]),
    (["--context", "128"], ["context"]),
    (["--kv", "int8"], ["kv"]),
    (["--check"], ["check"]),
    (["--disable", "fuse.residual_norm"], ["disabled passes"]),
    (["--folder"], ["folder"]),
]


@pytest.mark.parametrize(("options", "parts"), CHANGES, ids=lambda value: " ".join(value))
def test_every_option_is_part_of_the_key_and_why_miss_names_it(copies, tmp_path, fake_compiler, options, parts):
    checkpoint, cache, _ = copies
    tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=cache)
    view = tmlc("compile", checkpoint, "-o", tmp_path / "y.tmlc", *options, cache=cache)
    assert view["cache"]["outcome"] == "miss" and len(fake_compiler) == 1
    for path in (checkpoint, tmp_path / "y.tmlc"):
        why = tmlc("inspect", path, "--why-miss", cache=cache)
        assert why["outcome"] == "miss" and [part for part, _, _ in why["changed"]] == parts
    assert tmlc("inspect", tmp_path / "x.tmlc", "--why-miss", cache=cache)["outcome"] == "hit"


def test_a_changed_file_of_the_checkpoint_is_named(copies, tmp_path, fake_compiler):
    checkpoint, cache, _ = copies
    tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=cache)
    shard = checkpoint / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # the same size
    (checkpoint / "README.md").write_text("nothing that compiles")
    tmlc("compile", checkpoint, "-o", tmp_path / "y.tmlc", cache=cache)
    result = CliRunner().invoke(cli, ["inspect", str(checkpoint), "--why-miss"], env={"TMLC_CACHE": str(cache)})
    assert "checkpoint file model.safetensors" in result.stdout and "README" not in result.stdout


def test_the_settings_of_a_pipeline_file_are_named_one_by_one(copies, tmp_path, fake_compiler):
    checkpoint, cache, _ = copies
    file = tmp_path / "p.yaml"
    for number, sinks in enumerate((16, 32)):
        file.write_text(f"- pass: state.insert\n  config: {{sinks: {sinks}}}\n- canonicalize.dead_code\n")
        tmlc("compile", checkpoint, "-o", tmp_path / f"{number}.tmlc", "--pipeline", file, cache=cache)
    why = tmlc("inspect", checkpoint, "--why-miss", cache=cache)
    assert why["changed"] == [["pass state.insert, sinks", "16", "32"]]


def test_versions_and_sources_are_parts_of_the_key(compiled, monkeypatch, tmp_path):
    checkpoint = compiled[0]
    settings = dict(
        target="cpu", precision=None, preset=None, pipeline=None, passes=None, disable=(), options={},
        memo=DigestMemo(None),
    )  # fmt: skip
    parts = compile_key(checkpoint, **settings).parts
    for name in ("tmlc", "version of torch", "source tmlc/compiler.py", "source tmlc/passes/state/insert.py",
                 "source tmlc/kernels/cpu/src/moe.cpp", "pass fuse.residual_norm, expect_matches"):  # fmt: skip
        assert parts[name]
    monkeypatch.setattr("tmlc.cache.key.__version__", "9.9.9")
    other = compile_key(checkpoint, **settings).parts
    assert {name for name in parts if parts[name] != other[name]} == {"tmlc"}


def test_what_the_environment_tells_triton_is_part_of_its_keys(compiled, monkeypatch, tmp_path):
    """Another assembler makes other machine code; engines of the CPU know none."""
    assembler = tmp_path / "ptxas"

    def parts(target: str) -> dict[str, str]:
        return compile_key(
            compiled[0], target=target, precision=None, preset=None, pipeline=None, passes=None, disable=(), options={},
            memo=DigestMemo(None),
        ).parts  # fmt: skip

    before = {target: parts(target) for target in ("cpu", "triton:sm90")}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler))
    assert parts("cpu") == before["cpu"]
    found = []
    for release in (b"one", b"another"):
        assembler.write_bytes(release)
        found.append({name: value for name, value in parts("triton:sm90").items() if name not in before["triton:sm90"]})
    assert found[0] == {
        "environment variable TRITON_DEFAULT_FP_FUSION": "0",
        "environment variable TRITON_PTXAS_PATH": hashlib.sha256(b"one").hexdigest(),
    }
    assert found[0] != found[1]


def test_the_memo_reads_a_file_once_and_again_when_it_has_changed(tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(b"abc")
    os.utime(file, (0, 0))
    time.sleep(0.15)
    memo = DigestMemo(tmp_path / "digests.json")
    first = memo.digest(file)
    memo.save()
    later = DigestMemo(tmp_path / "digests.json")
    assert later.digest(file) == first and later.read == 0
    file.write_bytes(b"abd")
    os.utime(file, (0, 0))  # the times that a person sees are the same
    assert later.digest(file) != first and later.read == 1
    (tmp_path / "digests.json").write_text("[]")
    assert DigestMemo(tmp_path / "digests.json").known == {}


def test_a_file_that_was_written_this_moment_is_not_remembered(tmp_path):
    file = tmp_path / "shard"
    memo = DigestMemo(None)
    for content in (b"one", b"two"):
        file.write_bytes(content)
        memo.digest(file)
    assert memo.read == 2 and not memo.known


def test_no_cache_neither_looks_nor_keeps(copies, tmp_path, fake_compiler):
    checkpoint, cache, _ = copies
    before = sorted(p.relative_to(cache) for p in cache.rglob("*"))
    view = tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--no-cache", cache=cache)
    assert "cache" not in view and len(fake_compiler) == 1
    assert "cache" not in tmlc("compile", checkpoint, "-o", tmp_path / "y.tmlc", cache="off")
    assert sorted(p.relative_to(cache) for p in cache.rglob("*")) == before


def test_a_cache_that_cannot_be_written_stops_nothing(copies, tmp_path, fake_compiler):
    checkpoint, _, _ = copies
    (tmp_path / "file").write_text("not a folder")
    view = tmlc("compile", checkpoint, "-o", tmp_path / "x.tmlc", cache=tmp_path / "file")
    assert view["cache"]["outcome"] == "miss" and (tmp_path / "x.tmlc").is_file()
    tmlc("inspect", tmp_path / "x.tmlc", "--why-miss", cache=tmp_path / "file", code=2)
    tmlc("inspect", tmp_path / "x.tmlc", "--why-miss", cache="off", code=2)


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("TMLC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tmlc"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/tmlc")
    monkeypatch.setenv("TMLC_CACHE", "/y")
    assert cache_folder() == Path("/y")


def test_the_least_recently_used_entries_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MOST_BYTES", 3500)
    cache = CompileCache(tmp_path / "cache")
    (tmp_path / "p").write_bytes(bytes(1000))
    keys = [CompileKey({"number": str(number)}) for number in range(4)]
    for number, key in enumerate(keys):
        assert cache.store(key, tmp_path / "p", {}) == ""
        at = (number + 1) * 10**9
        os.utime(cache.folder / "packages" / key.digest / "entry.json", ns=(at, at))
    assert {p.name for p in (cache.folder / "packages").iterdir()} == {key.digest for key in keys[1:]}
