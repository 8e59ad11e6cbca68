"""The real chain (package, plan, kernels, engine) on a hand-written package with a few operations."""

import contextlib
import copy
import json
import math
import random
import subprocess
import sys
import threading
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tmlc.errors import (
    CapacityError,
    ContextFullError,
    InputError,
    PackageError,
    PlanError,
    SessionError,
    TargetError,
    TmlcError,
    UsageError,
)
from tmlc.kernels.cpu import available_isas
from tmlc.package import PackageWriter
from tmlc.package.manifest import (
    ContextInfo,
    Manifest,
    MemoryInfo,
    MethodInfo,
    ModelInfo,
    Signature,
    TargetInfo,
    TickLayout,
)
from tmlc.runtimes.core.engine import load
from tmlc.runtimes.core.tick import TickInput

WIDTH, VOCAB, TAPS, LIMIT, MAX_N = 24, 40, 4, 60, 8
PLAN = "engines/cpu/plan.json"
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((VOCAB, WIDTH)).astype(np.float32)
MIX = (RNG.standard_normal((WIDTH, WIDTH)) / 4).astype(np.float32)
CONV = RNG.standard_normal((TAPS, WIDTH)).astype(np.float32)
NORM = RNG.standard_normal((1, WIDTH)).astype(np.float32)
STATE = math.ceil((64 + 4 * (TAPS - 1) * WIDTH) / 64) * 64


def packed(weight: np.ndarray) -> np.ndarray:
    """Blocks of 16 output rows, K-major inside a block, padded with zeros."""
    rows, k = weight.shape
    blocks = np.zeros((math.ceil(rows / 16) * 16, k), np.float32)
    blocks[:rows] = weight
    return np.ascontiguousarray(blocks.reshape(-1, 16, k).transpose(0, 2, 1)).reshape(-1, k * 16)


WEIGHTS = {"table": TABLE, "mix": packed(MIX), "conv": CONV, "norm": NORM, "head": packed(TABLE)}


def tiny_plan() -> dict:
    tensors: list[dict] = []

    def add(space: str, dtype: str, rows: list[int], cols: int, offset: int = 0, **name: str) -> int:
        tensors.append(
            {"space": space, "offset": offset, "dtype": dtype, "rows": rows, "cols": cols, "stride": cols} | name
        )
        return len(tensors) - 1

    weight = {n: add("weight", "f32", [0, w.shape[0]], w.shape[1], name=n) for n, w in WEIGHTS.items()}
    x, y = add("input", "f32", [1, 0], WIDTH), add("output", "f32", [1, 0], WIDTH)
    ids, chosen = add("input", "i32", [1, 0], 1), add("output", "i32", [1, 0], 1)
    key, temperature = add("input", "i64", [1, 0], 3, 1), add("input", "f32", [1, 0], 1, 2)
    logits, scores = add("output", "f32", [1, 0], VOCAB), add("arena", "f32", [1, 0], VOCAB)
    normed, mixed = add("arena", "f32", [1, 0], WIDTH), add("arena", "f32", [1, 0], WIDTH, 1024)
    position, tail = add("slot", "i64", [0, 1], 1), add("slot", "f32", [0, TAPS - 1], WIDTH, 64)

    def method(name: str, inputs: list[int], outputs: list[int], *code: tuple) -> dict:
        calls = [{"op": op, "t": t, "i": i, "f": f} for op, t, i, f in code]
        return {"name": name, "max_n": MAX_N, "inputs": inputs, "outputs": outputs, "code": calls}

    return {
        "version": 2,
        "arena_bytes": 4096,
        "slot_bytes": STATE,
        "tensors": tensors,
        "methods": [
            method("embed_text", [ids], [y], ("embedding", [y, ids, weight["table"]], [], [])),
            method(
                "decode",
                [x],
                [y],
                ("rms_norm", [normed, x, weight["norm"]], [], [1e-6]),
                ("linear", [mixed, normed, weight["mix"]], [], []),
                ("short_conv", [y, mixed, weight["conv"], tail], [1], []),
                ("advance", [position], [LIMIT], []),
            ),
            method("unembed", [x], [logits], ("linear", [logits, x, weight["head"]], [], [])),
            method(
                "next_token",
                [x, key, temperature],
                [chosen],
                ("linear", [scores, x, weight["head"]], [], []),
                ("sample", [chosen, scores, key, temperature], [], []),
            ),
        ],
    }


