"""state.insert: the states it declares, and streaming ≡ whole: any chunking, wrapped rings, resumed sessions."""

import copy

import pytest
import torch

from tmlc.errors import ContextFullError, PipelineError
from tmlc.ir.run import ProgramRunner

META = 'meta {"context": {"limit": 48, "policy": "ring_with_sinks", "sinks": 16, "max_append": 8}}\n'
DECODE = """
weight "l.2.k_sconv.conv1d.weight" = source("cw") : f32[4, 1, 3]
weight "l.2.rel.proj" = source("table") : f32[2, 20]
weight "r" = source("r") : f32[4, 8]
method decode(max_n=4) {
  %x = input "x" : f32[n, 8]
  %cw = weight "l.2.k_sconv.conv1d.weight"
  %table = weight "l.2.rel.proj"
  %rw = weight "r"
  %k0 = columns(%x, start=0, stop=4)
  %k = short_conv(%k0, %cw, residual=true)
  %v = columns(%x, start=4, stop=8)
  %r = linear(%x, %rw, none)
  %a = attention(%x, %k, %v, %r, %table, num_heads=2, num_kv_heads=1, scale=0.5, window=WINDOW, sinks=0, log_floor=LOG, log_alpha=0.1)
  return %a
}
"""  # noqa: E501
OTHERS = """
weight "audio.window" = source("aw") : f32[1, 16]
weight "audio.filters" = source("filters") : f32[5, 9]
weight "vocoder.window" = source("vw") : f32[1, 12]
method embed_audio(max_n=4) {
  %pcm = input "pcm" : f32[n, 8]
  %w = weight "audio.window"
  %f = weight "audio.filters"
  %levels = dmel(%pcm, %w, %f, lo=-3.0, hi=2.0, levels=8)
  return %levels
}
method vocode(max_n=4) {
  %frames = input "frames" : f32[2n, 12]
  %w = weight "vocoder.window"
  %pcm = overlap_add(%frames, %w, hop=4)
  %rows = reshape(%pcm, cols=8)
  return %rows
}
method plain(max_n=4) {
  %x = input "x" : f32[n, 8]
  %y = silu(%x)
  return %y
}
"""


def decode(window=0, log=0.0):
    return META + DECODE.replace("WINDOW", str(window)).replace("LOG", str(float(log)))


@pytest.fixture
def streaming(program_of, run_pass, weights_for):
    """(window, settings) → (stateless program, stateful program, weights)."""

    def make(window=0, log=0.0, **config):
        before = program_of(decode(window, log))
        return before, run_pass("state.insert", before, **config), weights_for(before)

    return make


def whole(program, weights, x, method="decode"):
    return ProgramRunner(program, weights).session().call(method, x)[0]


def test_every_op_with_a_history_gets_a_state_and_the_position_advances_once(run_pass, same_structure):
    after = run_pass("state.insert", decode(window=10))
    assert after.record[-1].matches == 2
    assert "stateful" in after.facts
    text = decode(window=10).replace(META, "facts stateful\n").replace("max_n=4", "max_n=8")
    text = text.replace(
        "method decode",
        """
state "decode.2.k_sconv_tail" : f32[2, 4] kind=conv_tail method=decode init=zeros
state "decode.position" : i64[1, 1] kind=position method=decode init=zeros
state "decode.2.k_cache" : f32[32, 4] kind=kv_ring method=decode init=zeros
state "decode.2.v_cache" : f32[32, 4] kind=kv_ring method=decode init=zeros
method decode""",
    )
    states = [line.split('"')[1] for line in text.splitlines() if line.startswith("state")]
    assert list(after.states) == sorted(states, key=list(after.states).index)
    for name in states:
        line = next(line for line in text.splitlines() if f'"{name}"' in line)
        assert str(after.states[name].type) in line and f"kind={after.states[name].kind}" in line
    names = [node.target._schema.name for node in after.methods["decode"].calls()]
    assert names[-1] == "tmlc::advance" and names.count("tmlc::advance") == 1
    assert "tmlc::attention" not in names and "tmlc::short_conv" not in names


