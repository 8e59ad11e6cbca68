"""Slots, clocks, text, and the checks of an engine's methods against its manifest."""

import json
import threading

import numpy as np
import pytest

from tmlc.errors import CapacityError, InputError, PackageError, UsageError
from tmlc.package.fields import AGAIN
from tmlc.runtimes.core.backend import MethodSpec, TensorSpec, check_inputs
from tmlc.runtimes.core.clock import InputClock, ManualClock, VirtualClock, WallClock, make_clock
from tmlc.runtimes.core.slots import HostSlots, SlotPool
from tmlc.runtimes.core.text import ByteTokenizer, LibraryTokenizer, load_tokenizer


@pytest.mark.parametrize("size", [0, 1, 64, 100, 4096])
def test_slots_are_aligned_apart_and_zeroed_on_return(size):
    pool = SlotPool(HostSlots(5, size))
    taken = [pool.take() for _ in range(5)]
    views = [pool.handle(index) for index in taken]
    assert all(view.ctypes.data % 64 == 0 and view.size == size for view in views)
    for value, view in enumerate(views):
        view[:] = value + 1
    assert all((view == value + 1).all() for value, view in enumerate(views))
    pool.give_back(taken[2])
    pool.give_back(taken[2])
    assert pool.free == 1 and not views[2].any() and pool.take() == taken[2]


@pytest.mark.parametrize("count", [0, -1, 1 << 20])
def test_an_absurd_number_of_slots_is_refused(count):
    with pytest.raises(UsageError) as error:
        HostSlots(count, 64)
    assert error.value.where == "sessions" and "how many conversations" in error.value.fix


def test_slots_that_do_not_fit_in_memory_are_a_capacity_error():
    with pytest.raises(CapacityError, match="cannot reserve"):
        HostSlots(4, 1 << 60)


def test_ticks_stay_on_the_grid_however_late_one_was():
    clock = ManualClock(0.2)
    clock.advance(5.0)
    clock.start()
    clock.advance(0.5)
    assert clock.wait(1) == pytest.approx(0.3)
    assert [clock.due(k) for k in (0, 1, 5)] == pytest.approx([5.0, 5.2, 6.0])


def test_a_manual_clock_waits_until_it_is_moved():
    clock, done = ManualClock(0.2), threading.Event()
    clock.start()
    thread = threading.Thread(target=lambda: (clock.wait(3), done.set()))
    thread.start()
    for _ in range(2):
        clock.advance(0.2)
    assert not done.wait(0.02)
    clock.advance(0.2)
    thread.join(5)
    assert done.is_set()
    for moved in (clock, VirtualClock(0.2)):
        with pytest.raises(UsageError, match="go back by 1 s\n  start a new clock"):
            moved.advance(-1)


def test_an_input_clock_never_waits():
    clock = InputClock(0.2)
    clock.start()
    assert clock.wait(1000) == 0.0 and clock.now() == pytest.approx(200.0)
    assert clock.wait(1) == 0.0 and clock.now() == pytest.approx(200.0)


def test_a_wall_clock_returns_when_the_tick_is_due():
    clock = WallClock(0.01)
    clock.start()
    assert clock.wait(2) >= 0 and clock.now() >= clock.due(2)


def test_clocks_are_made_by_name():
    assert isinstance(make_clock("wall", 0.1), WallClock)
    with pytest.raises(UsageError, match="unknown clock"):
        make_clock("sun")
    with pytest.raises(UsageError, match=r"period must be positive, not 0\n  .*duration_ms"):
        make_clock("wall", 0)


