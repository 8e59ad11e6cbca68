"""Whole models through ONNX Runtime against the CPU engine: logits within 1e-4 in float32, whatever the cut into
appends and past the wrap of every ring; conversations; sessions that do not mix; snapshots."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InklingForCausalLM, InklingTextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import tmlc
from tmlc.report.verify import replay

TOLERANCE = 1e-4
POSITIONS = 260

INKLING = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4,
    rel_extent=12, log_scaling_n_floor=10, local_layer_ids=[0, 2], intermediate_size=48, moe_intermediate_size=24,
    n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, dense_mlp_idx=1, logits_mup_width_multiplier=2.0,
)  # fmt: skip
QWEN = dict(
    vocab_size=80, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
    intermediate_size=33, max_position_embeddings=512, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=17,
    norm_topk_prob=True, use_sliding_window=True, sliding_window=20, max_window_layers=1, decoder_sparse_step=1,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def save(folder: Path, name: str) -> Path:
    """A random tiny model whose logits have unit scale and whose routers choose."""
    torch.manual_seed(5)
    if name == "inkling":
        config, kind = InklingTextConfig(**INKLING), InklingForCausalLM
    else:
        config, kind = Qwen3MoeConfig(**QWEN), Qwen3MoeForCausalLM
    config._attn_implementation = "eager"
    model = kind(config).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter_name, tensor in model.named_parameters():
            if tensor.ndim >= 2:
                tensor.normal_(0, 1.0 / tensor.shape[-1] ** 0.5)
            elif "global_scale" not in parameter_name:
                tensor.uniform_(0.5, 1.5)
        model.get_output_embeddings().weight /= model(torch.arange(30)[None]).logits.std()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["inkling", "qwen3_moe"])
def pair(request, tmp_path_factory):
    """(package for the CPU, package for ONNX) of a tiny model; a context of 64 wraps every ring within a test."""
    base = tmp_path_factory.mktemp(request.param)
    save(base / "checkpoint", request.param)
    for target in ("cpu", "onnx"):
        bounds = dict(context=64, context_policy="ring_with_sinks", sinks=16, max_append=24)
        tmlc.compile(base / "checkpoint", base / f"{target}.tmlc", target=target, precision="fp32", **bounds)
    return base / "cpu.tmlc", base / "onnx.tmlc"


def streamed(session, ids, seed):
    rng, at, parts = np.random.default_rng(seed), 0, []
    while at < len(ids):
        count = int(rng.integers(1, 40))
        parts.append(session.append(tokens=ids[at : at + count]))
        at += count
    return np.concatenate(parts)


def tokens(vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, POSITIONS).tolist()


def test_logits_of_tiny_models_in_random_chunks_past_ring_wrap(pair):
    with tmlc.load(pair[0], threads=1) as cpu, tmlc.load(pair[1], threads=1) as onnx:
        ids = tokens(cpu.model.vocab)
        with cpu.session() as session:
            expected = session.append(tokens=ids)
        assert 0.3 < expected.std() < 3, "the bound of 1e-4 is meant for logits of unit scale"
        for seed in range(2):
            with onnx.session() as session:
                assert np.abs(streamed(session, ids, seed) - expected).max() <= TOLERANCE
        assert replay(onnx, pair[1], lambda *_: None)["passed"]


@pytest.fixture(scope="module")
def engines(nano):
    with tmlc.load(nano["cpu"], threads=1) as cpu, tmlc.load(nano["onnx"], threads=1, sessions=6) as onnx:
        yield cpu, onnx


def conversation(ticks: int, seed: int) -> list[tmlc.TickInput]:
    """Noise that comes and goes, a clip now and then, and something typed."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(ticks):
        audio = (rng.standard_normal(3200) * rng.choice([1e-3, 0.05, 0.3])).astype(np.float32)
        video = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) if index % 5 == 0 else None
        made.append(tmlc.TickInput(audio=audio, video=video, text="hello there" if index == 3 else None))
    return made