def test_audio_vocoder_and_stateless_methods(run_pass):
    after = run_pass("state.insert", META + OTHERS)
    assert {name: (s.kind, s.shape) for name, s in after.states.items()} == {
        "embed_audio.0.audio_window": ("audio_window", (1, 8)),
        "vocode.0.overlap": ("overlap", (1, 8)),
    }
    assert not after.methods["plain"].placeholders("state")


def test_names_of_states_do_not_depend_on_earlier_passes(run_pass):
    direct = run_pass("state.insert", decode())
    after_others = run_pass("state.insert", run_pass("canonicalize.dead_code", run_pass("quantize.cast", decode())))
    assert list(direct.states) == list(after_others.states)


@pytest.mark.parametrize(
    ("window", "config", "kind", "rows", "attributes"),
    [
        (10, {}, "kv_ring", 32, (10, 0)),  # 10 - 1 + 8, rounded up to 16s
        (0, {}, "kv_ring", 16 + 48, (32, 16)),  # 48 - 16 visible, sinks, 32 - 1 + 8
        (0, {"sinks": 0}, "kv_ring", 64, (48, 0)),
        (0, {"sinks": 3}, "kv_ring", 16 + 48, (32, 16)),
        (0, {"policy": "end"}, "kv_linear", 48, (0, 0)),
        (0, {"policy": "end", "context": 50}, "kv_linear", 64, (0, 0)),
        (10, {"policy": "end"}, "kv_ring", 32, (10, 0)),
        (10, {"max_append": 32}, "kv_ring", 48, (10, 0)),
    ],
)
def test_capacities_follow_window_policy_and_append_size(window, config, kind, rows, attributes, streaming):
    _, after, _ = streaming(window, **config)
    cache = after.states["decode.2.k_cache"]
    assert (cache.kind, cache.shape) == (kind, (rows, 4))
    (node,) = after.methods["decode"].calls("attention_state")
    assert (node.args[11], node.args[12]) == attributes
    (advance,) = after.methods["decode"].calls("advance")
    assert advance.args[2] == (config.get("context", 48) if config.get("policy") == "end" else 0)
    assert after.methods["decode"].max_n == config.get("max_append", 8) == after.meta["context"]["max_append"]


def test_sinks_are_rounded_up_to_blocks_and_the_note_says_so(run_pass):
    after = run_pass("state.insert", decode(), sinks=3)
    assert after.meta["context"]["sinks"] == 16
    assert "rounded up" in after.record[-1].notes[0]


def test_a_context_without_room_and_missing_settings_are_refused(run_pass):
    with pytest.raises(PipelineError, match="no room"):
        run_pass("state.insert", decode(), context=16)
    with pytest.raises(PipelineError, match="does not know context, policy, sinks, max_append"):
        run_pass("state.insert", decode().replace(META, ""))
    with pytest.raises(PipelineError, match="one tap"):
        run_pass("state.insert", decode().replace("[4, 1, 3]", "[4, 1, 1]"))


CHUNKINGS = {"one by one": [1] * 40, "all of the append": [8] * 5, "uneven": [1, 7, 3, 5, 8, 2, 6, 8], "two": [2] * 20}


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize(
    ("window", "config"),
    [(10, {}), (0, {}), (0, {"policy": "end"}), (3, {"max_append": 8}), (33, {"policy": "end"})],
)
def test_streamed_equals_whole_in_any_chunking(window, config, chunks, streaming, stream):
    before, after, weights = streaming(window, log=8, **config)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        stream(after, weights, "decode", x, chunks), whole(before, weights, x), rtol=1e-5, atol=1e-5
    )


def test_rings_wrap_many_times(streaming, stream):
    before, after, weights = streaming(10)
    x = torch.randn(200, 8)
    got = stream(after, weights, "decode", x, [7, 5, 8] * 10)
    torch.testing.assert_close(got, whole(before, weights, x), rtol=1e-5, atol=1e-5)