def tiny_manifest(**changes: object) -> Manifest:
    def args(*specs: tuple[str, str, int]) -> tuple[Signature, ...]:
        return tuple(Signature(name, dtype, (1, 0), cols) for name, dtype, cols in specs)

    x = args(("x", "f32", WIDTH))
    sample = args(("hidden", "f32", WIDTH), ("key", "i64", 3), ("temperature", "f32", 1))
    fields: dict = {
        "model": ModelInfo("tiny", "tokens", {}),
        "methods": (
            MethodInfo("embed_text", args(("ids", "i32", 1)), x, MAX_N),
            MethodInfo("decode", x, x, MAX_N),
            MethodInfo("unembed", x, args(("logits", "f32", VOCAB)), MAX_N),
            MethodInfo("next_token", sample, args(("ids", "i32", 1)), MAX_N),
        ),
        "states": (),
        "session_bytes": STATE,
        "tick": TickLayout(duration_ms=200, text_out=4, eos_token_ids=(VOCAB - 1,)),
        "context": ContextInfo(LIMIT, "end", 0, MAX_N),
        "memory": MemoryInfo(0, 4096, 0),
        "targets": {"cpu": TargetInfo(PLAN, "fp32", "k16")},
        "tolerances": {},
        "required_features": ("cpu.plan.v1", "weights.k16"),
    }
    return Manifest(**(fields | changes))


def write(path: Path, plan: dict | bytes | None = None, **changes: object) -> Path:
    with PackageWriter(path) as writer:
        if isinstance(plan, bytes):
            writer.add_bytes(PLAN, plan)
        else:
            writer.add_json(PLAN, plan or tiny_plan())
        writer.add_weights([(n, "f32", w.shape, lambda w=w: w) for n, w in WEIGHTS.items()])
        writer.finish(tiny_manifest(**changes))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tiny") / "tiny.tmlc")


@pytest.fixture
def engine(package):
    with load(package, threads=1) as engine:
        yield engine


def reference(tokens: list[int]) -> np.ndarray:
    """Logits of the tiny model in float64."""
    x = TABLE[tokens].astype(np.float64)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * NORM
    x = x @ MIX.T.astype(np.float64)
    padded = np.concatenate([np.zeros((TAPS - 1, WIDTH)), x])
    x = x + sum(CONV[j] * padded[j : j + len(x)] for j in range(TAPS))
    return x @ TABLE.T.astype(np.float64)


TOKENS = np.random.default_rng(1).integers(0, VOCAB, 50).tolist()


def test_logits_are_those_of_the_model(engine):
    assert np.abs(engine.session().append(TOKENS) - reference(TOKENS)).max() < 1e-4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", [None, "portable"])
def test_every_cut_and_every_number_of_threads_gives_the_same_bits(package, threads, isa):
    with load(package, threads=1, isa=isa) as one, load(package, threads=threads, isa=isa) as engine:
        whole = one.session().append(TOKENS)
        session = engine.session()
        cuts = [0, 1, 2, 9, 26, 50]
        parts = [session.append(TOKENS[a:b]) for a, b in pairwise(cuts)]
        assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.skipif(sys.platform != "linux", reason="cores and locked pages are asked of Linux")
@pytest.mark.parametrize("options", [{"pin": True}, {"lock_memory": True}, {"huge_pages": True}])
def test_where_threads_and_memory_lie_changes_no_bit(package, options):
    tokens = [5, 6, 7, 8, 9]
    with load(package, threads=1) as plain, load(package, threads=1, sessions=1, **options) as engine:
        wanted = plain.session(seed=1).append(tokens=tokens)
        assert np.array_equal(engine.session(seed=1).append(tokens=tokens), wanted)
        assert (engine.cores is not None) == ("pin" in options)


def test_ticks_choose_what_the_logits_say_and_go_on_after_restore(engine):
    session = engine.session()
    out = session.tick(TickInput(tokens=TOKENS[:5]))
    said = TOKENS[:5]
    for token in out.tokens:
        assert token == reference(said)[-1].argmax()
        said.append(token)
    blob = session.snapshot()
    twin, other = session.fork(), engine.restore(blob)
    expected = session.append([3])
    assert np.array_equal(expected, twin.append([3])) and np.array_equal(expected, other.append([3]))


def test_sampling_depends_on_seed_and_tick_only(engine):
    def talk(seed: int) -> list[int]:
        with engine.session(seed=seed, temperature=3.0) as session:
            first = session.tick(TickInput(tokens=[1])).tokens
            return first + session.tick().tokens

    assert talk(1) == talk(1) != talk(2)


def test_sessions_interleave_without_touching_each_other(package):
    with load(package, threads=2, sessions=3) as engine:
        expected = engine.session().append(TOKENS)
        results: list[list[np.ndarray]] = [[], [], []]

        def run(index: int) -> None:
            with engine.session() as session:
                for token in TOKENS:
                    results[index].append(session.append([token]))

        gc_free = engine.capacity().free
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gc_free == 3
        assert all(np.array_equal(np.concatenate(parts), expected) for parts in results)


def test_the_end_of_the_context_ends_the_session(engine):
    session = engine.session()
    session.append(TOKENS)
    with pytest.raises(ContextFullError):
        session.append(TOKENS)
    assert session.state == "closed" and engine.capacity().free == engine.capacity().sessions


