"""What the tests of the ONNX target share: programs of a few ops, driven through their graphs as a foreign driver would
do it, and small checkpoints compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

import tmlc
from tmlc.ir.dims import Dim
from tmlc.ir.program import Fact, Method, Program, StateSpec, call, items
from tmlc.ir.run import ProgramRunner
from tmlc.ir.types import TensorType
from tmlc.ir.weights import WeightMap
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.package.safetensors_io import WeightItem, stream

N = Dim(1)
pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


class Builder:
    """Writes a program of one method; weights get fixed random values."""

    def __init__(self, max_n: int = 8) -> None:
        self.program = Program({}, WeightMap(), facts=frozenset({Fact.STATEFUL}), meta={"kind": "tokens", "name": "x"})
        self.source: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(1)
        self.graph = fx.Graph()
        self.program.methods["m"] = Method("m", self.graph, max_n)

    def input(self, name: str, cols: int, dtype: str = "f32", rows: Dim | int = N) -> fx.Node:
        return self._placeholder("input", name, TensorType(dtype, (rows, cols)))

    def _placeholder(self, kind: str, name: str, value: TensorType) -> fx.Node:
        """Placeholders stand before all calls, whenever they are asked for."""
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and node.meta["role"] == (kind, name):
                return node
        first = next((node for node in nodes if node.op != "placeholder"), None)
        if first is None:
            made = self.graph.placeholder(name.replace(".", "_"))
        else:
            with self.graph.inserting_before(first):
                made = self.graph.placeholder(name.replace(".", "_"))
        made.meta.update(role=(kind, name), type=value)
        return made

    def weight(self, name: str, *shape: int, dtype: str = "f32") -> fx.Node:
        value = torch.randn(shape, generator=self.random) / max(shape[-1], 1) ** 0.5 if shape else torch.tensor(1.5)
        return self.value(name, value, dtype)

    def value(self, name: str, value: torch.Tensor, dtype: str = "f32") -> fx.Node:
        """A weight; a quantised dtype makes codes of it."""
        stored = "f32" if dtype.startswith("i") else dtype
        self.source[name] = value.to(torch.bfloat16 if stored == "bf16" else torch.float32)
        self.program.weights.source(name, stored, value.shape)
        if stored != dtype:
            name = self.program.weights.quantize(f"{name}.{dtype}", name, dtype)
        return self._placeholder("weight", name, self.program.weights[name].type)

    def state(self, name: str, kind: str, *shape: int, dtype: str = "f32") -> fx.Node:
        spec = self.program.states.setdefault(name, StateSpec(name, kind, shape, dtype, "m"))
        return self._placeholder("state", name, spec.type)

    def op(self, name: str, *args: object) -> fx.Node:
        return call(self.graph, name, args)

    def two(self, name: str, *args: object) -> tuple[fx.Node, ...]:
        return items(self.op(name, *args))

    def output(self, *nodes: fx.Node) -> Builder:
        self.graph.output(nodes)
        return self

    def inputs(self, n: int, rng: np.random.Generator, **given: Callable[[np.random.Generator, tuple], np.ndarray]):
        """Random inputs for n positions: numbers of unit scale, bytes, and what `given` makes of a shape."""
        made = []
        for node in self.program.methods["m"].inputs:
            kind, name = node.meta["type"], node.meta["role"][1]
            shape = kind.at(n)
            if name in given:
                made.append(given[name](rng, shape))
            elif kind.dtype == "u8":
                made.append(rng.integers(0, 256, shape, dtype=np.uint8))
            else:
                made.append(rng.standard_normal(shape).astype(np.float32))
        return made


class Driven:
    """The graphs of a program in a folder, driven with nothing but onnxruntime: states go in and come out."""

    def __init__(self, program: Program, source: Any, folder: Path, target: str = "onnx") -> None:
        import onnx
        import onnxruntime

        from tmlc.emit.targets import find_target

        emitted = find_target(target).emit(program, source, lambda *_: None)
        folder.mkdir(parents=True, exist_ok=True)
        weights = [self._item(program, source, w) for w in emitted.weights]
        (folder / "weights.safetensors").write_bytes(b"".join(bytes(piece) for piece in stream(weights)))
        for name, content in emitted.files.items():
            if name.endswith(".onnx"):
                (folder / name).write_bytes(content)
                onnx.checker.check_model(str(folder / name), full_check=True)
        self.emitted, self.signature = emitted, emitted.files["engines/onnx/signature.json"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(folder / method["file"]), options, providers=["CPUExecutionProvider"]
            )
            for name, method in self.signature["methods"].items()
        }

    @staticmethod
    def _item(program: Program, source: Any, w: Any) -> WeightItem:
        entry = program.weights[w.weight]
        tensor = program.weights.evaluate(entry.srcs[0] if w.scheme else w.weight, source)
        return WeightItem(w.name, w.dtype, (w.rows, w.cols), lambda: w.pieces(tensor))

    def fresh(self) -> dict[str, np.ndarray]:
        """The states of a new session (bf16 as its bits)."""
        types = {"f32": np.float32, "bf16": np.uint16, "i64": np.int64, "u8": np.uint8}
        return {s.name: np.zeros(s.shape, types[s.dtype]) for s in self.emitted.states}

    def call(self, method: str, states: dict[str, np.ndarray], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One call; `states` has the new states after it."""
        import onnxruntime

        told, session = self.signature["methods"][method], self.sessions[method]
        binding = session.io_binding()
        keep = []
        for argument, array in zip(told["inputs"], inputs, strict=True):
            keep.append(np.ascontiguousarray(array.astype(np.int32) if argument["dtype"] == "i32" else array))
            binding.bind_ortvalue_input(argument["name"], onnxruntime.OrtValue.ortvalue_from_numpy(keep[-1]))
        for state in told["states"]:
            kind = {"f32": 1, "bf16": 16, "i64": 7, "u8": 2}[state["dtype"]]
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(states[state["name"]], kind)
            binding.bind_ortvalue_input(state["name"], value)
            keep.append(value)
        names = [o["name"] for o in told["outputs"]]
        after = [(s["name"], s["next"]) for s in told["states"] if s["next"]]
        for name in (*names, *(out for _, out in after)):
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found = binding.get_outputs()
        for (name, _), value in zip(after, found[len(names) :], strict=True):
            raw = (np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * states[name].nbytes)
                   .from_address(value.data_ptr())).copy())  # fmt: skip
            states[name] = raw.view(states[name].dtype).reshape(states[name].shape)
        return [value.numpy() for value in found[: len(names)]]


