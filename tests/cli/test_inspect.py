"""`tmlc inspect` and `tmlc verify`."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from tmlc.package.fields import AGAIN
from tmlc.package.writer import seal


def test_a_package_shows_methods_states_passes_memory_and_kernel_calls(tmlc_cli, package):
    out = tmlc_cli("inspect", package).stdout
    words = (
        "decode",
        "embed_audio",
        "f32[n, 800]",
        "kv_ring",
        "conv_tail",
        "state.insert",
        "arena",
        "attention",
        "linear",
    )
    assert all(word in out for word in words)


def test_few_bytes_are_told_and_settings_that_say_nothing_are_not(tmlc_cli, package):
    out = tmlc_cli("inspect", package).stdout
    assert any(line.split()[:4] == ["position", "1", "8", "B"] for line in out.splitlines())
    assert "{}" not in out


def test_the_json_of_a_package_has_the_manifest_and_the_counts(tmlc_cli, package):
    view = tmlc_cli("inspect", package, "--json").json
    assert view["manifest"]["model"]["name"] == "tiny"
    assert view["op_counts"]["cpu"]["decode"]["attention"] == 2
    assert sum(s["bytes"] for s in view["manifest"]["states"]) <= view["manifest"]["session_bytes"]
    assert view["weights"]["bytes"] <= view["manifest"]["memory"]["weight_bytes"]


def test_the_worst_layers_of_a_quantised_model_are_shown(tmlc_cli, checkpoint, tmp_path):
    """Worst first, a part of them, in the report of the compilation and in that of the package."""
    compiled = tmlc_cli("compile", checkpoint, "-o", tmp_path / "int4.tmlc", "--precision", "int4")
    (record,) = (
        record
        for record in tmlc_cli("inspect", tmp_path / "int4.tmlc", "--json").json["manifest"]["pipeline"]
        if record["pass"] == "quantize.int4"
    )
    layers = record["notes"][1:]
    assert len(layers) > 8
    for out in (compiled.stdout, tmlc_cli("inspect", tmp_path / "int4.tmlc").stdout):
        assert f"quantize.int4: layers (worst 8 of {len(layers)}, all: --json)" in out
        lines = [line.split() for line in out.splitlines() if "i4g32" in line or "i8g32" in line]
        assert [(n, s, e) for n, s, e in lines] == [
            (note.partition(":")[0], note.split()[1], note.split()[-1]) for note in layers[:8]
        ]


def test_a_layer_says_its_effect_and_what_it_was_spared():
    from tmlc.report.layers import layer_tables
    from tmlc.report.tables import plain_text

    notes = [
        "7 bytes of codes, scales and spared weights in 2 layers (2 i4g32)",
        "a.b: i4g32 relative error 0.0710, effect 8.94e-05 nats, spared: i8g32 0.0053",
        "c: i8g32 relative error 0.0053, effect 1.00e-06 nats",
        "d: \x1b[31m relative error 0.1",
        7,
    ]
    out = plain_text(layer_tables([{"pass": "quantize.int4", "notes": notes}, {"pass": "fuse.x", "notes": notes}]))
    assert out.count("layers (2)") == 1 and "\x1b" not in out
    assert out.split("\n")[-4].split() == ["a.b", "i4g32", "0.0710", "8.94e-05", "i8g32", "0.0053"]
    assert out.split("\n")[-3].split() == ["c", "i8g32", "0.0053", "1.00e-06"]
    assert layer_tables([{"pass": "quantize.int4", "notes": "x"}, {"pass": "quantize.int8"}, {}]) == []


def test_ir_prints_one_method_or_all_in_the_form_that_the_parser_reads(tmlc_cli, package):
    from tmlc.ir.text import parse_program

    one = tmlc_cli("inspect", package, "--ir", "decode").stdout
    assert one.startswith("method decode(max_n=") and one.rstrip().endswith("}") and one.count("method ") == 1
    whole = tmlc_cli("inspect", package, "--ir", "all").stdout
    assert one in whole and "decode" in parse_program(whole).methods
    assert tmlc_cli("inspect", package, "--ir", "decode", "--json").json["ir"] == one
    assert "embed_text" in tmlc_cli("inspect", package, "--ir", "dance", code=2).stderr


def test_no_name_in_a_strangers_checkpoint_is_obeyed_by_a_terminal(tmlc_cli, checkpoint, tmp_path):
    """Keys and values of a config are shown with escapes; a tensor's name of that kind is refused."""
    folder = tmp_path / "strange"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    strange = {"\x1b[2Jkey": "\x1b[31mred\x07", "line\nbreak": 1, "model_type": "\x9b31m\u202eodd"}
    (folder / "config.json").write_text(json.dumps(config | strange))
    out = tmlc_cli("inspect", folder).stdout
    assert out.replace("\n", "").isprintable() and "\\x1b[2Jkey" in out and "\\x9b31m" in out and "line\\nbreak" in out
    said = tmlc_cli("compile", folder, "-o", tmp_path / "x", code=2).stderr
    assert said.replace("\n", "").isprintable() and "unknown architecture" in said
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({f"\x1b[2J{name}": entry for name, entry in json.loads(data[8:size]).items()}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[size:])
    said = tmlc_cli("inspect", folder, code=2).stderr
    assert said.replace("\n", "").isprintable() and "cannot be printed" in said and "\\x1b[2J" in said