def test_capacity_tells_bytes_and_slots(engine):
    capacity = engine.capacity()
    assert capacity.session_bytes == STATE and capacity.arena_bytes == 4096 and capacity.context_limit == LIMIT
    assert capacity.reserved_bytes >= 4 * STATE and capacity.to_json()["context_policy"] == "end"
    assert engine.isa in available_isas() and engine.threads == 1


def test_arguments_of_load_are_checked(package, tmp_path):
    for bad in ({"threads": 0}, {"threads": 1.5}, {"sessions": 0}, {"sessions": "2"}):
        with pytest.raises(UsageError) as error:
            load(package, **bad)
        assert error.value.where == next(iter(bad)) and error.value.fix
    with pytest.raises(TargetError, match="no engine for triton"):
        load(package, target="triton:sm90")
    with pytest.raises(TargetError, match="no such variant"):
        load(package, isa="z80")
    with pytest.raises(PackageError):
        load(tmp_path / "nothing.tmlc")


def test_weights_lie_on_cache_lines_and_are_not_copied(engine):
    address = engine.backend._weights.ctypes.data
    assert address % 64 == 0 and np.shares_memory(engine.backend._weights, engine._package.weights)


def test_text_needs_a_tokenizer(engine):
    with pytest.raises(InputError, match=r"no tokenizer.*\n  give `tokens`, or .*tokenizer\.json"):
        engine.session().tick(TickInput(text="hi"))


def changed_plan(change) -> dict:
    plan = tiny_plan()
    change(plan)
    return plan


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (b"{]", PackageError),
        (b"[" * 100_000, PackageError),
        (changed_plan(lambda p: p.update(version=9)), PlanError),
        (changed_plan(lambda p: p.update(arena_bytes=64)), PlanError),
        (changed_plan(lambda p: p.update(slot_bytes=STATE + 64)), PackageError),
        (changed_plan(lambda p: p["methods"].pop(1)), PackageError),
        (changed_plan(lambda p: p["methods"][0].update(name="speak")), PackageError),
        (changed_plan(lambda p: p["methods"][0]["code"][0].update(op="exec")), PlanError),
        (changed_plan(lambda p: p["methods"][1]["code"][2]["t"].reverse()), PlanError),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_when_loading(tmp_path, plan, error):
    with pytest.raises(error):
        load(write(tmp_path / "bad.tmlc", plan))


def test_a_snapshot_of_another_package_is_refused(engine, tmp_path):
    with load(write(tmp_path / "other.tmlc", tolerances={"x": 1.0}), threads=1) as other:
        with pytest.raises(SessionError, match="another package"):
            other.restore(engine.session().snapshot())
        with pytest.raises(CapacityError):
            kept = [other.session() for _ in range(5)]
            del kept


def test_loading_and_ticking_bring_in_no_compiler(package):
    code = f"""
import sys
import tmlc.runtimes.core.engine
from tmlc import TickInput, load
with load({str(package)!r}, threads=1) as engine:
    engine.session().tick(TickInput(tokens=[1]))
heavy = {{"torch", "triton", "onnx", "pydantic", "rich", "yaml", "click", "tokenizers", "safetensors", "transformers",
         "tmlc.ir", "tmlc.passes", "tmlc.pipeline", "tmlc.frontend", "tmlc.emit", "tmlc.compiler", "tmlc.model_zoo"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ten_times_more_ticks_take_no_more_memory(tmp_path):
    plan = changed_plan(lambda p: p["methods"][1]["code"][3].update(i=[0]))
    with load(write(tmp_path / "endless.tmlc", plan), threads=1) as engine, engine.session() as session:

        def talk(ticks: int) -> int:
            for _ in range(ticks):
                session.tick(TickInput(tokens=[1, 2]))
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = talk(100)
            assert talk(1000) - before < 4096
        finally:
            tracemalloc.stop()


def mutated(value: object, rng: random.Random) -> object:
    """The plan with one value, anywhere, replaced by an odd one or removed."""
    value = copy.deepcopy(value)
    place, key = {"": value}, ""
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.95:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    old = place[key]
    number = old if type(old) is int else 1
    odd = [0, 1, -1, number + 1, number * 2, number * 1000, 1 << 31, 1 << 62, 1.5, 1e30, None, "f32", "slot", [], {}]
    place[key] = rng.choice(odd)
    return value


def test_a_package_from_a_stranger_loads_and_runs_or_is_refused(tmp_path):
    rng, plan, ran = random.Random(0), tiny_plan(), 0
    for _ in range(300):
        path = write(tmp_path / "odd.tmlc", json.dumps(mutated(plan, rng)).encode())
        with contextlib.suppress(TmlcError), load(path, threads=1) as engine, engine.session() as session:
            ran += bool(session.tick(TickInput(tokens=[1, 2])))
    assert 0 < ran < 150, "some changes are harmless, most are not"