def test_nano_gives_the_logits_of_the_cpu_engine_past_ring_wrap(engines):
    """Sliding layers keep 64 positions; 1,100 wrap the ring of the global layer too."""
    cpu, onnx = engines
    ids = np.random.default_rng(1).integers(0, cpu.model.vocab, 1100).tolist()
    with cpu.session() as theirs, onnx.session() as ours:
        assert np.abs(streamed(ours, ids, 3) - theirs.append(tokens=ids)).max() <= TOLERANCE


def test_a_conversation_of_nano_gives_the_same_text_and_sound(engines):
    cpu, onnx = engines
    spoke = 0
    for seed, heat in ((0, 0.0), (1, 0.9)):
        with cpu.session(seed, heat) as theirs, onnx.session(seed, heat) as ours:
            for given in conversation(12, seed):
                expected, found = theirs.tick(given), ours.tick(given)
                assert (found.tokens, found.text) == (expected.tokens, expected.text)
                assert np.abs(found.audio - expected.audio).max() <= TOLERANCE
                spoke += not found.stats["silent"]
    assert spoke, "a conversation in which nothing is said proves little"


def test_sessions_side_by_side_do_not_mix(engines):
    _, onnx = engines
    given = [conversation(6, seed) for seed in (3, 4)]
    alone = []
    for seed, inputs in zip((3, 4), given, strict=True):
        with onnx.session(seed, 0.5) as session:
            alone.append([session.tick(item) for item in inputs])
    with onnx.session(3, 0.5) as first, onnx.session(4, 0.5) as second:
        for index in range(6):
            for session, inputs, expected in ((first, given[0], alone[0]), (second, given[1], alone[1])):
                same(session.tick(inputs[index]), expected[index])
    with onnx.session(3, 0.5) as first, onnx.session(4, 0.5) as second:
        for index in range(6):
            found = onnx.tick_batch([second, first], [given[1][index], given[0][index]])
            same(found[0], alone[1][index])
            same(found[1], alone[0][index])


def same(found: tmlc.TickOutput, expected: tmlc.TickOutput) -> None:
    assert found.tokens == expected.tokens and np.array_equal(found.audio, expected.audio)


def test_snapshots_forks_and_restored_sessions_go_on_bit_for_bit(engines, nano):
    _, onnx = engines
    given = conversation(8, 7)
    session = onnx.session(9, 0.8)
    for item in given[:4]:
        session.tick(item)
    blob, twin = session.snapshot(), session.fork()
    expected = [session.tick(item) for item in given[4:]]
    for other in (twin, onnx.restore(blob)):
        for item, want in zip(given[4:], expected, strict=True):
            same(other.tick(item), want)
        other.close()
    session.close()
    with pytest.raises(tmlc.errors.SessionError, match="package"):
        engines[0].restore(blob)


def test_file_and_folder_give_the_same_bits(engines, nano):
    """They come from two compilations: the same checkpoint gives the same bytes."""
    _, onnx = engines
    ids = tokens(onnx.model.vocab)[:50]
    with tmlc.load(nano["folder"], threads=1) as folder, folder.session() as ours, onnx.session() as theirs:
        assert folder.digest == onnx.digest
        assert np.array_equal(ours.append(tokens=ids), theirs.append(tokens=ids))


def test_every_graph_passes_the_checker_with_full_shape_inference(nano):
    onnx = pytest.importorskip("onnx")
    files = sorted(nano["folder"].glob("*.onnx"))
    assert {file.stem for file in files} >= {"decode", "embed_audio", "embed_video", "next_token", "speak", "vocode"}
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
        graph = onnx.load(str(file), load_external_data=False)
        assert {(o.domain, o.version) for o in graph.opset_import} == {("", 21)}, "standard operators only"
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)