def test_a_checkpoint_shows_config_and_tensors(tmlc_cli, checkpoint):
    out = tmlc_cli("inspect", checkpoint).stdout
    assert "tmlc_interaction" in out and "model.layers" in out and "parameters" in out
    assert "model.norm.weight" in tmlc_cli("inspect", checkpoint, "--tensors").stdout
    tmlc_cli("inspect", checkpoint, "--ir", "decode", code=2)


def test_what_is_neither_is_refused(tmlc_cli, package, tmp_path):
    (tmp_path / "text.tmlc").write_text("not a package")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "text.tmlc", tmp_path / "empty", tmp_path / "missing"):
        for verb in ("inspect", "verify"):
            error = tmlc_cli(verb, path, code=2).stderr
            assert len(error.rstrip("\n").split("\n")) == 2 and path.name in error
    tmlc_cli("inspect", package, "--tensors", code=2)


def test_a_byte_flipped_anywhere_is_refused_by_every_verb_that_loads(tmlc_cli, package, tmp_path):
    data = bytearray(package.read_bytes())
    for at in np.random.default_rng(0).integers(0, len(data), 6):
        data[at] ^= 1
        (tmp_path / "x.tmlc").write_bytes(data)
        for args in (["inspect"], ["verify"], ["run", "--seconds", "1", "-o", str(tmp_path / "out")], ["profile"]):
            assert "error: " in tmlc_cli(args[0], tmp_path / "x.tmlc", *args[1:], code=2).stderr
        data[at] ^= 1
    assert not (tmp_path / "out").exists()


def test_verify_passes_on_this_machine_for_every_kernel_variant(tmlc_cli, package):
    for isa in tmlc_cli("doctor", "--json").json["cpu_kernels"]["available"]:
        view = tmlc_cli("verify", package, "--isa", isa, "--threads", "1", "--json").json
        assert view["passed"]
        assert {m["method"] for m in view["methods"]} >= {"decode", "speak", "vocode", "embed_video", "next_token"}
    assert "ok" in tmlc_cli("verify", package).stdout
    assert "ok" in tmlc_cli("verify", package, "--isa", "portable", "--portable-bits").stdout


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_verify_passes_in_every_precision(tmlc_cli, checkpoint, tmp_path, precision):
    tmlc_cli("compile", checkpoint, "-o", tmp_path / "x.tmlc", "--precision", precision)
    view = tmlc_cli("verify", tmp_path / "x.tmlc", "--json").json
    assert view["passed"], view["methods"]
    tight = {m["method"]: m["max_error"] for m in view["methods"]}
    assert tight["decode"] > 0  # it does compare rounded products with exact ones


def resealed(package: Path, folder: Path, files: dict[str, bytes]) -> Path:
    """A copy of the package as a folder, with other files in it and every digest right again."""
    with ZipFile(package) as archive:
        archive.extractall(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, data in files.items():
        (folder / name).write_bytes(data)
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "SHA256").write_bytes(seal(text))
    return folder


