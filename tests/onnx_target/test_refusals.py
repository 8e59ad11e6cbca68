"""What must not run: missing or old libraries, packages that were altered or do not fit together, graphs that reach for
other files, calls that no session may make. One clear error each."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import tmlc
from tmlc.emit.targets import find_target
from tmlc.errors import ContextFullError, InputError, KernelError, PackageError, TargetError, UsageError
from tmlc.package import PackageWriter, open_package
from tmlc.package.manifest import parse_manifest
from tmlc.package.safetensors_io import parse_header
from tmlc.package.writer import MANIFEST, SEAL, WEIGHTS
from tmlc.runtimes.onnx.model_file import ModelFile

PLAN = "engines/onnx/signature.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A package of a few layers: an embedding, a ring, and a head, with a context that ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=256,
    )).save_pretrained(base / "llama")  # fmt: skip
    tmlc.compile(
        base / "llama", base / "tiny.tmlc", target="onnx", precision="fp32", context=48, context_policy="end",
        max_append=16,
    )  # fmt: skip
    return base / "tiny.tmlc"


def rebuilt(source, out, **changes):
    """The package with some members changed, and every digest right again."""
    with open_package(source) as package:
        files = {name: package.read(name) for name in package.names() if name not in (MANIFEST, SEAL)}
        manifest = json.loads(package.read(MANIFEST))
    for name, change in changes.items():
        if name == "manifest":
            change(manifest)
            continue
        member = {"signature": PLAN, "decode": "decode.onnx", "unembed": "unembed.onnx"}[name]
        files[member] = change(files[member])
    with PackageWriter(out) as writer:
        for name, data in files.items():
            if name != WEIGHTS:
                writer.add_bytes(name, data)
        writer._add(WEIGHTS, len(files[WEIGHTS]), [files[WEIGHTS]], 4096)
        manifest["files"] = {}
        writer.finish(parse_manifest(json.dumps({**manifest, "files": _listed(writer)}).encode()))
    return out


def _listed(writer):
    return {name: {"bytes": info.bytes, "sha256": info.sha256} for name, info in writer.files.items()}


def edited(change):
    """A change of JSON as a change of bytes."""

    def run(data):
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return run


def model(change):
    """A change of a graph as a change of bytes."""

    def run(data):
        proto = onnx.load_from_string(data)
        change(proto)
        return proto.SerializeToString()

    return run


def test_a_package_that_was_only_taken_apart_and_put_together_loads(tiny, tmp_path):
    with tmlc.load(rebuilt(tiny, tmp_path / "same.tmlc"), threads=1) as engine, engine.session() as session:
        assert session.append(tokens=[1, 2, 3]).shape == (3, 40)


def external(proto, **values):
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)


def inner(proto):
    """An operator with a tensor of its own that lies in another file."""
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["stolen"], value=tensor))


GRAPHS = {
    "another file": (lambda p: external(p, location="../secret"), "does not lie in weights.safetensors"),
    "the whole file": (lambda p: external(p, offset="0"), "outside of the stored tensors"),
    "past the end": (lambda p: external(p, offset=str(2**40)), "outside of the stored tensors"),
    "two tensors at once": (lambda p: external(p, length=str(2**20)), "outside of the stored tensors"),
    "an offset that is none": (lambda p: external(p, offset="-5"), "has no place"),
    "a tensor inside a node": (inner, "lies elsewhere"),
    "operators of strangers": (
        lambda p: p.graph.node.append(onnx.helper.make_node("X", [], ["y"], domain="evil")), "domain 'evil'"),
    "functions": (lambda p: p.functions.add(name="f", domain="d"), "more than a graph"),
    "another input": (
        lambda p: p.graph.input.append(onnx.helper.make_tensor_value_info("extra", 1, [1, 1])), "inputs are not"),
    "another dtype of a state": (
        lambda p: setattr(next(i for i in p.graph.input if i.name.endswith("position")).type.tensor_type, "elem_type",
                          6), "."),
    "no nodes": (lambda p: p.graph.ClearField("node"), "does not accept the graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_altered_graphs_are_refused_though_every_digest_is_right(tiny, tmp_path, name):
    change, what = GRAPHS[name]
    with pytest.raises((PackageError, TargetError), match=what) as caught:
        tmlc.load(rebuilt(tiny, tmp_path / "bad.tmlc", decode=model(change)), threads=1)
    assert "decode.onnx" in caught.value.where and caught.value.fix


def method(change):
    return edited(lambda value: change(value["methods"]["decode"]))


SIGNATURES = {
    "a newer version": (edited(lambda v: v.update(version=2)), "version 2"),
    "no methods": (edited(lambda v: v.update(methods={})), "methods are not"),
    "another size": (method(lambda m: m["inputs"][0].update(cols=17)), "not that of the manifest"),
    "another limit of a call": (method(lambda m: m.update(max_n=99)), "not that of the manifest"),
    "a state less": (method(lambda m: m["states"].pop(1)), "states are not"),
    "a state of another shape": (method(lambda m: m["states"][1].update(shape=[1, 2])), "another one there"),
    "states that begin as something else": (method(lambda m: m["states"][0].update(initial="ones")), "not one of"),
    "a position that is none": (method(lambda m: m["position"].update(state="decode.0.k_cache")), "counts positions"),
    "a file that is not there": (method(lambda m: m.update(file="other.onnx")), "missing"),
    "a file elsewhere": (method(lambda m: m.update(file="../decode.onnx")), "not allowed"),
    "an unknown field": (edited(lambda v: v.update(surprise=1)), "unknown field"),
    "not JSON": (lambda data: data[:-20], "not valid JSON"),
}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_that_do_not_fit_are_refused(tiny, tmp_path, name):
    change, what = SIGNATURES[name]
    with pytest.raises((PackageError, TargetError), match=what):
        tmlc.load(rebuilt(tiny, tmp_path / "bad.tmlc", signature=change), threads=1)


def test_states_that_share_bytes_or_lie_askew_are_refused(tiny, tmp_path):
    def askew(manifest):
        manifest["states"][0]["offset"] += 8

    with pytest.raises(PackageError, match="multiple of 64"):
        tmlc.load(rebuilt(tiny, tmp_path / "bad.tmlc", manifest=askew), threads=1)

    def onto(manifest):
        manifest["states"][1]["offset"] = manifest["states"][0]["offset"]

    with pytest.raises(PackageError, match="share bytes"):
        tmlc.load(rebuilt(tiny, tmp_path / "worse.tmlc", manifest=onto), threads=1)


def test_every_cut_of_a_graph_and_every_flipped_byte_is_an_error_or_the_same_shape_of_file(tiny):
    """The reader of graphs never raises anything but PackageError."""
    with open_package(tiny) as package:
        data, tensors = package.read("decode.onnx"), package.tensors
        start = parse_header(package._raw(WEIGHTS), "w")[1]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            broken[at] ^= 1 << int(rng.integers(8))
        if rng.random() < 0.5:
            broken = broken[: int(rng.integers(len(broken)))]
        try:
            ModelFile(bytes(broken), "x", WEIGHTS, tensors, start).pointed("y", 7)
        except PackageError:
            refused += 1
    assert refused > 200
    same = ModelFile(data, "x", WEIGHTS, tensors, start).pointed(WEIGHTS, 0)
    assert onnx.load_from_string(same) == onnx.load_from_string(data)


def test_a_damaged_package_says_so(tiny, tmp_path):
    data = bytearray(tiny.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.tmlc").write_bytes(data)
    with pytest.raises(PackageError, match="altered or damaged"):
        tmlc.load(tmp_path / "bad.tmlc", threads=1)


def test_a_missing_or_old_onnxruntime_is_one_line_and_a_command(tiny, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
    with pytest.raises(TargetError, match=r"older than the 1\.24") as caught:
        tmlc.load(tiny, threads=1)
    assert "pip install -U 'onnxruntime>=1.24'" in caught.value.fix
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match="not installed") as caught:
        tmlc.load(tiny, threads=1)
    assert "pip install -U 'onnxruntime>=1.24'" in caught.value.fix


def test_compiling_without_the_library_is_one_line_and_a_command(tmp_path):
    code = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "onnx" else find(name, *rest)
from tmlc.emit.targets import find_target
from tmlc.errors import TargetError
try:
    find_target("onnx")
except TargetError as error:
    print(error.what, "|", error.fix)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the library onnx | Run `pip install 'tmlc[onnx]'`." in done.stdout


def test_flavours_and_options_that_are_not_there(tiny):
    for name in ("onnx:", "onnx:fast", "onnx:contrib:x"):
        with pytest.raises(TargetError, match="has no flavour"):
            find_target(name)
    for options in (dict(isa="v4"), dict(portable_bits=True), dict(lock_memory=True), dict(huge_pages=True)):
        with pytest.raises(UsageError, match=r"onnx|ONNX"):
            tmlc.load(tiny, threads=1, **options)
    with tmlc.load(tiny, target="onnx", threads=1, pin=True) as engine:
        assert engine.target == "onnx" and engine.isa.startswith("onnxruntime ") and len(engine.cores) == 1
    with pytest.raises(TargetError, match="no engine for cpu"):
        tmlc.load(tiny, target="cpu")


def test_threads_may_be_several_and_pinned(tiny):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    with tmlc.load(tiny, threads=2, pin=True) as engine, tmlc.load(tiny, threads=1) as other:
        found, expected = (e.session().append(tokens=[1, 2, 3]) for e in (engine, other))
    assert np.abs(found - expected).max() <= 1e-5


def test_a_context_that_ends_ends_the_session_before_anything_changes(tiny):
    with tmlc.load(tiny, threads=1) as engine:
        session = engine.session()
        session.append(tokens=[1] * 40)
        before = engine.slots.handle(session.index).copy()
        with pytest.raises(ContextFullError):
            engine.backend.call("decode", [(9, engine.slots.handle(session.index))], [np.ones((9, 16), np.float32)])
        assert np.array_equal(engine.slots.handle(session.index), before)
        with pytest.raises(ContextFullError):
            session.append(tokens=[1] * 9)
        assert session.state == "closed"


def test_ids_outside_of_the_table_and_positions_that_are_none_name_the_session(tiny):
    with tmlc.load(tiny, threads=1) as engine:
        slots = [engine.slots.handle(engine.slots.take()) for _ in range(2)]
        for wrong in (-1, 40):
            ids = np.array([[3], [wrong]], np.int32)
            with pytest.raises(KernelError, match="outside of 0 to 39") as caught:
                engine.backend.call("embed_text", [(1, slots[0]), (1, slots[1])], [ids])
            assert caught.value.part == 1 and caught.value.fix == "give ids of the vocabulary"
        slots[1].fill(255)
        with pytest.raises(KernelError, match="which is none") as caught:
            engine.backend.call("decode", [(1, slots[0]), (1, slots[1])], [np.ones((2, 16), np.float32)])
        assert caught.value.part == 1 and not slots[0].any() and "sound snapshot" in caught.value.fix
        with pytest.raises(InputError, match=r"not 8\n  .*slots\.handle\(\)"):
            engine.backend.call("decode", [(1, np.zeros(8, np.uint8))], [np.ones((1, 16), np.float32)])


def test_a_graph_that_stops_poisons_its_session_and_says_what_else_there_is(tiny):
    def stop(binding):
        raise RuntimeError("out of luck\nmore of it")

    with tmlc.load(tiny, threads=1) as engine:
        session, loaded = engine.session(), engine.backend._loaded["decode"]
        loaded.session = SimpleNamespace(io_binding=loaded.session.io_binding, run_with_iobinding=stop)
        with pytest.raises(KernelError, match=r"stopped: out of luck \(method decode\)\n  open a new .* target cpu"):
            session.append(tokens=[1])
        assert session.state == "poisoned"


def test_loading_brings_in_no_compiler_and_no_library_that_is_not_needed(tiny):
    code = f"""
import sys
import tmlc.runtimes.core.engine, tmlc.runtimes.onnx.backend, tmlc.runtimes.onnx.signature
print("onnxruntime" in sys.modules)
with tmlc.runtimes.core.engine.load({str(tiny)!r}, threads=1) as engine:
    engine.session().append(tokens=[1])
print(sorted({{"torch", "onnx", "pydantic", "tmlc.ir", "tmlc.emit", "tmlc.compiler"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"]