def _against_reference(
    b: Builder, folder: Path, sizes: Sequence[int], tolerance: float = 1e-5, target: str = "onnx", **given: Any
) -> None:
    """Calls of these sizes in one session, through the graphs and through the references; also a second session beside
    it, which must not be touched. The tolerance is a part of the largest value."""
    driven = Driven(b.program, b.source, folder, target)
    runner = ProgramRunner(b.program, b.source)
    rngs = [np.random.default_rng(seed) for seed in (0, 1)]
    expected, states = [runner.session() for _ in rngs], [driven.fresh() for _ in rngs]
    for n in sizes:
        for rng, reference, state in zip(rngs, expected, states, strict=True):
            inputs = b.inputs(n, rng, **given)
            want = reference.call("m", *(torch.from_numpy(x) for x in inputs))
            found = driven.call("m", state, inputs)
            assert len(found) == len(want)
            for mine, theirs in zip(found, want, strict=True):
                theirs = theirs.numpy()
                assert mine.shape == theirs.shape
                if theirs.dtype.kind == "f":
                    worst = np.abs(mine.astype(np.float64) - theirs).max(initial=0.0)
                    assert worst <= tolerance * max(1.0, np.abs(theirs).max(initial=0.0)), (n, worst)
                else:
                    assert np.array_equal(mine.astype(np.int64), theirs.astype(np.int64)), n


@pytest.fixture
def build() -> type[Builder]:
    return Builder


@pytest.fixture
def driven() -> type[Driven]:
    return Driven


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """(builder, sizes, tolerance, **inputs): the graphs against the references."""
    return lambda b, sizes, *args, **kwargs: _against_reference(b, tmp_path / "graphs", sizes, *args, **kwargs)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nano's checkpoint, and its fp32 packages: for the CPU, and for ONNX as a file and as a folder."""
    base = tmp_path_factory.mktemp("nano")
    create_checkpoint("nano", 0, base / "nano")
    found = {"checkpoint": base / "nano"}
    with pytest.MonkeyPatch.context() as patch:
        _trace_once(patch)
        for name, target, folder in (("cpu", "cpu", False), ("onnx", "onnx", False), ("folder", "onnx", True)):
            found[name] = base / f"{name}.tmlc"
            tmlc.compile(base / "nano", found[name], target=target, precision="fp32", folder=folder)
    return found


def _trace_once(patch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds and is the frontend's to test."""
    compiler = import_module("tmlc.compiler")
    load, traced = compiler.load_program, {}

    def once(source: Any, overrides: dict[str, Any]) -> Program:
        key = (str(source.folder), *(f"{k}={v}" for k, v in sorted(overrides.items())))
        if key not in traced:
            traced[key] = load(source, overrides)
        return traced[key].clone()

    patch.setattr(compiler, "load_program", once)


@pytest.fixture
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _trace_once(monkeypatch)