@pytest.mark.parametrize(
    ("name", "data", "args"),
    [
        ("engines/cpu/plan.json", b'{"methods": 3}', ["inspect"]),
        ("engines/cpu/plan.json", b'{"methods": [{"name": "a", "code": [{"op": []}]}]}', ["inspect"]),
        ("program.ir", b"\x1b[2J", ["inspect", "--ir", "all"]),  # a terminal would obey
        ("program.ir", b"\xff", ["inspect", "--ir", "all"]),
        ("program.ir", b"tmlc-ir 1\nmeta [", ["plan", "--on", "h200"]),
        ("program.ir", b"\xff", ["plan", "--on", "h200"]),
        ("golden/golden.json", b'{"calls": []}', ["verify"]),
        ("golden/golden.json", b'{"calls": [{"sequence": 0, "method": "x", "n": 1}]}', ["verify"]),
        (
            "golden/golden.json",
            b'{"calls": [{"sequence": 0, "method": "x", "n": 1, "inputs": ["y"], "outputs": []}]}',
            ["verify"],
        ),
    ],
)
def test_files_that_a_stranger_sealed_are_refused_in_one_line(tmlc_cli, package, tmp_path, name, data, args):
    folder = resealed(package, tmp_path / "x", {name: data})
    error = tmlc_cli(args[0], folder, *args[1:], code=2).stderr
    assert error.startswith("error: ") and "\x1b" not in error and len(error.splitlines()) == 2
    assert name != "program.ir" or (f"{folder}: {name}" in error and error.splitlines()[1].strip() == AGAIN)


def test_verify_fails_with_exit_1_and_names_the_method_when_an_output_differs(tmlc_cli, package, tmp_path):
    """A package whose recorded numbers are those of another machine, as it were: one golden value is changed, and
    the digests around it are made right again."""
    from tmlc.package.safetensors_io import dump, load

    with ZipFile(package) as archive:
        index = json.loads(archive.read("golden/golden.json"))
        tensors = load(archive.read("golden/golden.safetensors"), "x")
    call = next(c for c in index["calls"] if c["method"] == "vocode")
    changed = np.array(tensors[call["outputs"][0]])
    changed[0, 0] += 0.5
    data = dump(tensors | {call["outputs"][0]: changed})
    folder = resealed(package, tmp_path / "x.tmlc", {"golden/golden.safetensors": data})
    result = tmlc_cli("verify", folder, code=1)
    assert "MISMATCH" in result.stdout and "vocode" in result.stderr
    view = tmlc_cli("verify", folder, "--json", code=1).json
    assert [m["method"] for m in view["methods"] if not m["passed"]] == ["vocode"]


def test_an_unknown_kernel_variant_is_refused(tmlc_cli, package):
    assert "abacus" in tmlc_cli("verify", package, "--isa", "abacus", code=2).stderr


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_package_as_a_folder_reads_the_same(tmlc_cli, checkpoint, package, tmp_path, verb):
    shutil.copytree(checkpoint, tmp_path / "c")
    tmlc_cli("compile", tmp_path / "c", "-o", tmp_path / "x.tmlc", "--folder", "--json")
    one = tmlc_cli(verb, package, "--json").json
    two = tmlc_cli(verb, tmp_path / "x.tmlc", "--json").json
    assert one["digest"] == two["digest"]


def test_diff_shows_what_a_pass_did(tmlc_cli, checkpoint, package, tmp_path):
    tmlc_cli("compile", checkpoint, "--stop-after", "fuse.residual_norm", "--dump", tmp_path / "d")
    files = sorted((tmp_path / "d").iterdir())
    before, after = next((a, b) for a, b in pairwise(files) if "residual_norm" in b.name)
    view = tmlc_cli("inspect", "--diff", before, after, "--json").json
    ops = view["methods"]["decode"]["ops"]
    assert ops["add_rms_norm"] == [0, ops["add"][0] - ops["add"][1]] and "linear" not in ops
    assert "facts" in [what for what, _, _ in view["changed"]]
    text = tmlc_cli("inspect", "--diff", before, after).stdout
    assert "method decode: add " in text and "\n+%add_rms_norm" in text and "arena" not in text
    assert "the programs are the same" in tmlc_cli("inspect", "--diff", package, package).stdout
    assert "state" in tmlc_cli("inspect", "--diff", before, package).stdout


def test_diff_refuses_what_has_no_program(tmlc_cli, checkpoint, package, tmp_path):
    (tmp_path / "x.ir").write_text("no program")
    for one, two in ((checkpoint, package), (package, checkpoint), (package, tmp_path / "x.ir"), ("no.ir", package)):
        assert "error: " in tmlc_cli("inspect", "--diff", one, two, code=2).stderr