def test_the_graphs_alone_carry_a_conversation(nano, engines):
    """As a driver in another language would: states in and out, no slot, no aliasing."""
    import onnxruntime

    graphs = {
        name: onnxruntime.InferenceSession(str(nano["folder"] / f"{name}.onnx"))
        for name in ("embed_text", "decode", "unembed")
    }
    told = json.loads((nano["folder"] / "engines/onnx/signature.json").read_text())["methods"]
    argument = {name: told[name]["inputs"][0]["name"] for name in graphs}
    types = {"f32": np.float32, "i64": np.int64}
    states = {s["name"]: np.zeros(s["shape"], types[s["dtype"]]) for s in told["decode"]["states"]}
    after = {s["name"]: s["next"] for s in told["decode"]["states"]}
    ids = np.arange(90, dtype=np.int32).reshape(-1, 1)
    rows = []
    for part in np.split(ids, [3, 4, 45]):
        (x,) = graphs["embed_text"].run(None, {argument["embed_text"]: part})
        wanted = [told["decode"]["outputs"][0]["name"], *after.values()]
        hidden, *values = graphs["decode"].run(wanted, {argument["decode"]: x, **states})
        (logits,) = graphs["unembed"].run(None, {argument["unembed"]: hidden})
        rows.append(logits)
        states = dict(zip(after, values, strict=True))
    with engines[1].session() as session:
        expected = session.append(tokens=ids[:, 0].tolist())
    assert np.abs(np.concatenate(rows) - expected).max() <= TOLERANCE
    assert states["decode.position"] == 90


NARROW = [("bf16", "onnx"), ("int8", "onnx"), ("int4", "onnx"), ("int8", "onnx:contrib"), ("int4", "onnx:contrib")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("narrow") / "inkling", "inkling")


def distance(found, expected):
    """Of most positions (a few are routed otherwise): the root mean square of the difference of the logits, as a part
    of that of what is expected."""
    return np.median(np.sqrt(np.square(found - expected).mean(1) / np.square(expected).mean(1)))


@pytest.mark.parametrize(("precision", "target"), NARROW)
def test_narrow_weights_and_caches(tiny, tmp_path, trace_once, precision, target):
    """Golden calls are of eager PyTorch with the same codes. MatMulNBits rounds activations as the CPU engine does, so
    that is what it is held against."""
    report = tmlc.compile(tiny, tmp_path / "n.tmlc", target=target, precision=precision, context=128)
    assert report.target == target and report.precision == precision
    tmlc.compile(tiny, tmp_path / "cpu.tmlc", precision=precision, context=128)
    with tmlc.load(tmp_path / "n.tmlc", threads=1) as engine, tmlc.load(tmp_path / "cpu.tmlc", threads=1) as cpu:
        assert engine.target == target
        if target == "onnx":
            assert replay(engine, tmp_path / "n.tmlc", lambda *_: None)["passed"]
        ids = tokens(engine.model.vocab)
        with engine.session() as session, engine.session() as other, cpu.session() as third:
            whole, parts, theirs = session.append(tokens=ids), streamed(other, ids, 5), third.append(tokens=ids)
        assert distance(parts, whole) <= 0.05, "the cut into appends changes more than rounding"
        assert distance(whole, theirs) <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_narrow_packages_of_nano_verify(nano, tmp_path, trace_once, precision):
    tmlc.compile(nano["checkpoint"], tmp_path / "n.tmlc", target="onnx", precision=precision)
    with tmlc.load(tmp_path / "n.tmlc", threads=1) as engine:
        assert replay(engine, tmp_path / "n.tmlc", lambda *_: None)["passed"]


def test_caches_of_codes(tiny, tmp_path, trace_once):
    tmlc.compile(tiny, tmp_path / "n.tmlc", target="onnx", precision="fp32", kv="int8")
    with tmlc.load(tmp_path / "n.tmlc", threads=1) as engine:
        assert replay(engine, tmp_path / "n.tmlc", lambda *_: None)["passed"]
        kinds = {s.dtype for s in engine.manifest.states if s.kind.startswith("kv_")}
        assert kinds == {"u8", "f32"}, "codes, and their scales beside them"