def test_beyond_the_context_a_global_layer_sees_its_sinks_and_the_newest(streaming, stream, program_of):
    before, after, weights = streaming(0)
    declared = program_of(decode(window=32).replace("sinks=0", "sinks=16"))
    x = torch.randn(150, 8)
    got = stream(after, weights, "decode", x, [5] * 30)
    torch.testing.assert_close(got, whole(declared, weights, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, whole(before, weights, x), atol=1e-3)


def test_the_policy_end_stops_before_anything_changes(streaming, stream):
    _, after, weights = streaming(0, policy="end")
    session = ProgramRunner(after, weights).session()
    x = torch.randn(48, 8)
    stream(after, weights, "decode", x[:45], [5] * 9, session)
    held = {name: value.clone() for name, value in session.states.items()}
    with pytest.raises(ContextFullError):
        session.call("decode", x[:4])
    assert all(torch.equal(held[name], value) for name, value in session.states.items())
    session.call("decode", x[45:])


def test_an_interrupted_session_resumes_from_its_states_and_twins_do_not_bleed(streaming, stream):
    before, after, weights = streaming(10)
    runner = ProgramRunner(after, weights)
    a, b = torch.randn(30, 8), torch.randn(30, 8)
    one, two = runner.session(), runner.session()
    got_a, got_b = [stream(after, weights, "decode", a[:12], [4] * 3, one)], []
    resumed = runner.session()
    resumed.states = copy.deepcopy(one.states)
    for start in range(12, 30, 6):
        got_b.append(two.call("decode", b[start - 12 : start - 6])[0])
        got_a.append(resumed.call("decode", a[start : start + 6])[0])
    torch.testing.assert_close(torch.cat(got_a), whole(before, weights, a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(got_b), whole(before, weights, b)[:18], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 12, [4] * 3, [3, 1, 4, 4]])
def test_audio_window_and_vocoder_overlap_continue_across_calls(chunks, program_of, run_pass, weights_for, stream):
    before = program_of(META + OTHERS)
    after, weights = run_pass("state.insert", before), weights_for(before)
    weights["filters"] = weights["filters"].abs()
    pcm, frames = torch.randn(12, 8), torch.randn(24, 12)
    assert torch.equal(stream(after, weights, "embed_audio", pcm, chunks), whole(before, weights, pcm, "embed_audio"))
    session, parts, start = ProgramRunner(after, weights).session(), [], 0
    for count in chunks:
        parts.append(session.call("vocode", frames[2 * start : 2 * (start + count)])[0])
        start += count
    torch.testing.assert_close(torch.cat(parts), whole(before, weights, frames, "vocode"), rtol=1e-6, atol=1e-6)


def test_bfloat16_caches_halve_the_memory_and_stay_close(streaming, stream):
    before, after, weights = streaming(10, kv_dtype="bf16")
    assert after.states["decode.2.k_cache"].dtype == "bf16"
    x = torch.randn(40, 8)
    torch.testing.assert_close(
        stream(after, weights, "decode", x, [8] * 5), whole(before, weights, x), rtol=0.05, atol=0.05
    )


def test_int8_caches_are_codes_with_a_scale_for_each_head_and_stay_close(streaming, stream):
    before, after, weights = streaming(10, kv_dtype="int8")
    cache = after.states["decode.2.k_cache"]
    assert (cache.dtype, cache.shape[1]) == ("u8", 4 + 4)  # one kv head of four columns
    x = torch.randn(40, 8)
    cut = [stream(after, weights, "decode", x, chunks) for chunks in ([8] * 5, [1, 7] * 5)]
    torch.testing.assert_close(cut[0], whole(before, weights, x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(cut[0], cut[1], rtol=1e-5, atol=1e-6)  # rounded once, when they are written
    assert not torch.allclose(cut[0], whole(before, weights, x), rtol=1e-6, atol=1e-6)
