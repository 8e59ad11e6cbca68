"""The ONNX target on ONNX Runtime's CPU provider: ticks of nano beside the CPU engine, what a state that is copied
costs, and the ways in which experts and attention can run (docs/onnx.md). One thread each; the figures are best times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_session
import numpy as np
import pytest
import torch
from torch import fx

import tmlc
from tmlc.ir.dims import Dim
from tmlc.ir.program import Fact, Method, Program, call, items
from tmlc.ir.types import TensorType
from tmlc.ir.weights import WeightMap
from tmlc.package.safetensors_io import WeightItem, stream

onnxruntime = pytest.importorskip("onnxruntime")
TICKS, WARM = 40, 8


def best(run: Callable[[], object], rounds: int = 12) -> float:
    """Milliseconds of the best of some calls, after one."""
    run()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found) * 1000


@pytest.mark.parametrize(("precision", "target"), [(p, t) for p in ("fp32", "bf16", "int8", "int4")
                                                   for t in ("onnx", "onnx:contrib")])  # fmt: skip
def test_tick_of_nano(
    checkpoint: Path, tmp_path: Path, precision: str, target: str, figure: Callable[..., None]
) -> None:
    paths = {}
    for name in ("cpu", target):
        paths[name] = tmp_path / f"{name.replace(':', '_')}.tmlc"
        tmlc.compile(checkpoint, paths[name], target=name, precision=precision)
    with tmlc.load(paths["cpu"], threads=1) as cpu, tmlc.load(paths[target], threads=1) as graphs:
        times: dict[str, list[float]] = {"cpu": [], target: []}
        pairs = {"cpu": cpu.session(seed=0), target: graphs.session(seed=0)}
        for given in long_session.busy_ticks(cpu, TICKS + WARM):
            for name, session in pairs.items():
                started = time.perf_counter()
                session.tick(given)
                times[name].append((time.perf_counter() - started) * 1000)
    figure(f"tick of nano, {target}, {precision}", float(np.median(times[target][WARM:])), "ms")
    figure(f"tick of nano, {target} / cpu, {precision}", min(times[target][WARM:]) / min(times["cpu"][WARM:]), "x")


class Graph:
    """A method of a few ops as the target writes it, in ONNX Runtime, without a package."""

    def __init__(self, folder: Path, target: str) -> None:
        self.program = Program({}, WeightMap(), facts=frozenset({Fact.STATEFUL}), meta={"kind": "tokens", "name": "x"})
        self.graph, self.source = fx.Graph(), dict[str, torch.Tensor]()
        self.program.methods["m"] = Method("m", self.graph, 64)
        self.folder, self.target, self.random = folder, target, torch.Generator().manual_seed(0)

    def input(self, name: str, cols: int) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta.update(role=("input", name), type=TensorType("f32", (Dim(1), cols)))
        return node

    def weight(self, name: str, *shape: int, dtype: str = "f32") -> fx.Node:
        self.source[name] = torch.randn(shape, generator=self.random) / shape[-1] ** 0.5
        self.program.weights.source(name, "f32", shape)
        if dtype == "bf16":
            name = self.program.weights.cast(f"{name}.bf16", name, "bf16")
        elif dtype != "f32":
            name = self.program.weights.quantize(f"{name}.{dtype}", name, dtype)
        return self.program.add_weight_input("m", name)

    def session(self, output: fx.Node) -> Any:
        from tmlc.emit.targets import find_target

        self.graph.output((output,))
        emitted = find_target(self.target).emit(self.program, self.source, lambda *_: None)
        items_ = []
        for w in emitted.weights:
            entry = self.program.weights[w.weight]
            tensor = self.program.weights.evaluate(entry.srcs[0] if w.scheme else w.weight, self.source)
            items_.append(WeightItem(w.name, w.dtype, (w.rows, w.cols), lambda w=w, t=tensor: w.pieces(t)))
        (self.folder / "weights.safetensors").write_bytes(b"".join(bytes(piece) for piece in stream(items_)))
        (self.folder / "m.onnx").write_bytes(emitted.files["m.onnx"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(str(self.folder / "m.onnx"), options)


WAYS = {"pairs": ("onnx", 1000), "loop": ("onnx", 0), "operator": ("onnx:contrib", 0)}


@pytest.mark.parametrize("sizes", [(17, 5, 192, 64), (32, 4, 1024, 512)], ids=["nano", "1024x512"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8g32", "i4g32"])
def test_ways_of_experts(
    tmp_path: Path, sizes: tuple[int, ...], dtype: str, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmlc.emit.onnx import experts

    monkeypatch.setattr(experts, "SMALL_EXPERT", 1 << 40)  # every way for every size
    count, k, d, f = sizes
    for way, (target, grouped_from) in WAYS.items():
        (tmp_path / way).mkdir()
        g = Graph(tmp_path / way, target)
        x = g.input("x", d)
        router = call(g.graph, "linear", (x, g.weight("router", count, d), None))
        routes = items(call(g.graph, "topk_router", (router, None, 0, k, True, 1, 1, 1.0)))
        up, down = g.weight("up", count, 2 * f, d, dtype=dtype), g.weight("down", count, d, f, dtype=dtype)
        args = (x, *routes, up, down, None, None, 0.0, 0.0, 0.0, 0.0, grouped_from)
        session = g.session(call(g.graph, "moe", args))
        for rows in (1, 4, 16):
            given = {"x": np.random.default_rng(0).standard_normal((rows, d)).astype(np.float32)}
            name = f"experts {count} top-{k} of {f}, width {d}, {dtype}, {rows} rows, {way}"
            figure(name, best(lambda s=session, x=given: s.run(None, x)), "ms")


@pytest.mark.parametrize("dtype", ["f32", "i8g32", "i4g32"])
def test_ways_of_products(tmp_path: Path, dtype: str, figure: Callable[..., None]) -> None:
    for target in ("onnx", "onnx:contrib"):
        (tmp_path / target[-4:]).mkdir()
        g = Graph(tmp_path / target[-4:], target)
        x = g.input("x", 1024)
        session = g.session(call(g.graph, "linear", (x, g.weight("w", 4096, 1024, dtype=dtype), None)))
        for rows in (1, 16):
            given = {"x": np.ones((rows, 1024), np.float32)}
            figure(
                f"product 1024 x 4096, {dtype}, {rows} rows, {target}",
                best(lambda s=session, x=given: s.run(None, x)),
                "ms",
            )


def test_a_cache_that_is_copied_and_one_that_is_not(tmp_path: Path, figure: Callable[..., None]) -> None:
    """16 positions more in a cache of 8,192, 8 kv heads of 128: 64 MiB for keys and values together."""
    g = Graph(tmp_path, "onnx")
    q, k, v = g.input("q", 1024), g.input("k", 1024), g.input("v", 1024)
    from tmlc.ir.program import StateSpec

    position = g.program.add_state_input("m", StateSpec("position", "position", (1, 1), "i64", "m"))
    caches = [g.program.add_state_input("m", StateSpec(n, "kv_linear", (8192, 1024), "f32", "m")) for n in ("kc", "vc")]
    out = call(
        g.graph, "attention_state", (q, k, v, position, *caches, None, None, 8, 8, 0.1, 0, 0, 0.0, 0.0, None, 0.0)
    )
    call(g.graph, "advance", (position, q, 0))
    session = g.session(out)
    rows = np.ones((16, 1024), np.float32)
    for held in (0, 4000):
        states = {"kc": np.zeros((8, 8192, 128), np.float32), "vc": np.zeros((8, 8192, 128), np.float32)}
        places = {"position": np.array([[held]]), "q": rows, "k": rows, "v": rows, **states}
        for way in ("copied", "in place"):
            binding = session.io_binding()
            for name, array in places.items():
                binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
            spare = {name: np.zeros_like(array) for name, array in states.items()}
            for name, array in (states if way == "in place" else spare).items():
                binding.bind_output(f"{name}.next", "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
            for name in ("out0", "position.next"):
                binding.bind_output(name, "cpu")
            name = f"attention, 16 rows after {held} in a cache of 8192, {way}"
            figure(name, best(lambda b=binding: session.run_with_iobinding(b)), "ms")


CACHES = {
    "6 heads of 32, 2 kv, cache of 1024": (6, 2, 32, 1024),
    "32 heads of 128, 4 kv, cache of 8192": (32, 4, 128, 8192),
}


def fused_attention(heads: int, kv_heads: int, width: int, capacity: int, rotary: bool) -> Any:
    """ONNX Runtime's own operator for attention over a linear cache; with `rotary` it turns queries and keys itself."""
    from onnx import TensorProto, helper

    def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    cache = (1, kv_heads, capacity, width)
    inputs = [value("q", 1, "n", heads * width), *(value(name, 1, "n", kv_heads * width) for name in "kv")]
    inputs += [value("kc", *cache), value("vc", *cache)]
    inputs += [value("last", 1, kind=TensorProto.INT32), value("total", kind=TensorProto.INT32)]
    inputs += [value(name, capacity, width // 2) for name in ("cos", "sin") if rotary]
    outputs = [value("out0", 1, "n", heads * width), value("kc.next", *cache), value("vc.next", *cache)]
    node = helper.make_node(
        "GroupQueryAttention", [v.name for v in inputs], [v.name for v in outputs], domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads, scale=width**-0.5, do_rotary=int(rotary),
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "m", inputs, outputs), opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("sizes", CACHES.values(), ids=["small", "large"])
def test_ways_of_attention(tmp_path: Path, sizes: tuple[int, ...], rotary: bool, figure: Callable[..., None]) -> None:
    """A linear cache that is written in place: standard operators beside GroupQueryAttention, run in turn."""
    from tmlc.ir.program import StateSpec

    heads, kv_heads, width, capacity = sizes
    named = next(name for name, value in CACHES.items() if value == sizes)
    g = Graph(tmp_path, "onnx")
    q, k, v = g.input("q", heads * width), g.input("k", kv_heads * width), g.input("v", kv_heads * width)
    position = g.program.add_state_input("m", StateSpec("position", "position", (1, 1), "i64", "m"))
    shape = (capacity, kv_heads * width)
    caches = [g.program.add_state_input("m", StateSpec(n, "kv_linear", shape, "f32", "m")) for n in ("kc", "vc")]
    angles = 1e4 ** (-np.arange(width // 2) / (width // 2))
    if rotary:
        turns = g.weight("turns", width // 2)
        g.source["turns"] = torch.from_numpy(angles).float()
        pair = ((q, heads), (k, kv_heads))
        q, k = (call(g.graph, "rope_state", (x, position, turns, h, 0, False, 1.0)) for x, h in pair)
    scale = width**-0.5
    args = (q, k, v, position, *caches, None, None, heads, kv_heads, scale, 0, 0, 0.0, 0.0, None, 0.0)
    out = call(g.graph, "attention_state", args)
    call(g.graph, "advance", (position, q, 0))
    sessions = {"standard": g.session(out), "operator": fused_attention(*sizes, rotary)}
    turned = np.arange(capacity)[:, None] * angles
    random = np.random.default_rng(0)
    for rows in (1, 16):
        for held in (0, 500, min(4000, capacity - 16)):
            given = {n: random.standard_normal((rows, h * width)).astype(np.float32)
                     for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))}  # fmt: skip
            past = [random.standard_normal((kv_heads, capacity, width)).astype(np.float32) for _ in range(2)]
            ends = {"last": np.array([held + rows - 1], np.int32), "total": np.array(held + rows, np.int32)}
            tables = {"cos": np.cos(turned).astype(np.float32), "sin": np.sin(turned).astype(np.float32)}
            extra = {"standard": {"position": np.array([[held]])}, "operator": ends | (tables if rotary else {})}
            bound, kept = {}, []
            for way, session in sessions.items():
                states = {"kc": past[0].copy(), "vc": past[1].copy()}
                places = {**given, **extra[way], **states}
                if way == "operator":  # it has a dimension more
                    places |= {name: places[name][None] for name in (*given, *states)}
                binding = bound[way] = session.io_binding()
                for name, array in places.items():
                    binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
                    if name in states:
                        shape_of = list(array.shape)
                        binding.bind_output(f"{name}.next", "cpu", 0, array.dtype, shape_of, array.ctypes.data)
                kept.append(places)
                binding.bind_output("out0", "cpu")
                if way == "standard":
                    binding.bind_output("position.next", "cpu")
            times: dict[str, list[float]] = {way: [] for way in sessions}
            for _ in range(13):
                for way, session in sessions.items():
                    started = time.perf_counter()
                    session.run_with_iobinding(bound[way])
                    times[way].append((time.perf_counter() - started) * 1000)
            outputs = [binding.copy_outputs_to_cpu()[2] for binding in bound.values()]  # behind the two caches
            for way, found in times.items():
                turn = ", rotary" if rotary else ""
                figure(f"attention, {named}{turn}, {rows} rows after {held}, {way}", min(found[1:]), "ms")
            assert np.abs(outputs[0] - outputs[1][0]).max() < 1e-5
