"""Cases of every kernel, one by one, at sizes that a test chooses: what the sweeps of sizes, the comparison of
instruction sets and the run under an emulator share.

A case is a plan of one call whose operands are arguments, weights or states of their own, so that a driver can put each
behind a guard. `OPS` names the sizes of every operation and their bounds; `sweep` walks each, `mixed` draws all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

GROUP_BYTES = {"int8": 544, "int4": 304, "int4_64": 560}  # of a block of 16 rows: 32, 32 and 64 inputs


@dataclass
class Case:
    """A plan, the state it begins with and the calls to make; `b` is the Builder that holds the plan."""

    name: str
    b: Any
    slot: np.ndarray
    calls: list[tuple[int, list[np.ndarray]]] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)  # its sizes and ways

    def outputs(self, n: int) -> list[tuple[type, int, int]]:
        """Type, rows and columns of each output of a call with n positions."""
        types = (np.float32, np.uint16, np.int32, np.int64, np.uint8)
        rows = (self.b.tensors[t] for t in self.b.methods[0][1])
        return [(types[t[1]], t[3] * n + t[4], t[5]) for t in rows]

    def write(self, to: BinaryIO, library: Any) -> None:
        """In the form that kernels/cpu/fuzz/plan_replay.cpp reads."""

        def block(data: bytes) -> None:
            to.write(struct.pack("<q", len(data)) + data + bytes(-len(data) % 8))

        block(self.name.encode())
        block(self.b.words(library).tobytes())
        block(bytes(self.b.weights))
        block(self.slot.tobytes())
        to.write(struct.pack("<q", len(self.calls)))
        for n, inputs in self.calls:
            to.write(struct.pack("<qq", n, len(inputs)))
            for array in inputs:
                block(np.ascontiguousarray(array).tobytes())

    def run(self, library: Any, **options: Any) -> list[np.ndarray]:
        """The outputs of all calls and the slot in the end, from a variant of the library that Python loaded."""
        from tmlc.kernels.cpu import Plan

        plan = Plan(library, self.b.words(library), self.b.weight_array(), 1, **options)
        slot, results = self.slot.copy(), []
        for n, inputs in self.calls:
            outs = [np.frombuffer(b"\xff" * (np.dtype(t).itemsize * r * c), t).reshape(r, c).copy()
                    for t, r, c in self.outputs(n)]  # fmt: skip
            plan.run(None, 0, n, slot, [np.ascontiguousarray(x) for x in inputs], outs)
            results += outs
        return [*results, slot]


class Maker:
    """The plan of a case while an operation describes itself; operands come into being in the order of the call."""

    def __init__(self, b: Any, rng: np.random.Generator) -> None:
        self.b, self.rng = b, rng
        self.ins: list[tuple[int, Callable[[int], np.ndarray]]] = []
        self.outs: list[int] = []
        self.states: list[tuple[int, np.ndarray]] = []

    def out(self, cols: int, dtype: str = "f32", rows: tuple[int, int] = (1, 0)) -> int:
        self.outs.append(self.b.output(len(self.outs), dtype, cols, rows))
        return self.outs[-1]

    def arg(
        self, cols: int, value: Callable[[int], np.ndarray] | None = None, dtype: str = "f32", rows: int = 1
    ) -> int:
        """An input of rows·n rows; `value(rows)` makes its content, normal numbers unless given."""
        make = value or (lambda n: self.rng.standard_normal((n, cols), np.float32))
        t = self.b.input(len(self.ins), dtype, cols, (rows, 0))
        self.ins.append((t, lambda n: make(rows * n)))
        return t

    def whole(self, low: int, high: int, cols: int, dtype: str = "i32") -> int:
        """Whole numbers low … high-1, both ends among them."""
        kind = np.int32 if dtype == "i32" else np.int64

        def make(n: int) -> np.ndarray:
            x = self.rng.integers(low, high, (n, cols)).astype(kind)
            x.flat[0], x.flat[-1] = high - 1, low
            return x

        return self.arg(cols, make, dtype)

    def weight(self, *shape: int, dtype: str = "f32") -> int:
        x = self.rng.standard_normal(shape, np.float32)
        return self.b.weight(x if dtype == "f32" else (x.view(np.uint32) >> 16).astype(np.uint16))

    def packed(self, blocks: int, k: int, form: str) -> int:
        """Packed weights of any form: random ones, which every form allows."""
        if form in ("f32", "bf16"):
            return self.weight(blocks, (k if form == "f32" else k + k % 2) * 16, dtype=form)
        size = GROUP_BYTES[form]
        groups = -(-k // (64 if form == "int4_64" else 32))
        data = self.rng.integers(0, 256, (blocks, groups * size), np.uint8)
        return self.b.weight(data & 0xBF)  # wherever a float16 scale lies among the bytes, it is below 2

    def state(self, rows: int, cols: int, dtype: str = "f32", value: np.ndarray | None = None) -> int:
        t = self.b.slot(dtype, rows, cols)
        if value is None:
            value = self.rng.standard_normal((rows, cols), np.float32)
            value = (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else value
        self.states.append((t, value))
        return t

    def position(self, value: int) -> int:
        return self.state(1, 1, "i64", np.array([[value]], np.int64))

    def case(self, name: str, code: list[tuple], rounds: Sequence[int]) -> Case:
        self.b.method([t for t, _ in self.ins], self.outs, code)
        slot = np.zeros(self.b.slot_bytes, np.uint8)
        for t, value in self.states:
            raw = np.ascontiguousarray(value).view(np.uint8).ravel()
            slot[self.b.tensors[t][2] :][: raw.size] = raw
        return Case(name, self.b, slot, [(n, [make(n) for _, make in self.ins]) for n in rounds])


# ---- what each operation is made of: (maker, sizes) -> (tensors, ints, floats), or a list of calls


def elementwise(inputs: int, *floats: float) -> Callable:
    def make(m: Maker, v: dict) -> tuple:
        return [m.out(v["c"]), *(m.arg(v["c"]) for _ in range(inputs))], [], list(floats)

    return make


def copy(m: Maker, v: dict) -> tuple:
    kinds = dict(f32=np.float32, bf16=np.uint16, i32=np.int32, i64=np.int64, u8=np.uint8)
    kind = kinds[v["dtype"]]
    x = m.arg(v["c"], lambda n: m.rng.integers(0, 99, (n, v["c"])).astype(kind), v["dtype"])
    return [m.out(v["c"], v["dtype"]), x], [], []


def scale_by(m: Maker, v: dict) -> tuple:
    return [m.out(v["c"]), m.arg(v["c"]), m.weight(1, 1)], [], []


def add_row(m: Maker, v: dict) -> tuple:
    return [m.out(v["c"]), m.arg(v["c"]), m.weight(v["r"], v["c"])], [v["r"] - 1], []


def concat_columns(m: Maker, v: dict) -> tuple:
    return [m.out(v["c"] + v["e"]), m.arg(v["c"]), m.arg(v["e"])], [], []


def l2_clip(m: Maker, v: dict) -> tuple:
    c = v["H"] * v["d"]
    return [m.out(c), m.arg(c), *([m.weight(1, c)] if v["scale"] else [])], [v["H"]], [1.5]


def mix_blocks(m: Maker, v: dict) -> tuple:
    return [m.out(v["q"] * v["d"]), m.arg(v["m"] * v["d"]), m.weight(v["q"], v["d"])], [], [1e-6]


def embedding(m: Maker, v: dict) -> tuple:
    return [m.out(v["d"]), m.whole(0, v["V"], 1), m.weight(v["V"], v["d"], dtype=v["dtype"])], [], []


def bag_embedding(m: Maker, v: dict) -> tuple:
    table = m.weight(v["B"] * v["L"], v["d"], dtype=v["dtype"])
    return [m.out(v["d"]), m.whole(0, v["L"], v["B"]), table], [v["L"]], []


def rms_norm(m: Maker, v: dict) -> tuple:
    return [m.out(v["g"] * v["d"]), m.arg(v["g"] * v["d"]), m.weight(1, v["d"])], [], [1e-6]


def add_rms_norm(m: Maker, v: dict) -> tuple:
    return [m.out(v["d"]), m.out(v["d"]), m.arg(v["d"]), m.arg(v["d"]), m.weight(1, v["d"])], [], [1e-6]


def _epilogue(m: Maker, v: dict, cols: int) -> tuple[list[int], list[int], list[float]]:
    """Operands, (start, residual) and level of what follows a product: flags 4 scale, 8 convolution, 16 addend."""
    flags, t, start = v["after"], [], 0
    if flags & 4:
        t.append(m.weight(1, 1))
    if flags & 8:
        start = min(v["start"], cols - 1)
        taken = min(v["taken"], cols - start)
        t += [m.weight(v["taps"], taken), m.state(v["taps"] - 1, taken)]
    if flags & 16:
        t.append(m.arg(cols))
    return t, [start, 1 if flags & 8 and v["taps"] % 2 else 0], [0.7 if flags & 8 and v["taps"] > 2 else 1.0]


def linear(m: Maker, v: dict) -> tuple:
    t = [m.out(v["m"]), m.arg(v["k"]), m.packed(-(-v["m"] // 16), v["k"], v["form"])]
    t += [m.weight(1, v["m"])] if v["bias"] else []
    if not v["after"]:
        return t, [], []
    operands, ints, floats = _epilogue(m, v, v["m"])
    return t + operands, [v["after"] | v["bias"], *ints], floats


def short_conv(m: Maker, v: dict) -> tuple:
    t = [m.out(v["c"]), m.arg(v["c"]), m.weight(v["k"], v["c"]), m.state(v["k"] - 1, v["c"])]
    return t, [v["residual"]], []


def dynamic_conv(m: Maker, v: dict) -> tuple:
    c = v["H"] * v["w"]
    t = [m.out(c), m.arg(c), m.weight(v["k"], c), m.arg(v["H"] * v["k"]), m.state(v["k"] - 1, c)]
    return t, [v["residual"]], []


def advance(m: Maker, v: dict) -> tuple:
    return [m.position(v["past"])], [v["past"] + 300], []


def _int8_cache(m: Maker, blocks: int, cols: int) -> int:
    """Random codes of blocks of 16 positions, then their scales."""
    codes = m.rng.integers(0, 256, (blocks, 16 * -(-cols // 4) * 4), np.uint8)
    scales = (m.rng.random((blocks, 16)) * 0.02).astype(np.float32)
    content = np.concatenate([codes, scales.view(np.uint8)], 1)
    return m.state(*content.shape, "u8", content)


def attention(m: Maker, v: dict) -> list[tuple]:
    heads, kv, d, dv, window, dtype = v["G"] * v["per"], v["G"], v["d"], v["dv"], v["window"], v["dtype"]
    past = v["past"] + v["far"]
    sinks = 16 * v["sinks"] if window else 0
    room = window - 1 + m.b.max_n if window else past + m.b.max_n + 1
    capacity = sinks + -(-room // 16) * 16
    t = [m.out(heads * dv), m.arg(heads * d), m.arg(kv * d), m.arg(kv * dv), m.position(past)]
    if dtype == "int8":
        t += [_int8_cache(m, kv * capacity // 16, d), _int8_cache(m, kv * capacity // 16, dv)]
    else:
        t += [m.state(kv * capacity // 16, d * 16, dtype), m.state(kv * capacity, dv, dtype)]
    if v["flags"] & 1:
        t += [m.arg(heads * v["rank"]), m.weight(v["rank"], v["extent"])]
    if v["flags"] & 2:
        t.append(m.arg(heads) if v["flags"] & 4 else m.weight(1, heads))
    ints = [heads, kv, window, sinks, capacity, v["flags"] & 3]
    limit = 0 if window else capacity
    return [("attention", t, ints, [0.3, 2.0, 0.1, v["softcap"]]), ("advance", [t[4]], [limit])]


def rope(m: Maker, v: dict) -> tuple:
    width = v["offset"] + 2 * v["half"] + v["rest"]
    freq = m.b.weight((10000.0 ** -(np.arange(v["half"]) / v["half"])).astype(np.float32)[None])
    t = [m.out(v["H"] * width), m.arg(v["H"] * width), m.position(v["past"]), freq]
    return t, [v["H"], v["offset"], v["interleaved"]], [1.25]


def head_columns(m: Maker, v: dict) -> tuple:
    width = v["start"] + v["taken"] + v["rest"]
    return [m.out(v["H"] * v["taken"]), m.arg(v["H"] * width)], [v["H"], v["start"], v["start"] + v["taken"]], []


def concat_heads(m: Maker, v: dict) -> tuple:
    heads, shared = v["H"], v["shared"]
    a, b = (1 if shared == 1 else heads) * v["A"], (1 if shared == 2 else heads) * v["B"]
    return [m.out(heads * (v["A"] + v["B"])), m.arg(a), m.arg(b)], [heads, shared], []


def _logits(m: Maker, cols: int, ties: bool) -> int:
    """Logits of a router; with ties, of three values only."""
    if not ties:
        return m.arg(cols)
    return m.arg(cols, lambda n: m.rng.integers(-1, 2, (n, cols)).astype(np.float32))


def sink_router(m: Maker, v: dict) -> tuple:
    experts, chosen = v["K"] + v["rest"], v["K"] + v["S"]
    t = [m.out(chosen), m.out(chosen, "i32"), _logits(m, experts + v["S"], v["ties"])]
    return [*t, m.weight(1, experts), m.weight(1, 1)], [v["K"], v["S"]], [2.0]


def router(m: Maker, v: dict) -> tuple:
    experts, chosen = v["K"] + v["rest"], v["K"] + v["S"]
    t = [m.out(chosen), m.out(chosen, "i32"), m.arg(v["d"]), m.packed(-(-(experts + v["S"]) // 16), v["d"], "f32")]
    return [*t, m.weight(1, experts), m.weight(1, 1)], [v["K"], v["S"]], [2.0]


def topk_router(m: Maker, v: dict) -> tuple:
    experts = v["groups"] * v["size"]
    open_groups = max(1, v["groups"] - v["shut"])
    top_k = min(v["K"], open_groups * v["size"])
    t = [m.out(top_k), m.out(top_k, "i32"), _logits(m, experts, v["ties"])]
    ints = [v["scores"], top_k, v["normalise"], v["groups"], open_groups]
    return [*t, *([m.weight(1, experts)] if v["bias"] else [])], ints, [2.5]


def moe(m: Maker, v: dict) -> tuple:
    experts, d, f, top_k = v["K"] + v["rest"], v["d"], v["f"], v["K"]

    def choices(n: int) -> np.ndarray:  # distinct ones in each row; `one`: the last expert takes every row
        first = experts - 1 if v["one"] else m.rng.integers(0, experts, (n, 1))
        return ((first + np.arange(top_k) + np.zeros((n, 1))) % experts).astype(np.int32)

    up = m.packed(experts * 2 * -(-f // 16), d, v["up"])
    t = [m.out(d), m.arg(d), m.arg(top_k), m.arg(top_k, choices, "i32"), up]
    t.append(m.packed(experts * -(-d // 16), f, v["down"]))
    if v["flags"] & 1:
        t += [m.weight(experts, 2 * f), m.weight(experts, d)]
    floats = [[], [1.702, 7.0], [0.0, 0.0, 0.7, 1.1], [0.0, 0.0, 0.7, 1.1]][v["flags"]]
    if v["after"] is None:
        return t, [experts, f, *([v["flags"]] if v["flags"] else [])], floats
    operands, ints, level = _epilogue(m, v, d)
    every = (floats + [0.0] * 4)[:4] + level
    return t + operands, [experts, f, v["flags"] | v["after"], v["grouped_from"], *ints], every


def dmel(m: Maker, v: dict) -> tuple:
    window = v["hop"] + v["overlap"]
    shape = m.b.weight(np.hanning(window + 2)[1:-1].astype(np.float32)[None])
    filters = m.b.weight(m.rng.random((v["B"], window // 2 + 1), np.float32))
    t = [m.out(v["B"], "i32"), m.arg(v["hop"]), shape, filters, m.state(1, v["overlap"])]
    return t, [v["L"]], [-7.0, 2.0]


def patchify(m: Maker, v: dict) -> tuple:
    patch, frames = v["p1"] * v["p2"], v["t1"] * v["t2"]
    height, width = v["down"] * patch, v["across"] * patch
    folds = [v["t1"], v["p1"], v["t2"], v["p2"]]
    leaves = v["t2"] * v["p2"] ** 2
    pixels = m.arg(width * 3, lambda n: m.rng.integers(0, 256, (n, width * 3), np.uint8), "u8", frames * height)
    out = m.out(v["t1"] * v["p1"] ** 2 * 3, rows=(v["down"] * v["across"] * leaves, 0))
    return [out, pixels], [frames, height, patch, 2, *folds], [0.5, 0.4, 0.3, 0.2, 0.2, 0.2]


def philox_normal(m: Maker, v: dict) -> tuple:
    return [m.out(v["D"]), m.whole(0, 1 << 30, 3, "i64")], [], []


def sample(m: Maker, v: dict) -> tuple:
    heat = m.arg(1, lambda n: np.full((n, 1), v["heat"], np.float32))
    return [m.out(1, "i32"), _logits(m, v["V"], v["ties"]), m.whole(0, 1 << 30, 3, "i64"), heat], [], []


def head_sample(m: Maker, v: dict) -> tuple:
    entries, heat = v["V"], v["heat"]
    t = [m.out(1, "i32"), m.arg(v["k"]), m.packed(-(-entries // 16), v["k"], v["form"]), m.whole(0, 1 << 30, 3, "i64")]
    t.append(m.arg(1, lambda n: np.full((n, 1), heat, np.float32)))
    return [*t, *([m.weight(1, entries)] if v["bias"] else [])], [entries], [v["alpha"], v["cap"]]


def overlap_add(m: Maker, v: dict) -> tuple:
    window = v["hop"] + v["overlap"]
    return [m.out(v["hop"]), m.arg(window), m.weight(1, window), m.state(1, v["overlap"])], [], []


# ---- sizes: name -> (default, lowest, highest); `n` is the number of positions of the first call


@dataclass(frozen=True)
class Op:
    make: Callable
    sizes: dict[str, tuple[int, int, int]]
    ways: dict[str, tuple] = field(default_factory=dict)  # options that are no sizes, and their values
    most: int = 40  # of each size, where all are drawn together

    def __post_init__(self) -> None:
        self.sizes.setdefault("n", (3, 1, 257))


def _sizes(**bounds: int | tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    return {name: b if isinstance(b, tuple) else (b, 1, 257) for name, b in bounds.items()}


AFTER = (0, 28, 8, 12, 4, 24, 20, 16)
FORMS = ("f32", "bf16", "int8", "int4", "int4_64")
OPS: dict[str, Op] = {
    **{name: Op(elementwise(1), _sizes(c=19)) for name in ("silu", "gelu", "sigmoid")},
    **{name: Op(elementwise(2), _sizes(c=19)) for name in ("add", "mul", "swiglu")},
    "modulate": Op(elementwise(3), _sizes(c=19)),
    "add_scaled": Op(elementwise(2, 0.7), _sizes(c=19)),
    "scale": Op(elementwise(1, 0.7), _sizes(c=19)),
    "softcap": Op(elementwise(1, 2.0), _sizes(c=19)),
    "clamp": Op(elementwise(1, -0.5, 0.7), _sizes(c=19)),
    "scale_by": Op(scale_by, _sizes(c=19)),
    "add_row": Op(add_row, _sizes(c=19, r=3)),
    "copy": Op(copy, _sizes(c=19), dict(dtype=("f32", "bf16", "i32", "i64", "u8"))),
    "concat_columns": Op(concat_columns, _sizes(c=19, e=5)),
    "l2_clip": Op(l2_clip, _sizes(H=3, d=19), dict(scale=(True, False))),
    "mix_blocks": Op(mix_blocks, _sizes(d=19, m=(3, 1, 64), q=(2, 1, 8))),
    "embedding": Op(embedding, _sizes(V=5, d=19), dict(dtype=("f32", "bf16"))),
    "bag_embedding": Op(bag_embedding, _sizes(B=3, L=5, d=19), dict(dtype=("f32", "bf16"))),
    "rms_norm": Op(rms_norm, _sizes(g=2, d=19)),
    "add_rms_norm": Op(add_rms_norm, _sizes(d=19)),
    "linear": Op(
        linear,
        _sizes(k=37, m=19, start=(3, 0, 257), taken=7, taps=(3, 2, 64)),
        dict(form=FORMS, after=AFTER, bias=(False, True)),
    ),
    "short_conv": Op(short_conv, _sizes(c=19, k=3), dict(residual=(0, 1))),
    "dynamic_conv": Op(dynamic_conv, _sizes(H=3, w=5, k=(3, 1, 64)), dict(residual=(0, 1))),
    "advance": Op(advance, _sizes(past=3)),
    "attention": Op(
        attention,
        _sizes(G=2, per=3, d=7, dv=5, past=(21, 0, 257), window=(0, 0, 257), sinks=(1, 0, 17), rank=3, extent=9),
        dict(dtype=("f32", "bf16", "int8"), far=(0, 500), flags=(0, 1, 2, 3, 7), softcap=(0.0, 1.5)),
    ),
    "rope": Op(
        rope, _sizes(H=3, half=5, offset=(1, 0, 257), rest=(2, 0, 257), past=(9, 0, 257)), dict(interleaved=(0, 1))
    ),
    "head_columns": Op(head_columns, _sizes(H=3, start=(2, 0, 257), taken=5, rest=(1, 0, 257))),
    "concat_heads": Op(concat_heads, _sizes(H=3, A=5, B=7), dict(shared=(0, 1, 2))),
    "sink_router": Op(sink_router, _sizes(K=3, rest=(5, 0, 257), S=(1, 0, 257)), dict(ties=(False, True))),
    "router": Op(router, _sizes(d=19, K=3, rest=(5, 0, 257), S=(1, 0, 257))),
    "topk_router": Op(
        topk_router,
        _sizes(groups=3, size=5, K=3, shut=(1, 0, 257)),
        dict(scores=(0, 1, 2), normalise=(0, 1), bias=(False, True), ties=(False, True)),
    ),
    "moe": Op(
        moe,
        _sizes(d=19, f=21, K=2, rest=(5, 0, 257), start=(3, 0, 257), taken=7, taps=(3, 2, 64), grouped_from=4),
        dict(after=(None, *AFTER), up=FORMS, down=FORMS, flags=(0, 1, 2, 3), one=(False, True)),
    ),
    "dmel": Op(dmel, _sizes(hop=8, overlap=5, B=3, L=16)),
    "patchify": Op(patchify, _sizes(down=1, across=2, p1=2, p2=1, t1=1, t2=1) | {"n": (1, 1, 257)}, most=4),
    "philox_normal": Op(philox_normal, _sizes(D=19)),
    "sample": Op(sample, _sizes(V=(19, 1, 257)), dict(heat=(0.0, 0.8), ties=(False, True))),
    "head_sample": Op(
        head_sample,
        _sizes(V=19, k=37),
        dict(form=FORMS, heat=(0.8, 0.0), bias=(False, True), alpha=(1.0, 0.5), cap=(0.0, 2.0)),
    ),
    "overlap_add": Op(overlap_add, _sizes(hop=8, overlap=5)),
}


def make_case(builder: Callable, rng: np.random.Generator, op: str, **chosen: Any) -> Case:
    """One case: the sizes and ways that `chosen` names, the defaults of the rest; a second call brings one row."""
    entry = OPS[op]
    v = {name: bounds[0] for name, bounds in entry.sizes.items()} | {name: w[0] for name, w in entry.ways.items()}
    v |= chosen
    m = Maker(builder(max_n=v["n"]), rng)
    made = entry.make(m, v)
    code = made if isinstance(made, list) else [(op, *made)]
    case = m.case(f"{op} {v}", code, [v["n"], 1])
    case.chosen = v
    return case


def sweep(builder: Callable, rng: np.random.Generator, op: str, step: int = 1, turn: int = 0) -> Iterator[Case]:
    """Every size of an operation over its whole range (or every `step`th), the others at their small defaults; the ways
    take turns from case to case, beginning with number `turn`."""
    for name, (_, low, high) in OPS[op].sizes.items():
        for value in range(low + turn % step, high + 1, step):
            yield make_case(builder, rng, op, **{name: value}, **_ways(op, turn))
            turn += 1


def _ways(op: str, turn: int) -> dict[str, Any]:
    chosen = {}
    for name, values in OPS[op].ways.items():
        turn, at = divmod(turn, len(values))
        chosen[name] = values[at]
    return chosen


def mixed(builder: Callable, rng: np.random.Generator, op: str, count: int) -> Iterator[Case]:
    """All sizes and ways drawn together."""
    most = OPS[op].most
    for _ in range(count):
        chosen: dict[str, Any] = {
            name: int(rng.integers(low, max(low, min(high, most)) + 1))
            for name, (_, low, high) in OPS[op].sizes.items()
        }
        chosen |= {name: values[rng.integers(len(values))] for name, values in OPS[op].ways.items()}
        yield make_case(builder, rng, op, **chosen)