def byte_level(**changes) -> dict:
    """A byte-level tokenizer.json as the zoo writes it, bytes at ids 0..255 and two special tokens."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in kept]
    vocab = {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "added_tokens": [
            {
                "id": i,
                "content": c,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, c in ((256, "<silence>"), (257, "<end_of_tick>"))
        ],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    } | changes


def load(spec: dict):
    return load_tokenizer(json.dumps(spec).encode())


def test_a_byte_level_tokenizer_is_built_in_and_agrees_with_the_library():
    text = "Grüße <silence> 你好 🙂\n\t\0"
    own = load(byte_level())
    assert isinstance(own, ByteTokenizer)
    assert own.encode(text) == list(text.encode())
    library = pytest.importorskip("tokenizers")
    assert LibraryTokenizer(json.dumps(byte_level())).encode(text) == own.encode(text), library.__version__


@pytest.mark.parametrize("make", [lambda s: load(s), lambda s: LibraryTokenizer(json.dumps(s))])
def test_text_decodes_piece_by_piece_and_across_a_saved_state(make):
    pytest.importorskip("tokenizers")
    tokenizer = make(byte_level())
    text = "aé 你🙂!"
    for save in range(len(text.encode())):
        decoder, out = tokenizer.decoder(), ""
        for i, token in enumerate(text.encode()):
            if i == save:
                decoder = tokenizer.decoder(decoder.state())
            out += decoder.push([token] if i % 2 else [256, token, 257])
        assert out == text


def test_bytes_that_are_no_text_become_replacement_characters():
    decoder = load(byte_level()).decoder()
    assert decoder.push([0xFF, 0x41]) == "�A"


@pytest.mark.parametrize("make", [lambda s: load(s), lambda s: LibraryTokenizer(json.dumps(s))])
def test_special_tokens_are_found_by_name_and_nothing_else_is(make):
    pytest.importorskip("tokenizers")
    spec = byte_level()
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 258, "content": "plain", "special": False})
    tokenizer = make(spec)
    assert tokenizer.special("<silence>") == 256 and tokenizer.special("<end_of_tick>") == 257
    assert [tokenizer.special(name) for name in ("<injection>", "plain", "a", "")] == [None] * 4


def test_a_special_token_with_an_absurd_id_is_refused():
    spec = byte_level()
    spec["added_tokens"][0]["id"] = 1 << 60
    with pytest.raises(PackageError, match="absurd"):
        load(spec)


def test_another_vocabulary_goes_to_the_library():
    pytest.importorskip("tokenizers")
    spec = byte_level()
    spec["model"]["vocab"] |= {"ab": 300}
    spec["model"]["merges"] = [["a", "b"]]
    tokenizer = load(spec)
    assert isinstance(tokenizer, LibraryTokenizer) and tokenizer.encode("abc") == [300, 99]


CUT_SHORT = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}  # four bytes that promise four gigabytes
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}


def test_a_tokenizer_that_fails_on_a_text_refuses_that_text():
    pytest.importorskip("tokenizers")
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    with pytest.raises(InputError, match="cannot take this text"):
        load(byte_level(model=words)).encode("b")
    pattern = {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}
    slow = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    panics = load(byte_level(normalizer={"type": "NFC"}, pre_tokenizer=slow))
    with pytest.raises(InputError, match="cannot take this text") as error:
        panics.encode("a" * 60)
    assert "leave out the characters" in error.value.fix


def test_typed_text_is_neither_cut_nor_filled_up():
    pytest.importorskip("tokenizers")
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 7, "pad_type_id": 0, "pad_token": "x"}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load(byte_level(normalizer={"type": "NFC"}, padding=padding, truncation=cut))
    assert isinstance(tokenizer, LibraryTokenizer) and tokenizer.encode("abc") == [97, 98, 99]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff",
        b"[" * 100000,
        b'{"model": 3}',
        b'{"model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": 7}}',
        b'{"model": {"type": "Odd", "vocab": {}}}',
        b'{"model": {"type": "BPE", "vocab": {"a": [1]}}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}}}',  # the library would make a table that long
        b'{"model": {"type": "BPE", "vocab": {"a": 1}, "dropout": 0.5}}',  # by chance, and not by our seed
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 1}}, "normalizer": CUT_SHORT}).encode(),
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 1}}, "normalizer": [REPLACE] * 4}).encode(),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(data):
    with pytest.raises(PackageError, match="tokenizer") as error:
        load_tokenizer(data)
    assert error.value.fix


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("vocode", None),
        ("decode", MethodSpec("decode", 8, (TensorSpec("f32", 1, 0, 4),), (TensorSpec("f32", 1, 0, 5),))),
        ("decode", MethodSpec("decode", 8, (), ())),
        ("next_token", MethodSpec("next_token", 8, (TensorSpec("f32", 1, 0, 4),), (TensorSpec("i32", 1, 0, 1),))),
        ("embed_video", MethodSpec("embed_video", 8, (TensorSpec("u8", 4, 0, 10),), (TensorSpec("f32", 3, 0, 4),))),
        ("unembed", MethodSpec("unembed", 8, (TensorSpec("f32", 1, 0, 4),), ())),
    ],
)
def test_a_package_whose_methods_do_not_fit_is_refused(backend, make_engine, method, spec):
    del backend.methods[method]
    if spec is not None:
        backend.methods[method] = spec
    with pytest.raises(PackageError, match=f"method .?{method}"):
        make_engine(backend)


@pytest.mark.parametrize(
    "layout",
    [
        {"silence_token_id": 260},
        {"end_of_tick_token_id": -1},
        {"audio_in": 0},
        {"audio_out": 1 << 26},
        {"clip_frames": 0},
        {"frame_width": 0},
        {"kind": "tokens", "audio_in": 1, "hop": 0},
        {"kind": "tokens", "video_positions": 3},
        {"kind": "tokens", "audio_out": 1},
    ],
)
def test_a_tick_layout_that_makes_no_sense_is_refused(make_engine, layout):
    with pytest.raises(PackageError, match="tick") as error:
        make_engine(**layout)
    assert (error.value.where, error.value.fix) == ("manifest.json: tick", AGAIN)


@pytest.mark.parametrize("method", ["unembed", "decode"])
def test_an_absurdly_wide_model_is_refused(backend, make_engine, method):
    wide = TensorSpec("f32", 1, 0, 1 << 23)
    old = backend.methods[method]
    backend.methods[method] = MethodSpec(method, 8, (wide,) if method == "decode" else old.inputs, (wide,))
    with pytest.raises(PackageError, match="absurd") as error:
        make_engine(backend)
    assert error.value.fix == AGAIN


def test_another_slot_size_than_the_manifest_says_is_refused(backend, make_engine):
    backend.slot_bytes += 64
    with pytest.raises(PackageError, match="bytes a session"):
        make_engine(backend)


def test_a_call_that_no_method_has_is_refused_with_the_form_of_the_method():
    method = MethodSpec("m", 2, (TensorSpec("f32", 1, 0, 3),), (TensorSpec("i32", 1, 0, 1),))
    check_inputs(method, 2, [np.zeros((2, 3), np.float32)])
    one, two = np.zeros((1, 3), np.float32), np.zeros((2, 3), np.float32)
    sparse = np.zeros((2, 4), np.float32)[:, :3]
    for n, given in ((3, [two]), (0, [one]), (2, []), (1, [two]), (1, [one.astype(np.float64)]), (2, [sparse])):
        with pytest.raises(InputError, match="m ") as error:
            check_inputs(method, n, given)
        assert error.value.fix == "call m(f32[n,3]) -> (i32[n,1]), with n from 1 to 2"
        assert error.value.where == "method m"


def test_a_target_without_times_of_kernels_says_what_else_there_is(backend):
    with pytest.raises(UsageError, match=r"\(target fake\)\n  .*TickOutput\.timings") as error:
        backend.kernel_timer()
    assert "target cpu" in error.value.fix


def test_a_method_prints_as_its_signature():
    spec = MethodSpec("m", 4, (TensorSpec("u8", 4, 0, 9), TensorSpec("f32", 0, 1, 2)), (TensorSpec("f32", 1, 2, 3),))
    assert str(spec) == "m(u8[4n,9], f32[1,2]) -> (f32[n+2,3])"
    assert spec.inputs[0].allocate(2).shape == (8, 9) and spec.inputs[0].allocate(2).dtype == np.uint8
