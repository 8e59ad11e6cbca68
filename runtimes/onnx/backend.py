"""Runs a package's graphs in ONNX Runtime: a session of it for each method, states bound where they lie in the slots.

Caches are updated in place: a graph's input and output are bound to the same bytes of the slot. Every other state goes
through a buffer and is copied into the slot once the call has succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tmlc.errors import ContextFullError, InputError, KernelError, PackageError, TargetError, UsageError
from tmlc.package.reader import Package
from tmlc.package.safetensors_io import parse_header
from tmlc.runtimes.core.backend import DTYPES, Backend, MethodSpec, TensorSpec, check_inputs, no_outputs
from tmlc.runtimes.core.kernels import KernelTimer
from tmlc.runtimes.core.placement import Placement
from tmlc.runtimes.core.slots import odd_slot
from tmlc.runtimes.onnx.kernel_times import OnnxTimer
from tmlc.runtimes.onnx.library import load_onnxruntime
from tmlc.runtimes.onnx.model_file import ModelFile
from tmlc.runtimes.onnx.signature import MethodGraph, State, read_signature

AGAIN = "Get the package again from its source, or compile it again with this version of tmlc."
TYPES = {"f32": ("tensor(float)", 1), "bf16": ("tensor(bfloat16)", 16), "i32": ("tensor(int32)", 6),
         "i64": ("tensor(int64)", 7), "u8": ("tensor(uint8)", 2)}  # fmt: skip
"""ONNX Runtime's name and number of each dtype."""
LAST_POSITION = 2**53


@dataclass
class Loaded:
    """A method ready to run: its session, what it writes to, and the bindings of slots that were used."""

    graph: MethodGraph
    spec: MethodSpec
    session: Any
    outputs: list[np.ndarray]
    after: dict[str, np.ndarray]
    nodes: int
    bindings: dict[int, Any] = field(default_factory=dict)
    runs: list[int] | None = None  # positions of each run, where somebody counts them


class OnnxBackend(Backend):
    """The graphs of a package.

    Args:
        package: an open package with an ONNX target; its files must stay where they are.
        target: the target's name in the package.
        threads: of ONNX Runtime, the caller included.
        placement: pins these threads; `lock_memory` and `huge_pages` are refused: ONNX Runtime's memory stays
            where it is.
    """

    def __init__(self, package: Package, target: str, threads: int, placement: Placement | None = None) -> None:
        placed = placement or Placement()
        for option, verb in (("lock_memory", "locked"), ("huge_pages", "moved to large pages")):
            if getattr(placed, option):
                what = f"ONNX Runtime keeps weights and buffers in memory of its own, which cannot be {verb}"
                raise UsageError(what, where=option, fix=f"load without {option}, or the target cpu")
        signature = read_signature(package, target)
        self._library = load_onnxruntime(signature.onnxruntime)
        self.target, self.threads = target, threads
        self.cores = placed.cores(threads)
        self.isa = f"onnxruntime {self._library.__version__}"
        self.slot_bytes = package.manifest.session_bytes
        self.methods = {name: graph.spec for name, graph in signature.methods.items()}
        self._weight_bytes = package.weights.nbytes
        self._package, self._signature = package, signature
        try:
            self._own = self._loaded = self._load_all()
        except (MemoryError, ValueError) as error:
            raise no_outputs("graphs") from error

    def _load_all(self, profile: Path | None = None) -> dict[str, Loaded]:
        """Every method, ready to run; `profile`: its session writes one to a file whose name begins like this."""
        graphs, weights = self._signature.methods, self._signature.weights
        return {name: self._load(self._package, graph, weights, profile) for name, graph in graphs.items()}

    def _load(self, package: Package, graph: MethodGraph, weights: str, profile: Path | None) -> Loaded:
        where = f"{package.path}: {graph.file}"
        path, begin = package.place(weights)
        start = parse_header(package._raw(weights), where)[1]
        file = ModelFile(package.read(graph.file), where, weights, package.tensors, start)
        model = file.pointed(path.name, begin)
        session = _session(self._library, model, str(path.parent), self.threads, self.cores, where, profile)
        _check_session(session, graph, where)
        outputs = [a.spec.allocate(graph.max_n) for a in graph.outputs]
        after = {
            s.name: np.zeros(s.info.shape, DTYPES[s.info.dtype]) for s in graph.states if s.next and not s.in_place
        }
        return Loaded(graph, graph.spec, session, outputs, after, file.nodes)

    def kernel_timer(self) -> KernelTimer:
        """Times by ONNX Runtime's own profile; loads every graph a second time."""

        def use(loaded: dict[str, Loaded] | None) -> None:
            self._loaded = self._own if loaded is None else loaded

        return OnnxTimer(self._load_all, use)

    def call(
        self, method: str, parts: Sequence[tuple[int, np.ndarray]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        """See `Backend.call`. Sessions run one after the other, so each gets the bits that it would get alone."""
        loaded, n = self._loaded[method], sum(n for n, _ in parts)
        check_inputs(loaded.spec, n, inputs)
        if len(parts) > 1 and any(s.b for s in (*loaded.spec.inputs, *loaded.spec.outputs)):
            raise InputError(
                f"{method} has rows that belong to no position: it takes one session at a time",
                where=f"method {method}",
                fix="make a call for each session",
            )
        for _, slot in parts:
            if slot.nbytes != self.slot_bytes or slot.dtype != np.uint8 or not slot.flags.c_contiguous:
                raise odd_slot(self.slot_bytes, slot.nbytes)
        self._refuse(loaded, parts, inputs)
        at = 0
        for count, slot in parts:
            self._run(loaded, slot, count, at, inputs)
            at += count
        return [buffer[: s.rows(n)] for buffer, s in zip(loaded.outputs, loaded.spec.outputs, strict=True)]

    def _refuse(self, loaded: Loaded, parts: Sequence[tuple[int, np.ndarray]], inputs: Sequence[np.ndarray]) -> None:
        """Raises for a session that must not run, before anything is changed."""
        graph, at = loaded.graph, 0
        for part, (count, slot) in enumerate(parts):
            for array, argument in zip(inputs, graph.inputs, strict=True):
                ids = array[at * argument.spec.a : (at + count) * argument.spec.a] if argument.spec.a else array
                if argument.below and ((ids < 0) | (ids >= argument.below)).any():
                    raise _of_part(KernelError(
                        f"{argument.name} holds a number outside of 0 to {argument.below - 1}",
                        where=graph.name, fix="give ids of the vocabulary",
                    ), part)  # fmt: skip
            if graph.position is not None:
                position = int(_bytes(slot, graph.position).view(np.int64)[0])
                if not 0 <= position <= LAST_POSITION:
                    raise _of_part(KernelError(
                        f"the session is at position {position}, which is none",
                        where=graph.name, fix="restore the session from a sound snapshot",
                    ), part)  # fmt: skip
                if graph.limit and position + count > graph.limit:
                    raise _of_part(ContextFullError(
                        f"context full: {count} new positions after {position} pass the context of {graph.limit}",
                        where=graph.name, fix="open a new session, or compile with a larger context",
                    ), part)  # fmt: skip
            at += count

    def _run(self, loaded: Loaded, slot: np.ndarray, count: int, at: int, inputs: Sequence[np.ndarray]) -> None:
        binding = loaded.bindings.get(slot.ctypes.data)
        if binding is None:
            binding = loaded.bindings[slot.ctypes.data] = self._bind_states(loaded, slot)
        graph = loaded.graph
        cuts = []  # kept until the call is over: the binding has addresses only
        for array, argument in zip(inputs, graph.inputs, strict=True):
            cuts.append(_rows(array, argument.spec, at, count))
            _bind(binding.bind_input, argument.name, argument.spec.dtype, cuts[-1])
        for buffer, argument in zip(loaded.outputs, graph.outputs, strict=True):
            cuts.append(_rows(buffer, argument.spec, at, count))
            _bind(binding.bind_output, argument.name, argument.spec.dtype, cuts[-1])
        if loaded.runs is not None:
            loaded.runs.append(count)
        try:
            loaded.session.run_with_iobinding(binding)
        except Exception as error:
            first = str(error).strip().partition("\n")[0][:300]
            raise KernelError(
                f"ONNX Runtime stopped: {first}",
                where=f"method {graph.name}",
                fix="open a new session or restore a snapshot; if it stops again, load the target cpu",
            ) from error
        for state in graph.states:
            if state.name in loaded.after:
                _bytes(slot, state)[:] = loaded.after[state.name].reshape(-1).view(np.uint8)

    def _bind_states(self, loaded: Loaded, slot: np.ndarray) -> Any:
        """A binding of a slot's states, which lie at the same addresses for as long as the engine lives."""
        binding = loaded.session.io_binding()
        for state in loaded.graph.states:
            held = _bytes(slot, state).view(DTYPES[state.info.dtype]).reshape(state.info.shape)
            _bind(binding.bind_input, state.name, state.info.dtype, held)
            if state.next is not None:
                _bind(binding.bind_output, state.next, state.info.dtype, loaded.after.get(state.name, held))
        return binding

    def memory(self) -> dict[str, int]:
        """What ONNX Runtime takes for itself (packed weights, its arena) it does not say, and it is not counted."""
        outputs = sum(array.nbytes for loaded in self._loaded.values() for array in loaded.outputs)
        scratch = sum(array.nbytes for loaded in self._loaded.values() for array in loaded.after.values())
        return {"weights": self._weight_bytes, "arena": 0, "scratch": scratch, "outputs": outputs}

    def close(self) -> None:
        self._own.clear()


def _of_part(error: Any, part: int) -> Any:
    error.part = part
    return error


def _bytes(slot: np.ndarray, state: State) -> np.ndarray:
    return slot[state.info.offset : state.info.offset + state.info.bytes]


def _rows(array: np.ndarray, spec: TensorSpec, at: int, count: int) -> np.ndarray:
    """The rows of one session's part."""
    return array[at * spec.a : at * spec.a + spec.rows(count)] if spec.a else array


def _bind(bind: Any, name: str, dtype: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, TYPES[dtype][1], list(array.shape), array.ctypes.data)


def _session(
    library: ModuleType, model: bytes, folder: str, threads: int, cores: tuple[int, ...] | None, where: str,
    profile: Path | None = None,
) -> Any:  # fmt: skip
    """ONNX Runtime's session of a graph whose weights lie in `folder`."""
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # its errors come as exceptions too
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    entries = {
        "session.model_external_initializers_file_folder_path": folder,
        "session.disable_quant_qdq": "1",  # weights of codes become floats once, when they are loaded
        "session.intra_op.allow_spinning": "0",  # several sessions share the cores
    }
    if cores is not None and threads > 1:
        entries["session.intra_op_thread_affinities"] = ";".join(str(core + 1) for core in cores[1:])
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        return library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:300]
        what = f"onnxruntime {library.__version__} does not accept the graph: {first}"
        raise TargetError(what, where=where, fix=f"Run `pip install -U onnxruntime`. {AGAIN}") from error


def _check_session(session: Any, graph: MethodGraph, where: str) -> None:
    """The graph's inputs and outputs are those of the signature. PackageError when they are not."""
    states = [(s.name, s.next, s.info.dtype, tuple(s.info.shape)) for s in graph.states]
    wanted_in = {a.name: _form(a.spec) for a in graph.inputs} | {name: (d, shape) for name, _, d, shape in states}
    wanted_out = {a.name: _form(a.spec) for a in graph.outputs}
    wanted_out |= {after: (d, shape) for _, after, d, shape in states if after is not None}
    for what, wanted, found in (
        ("input", wanted_in, session.get_inputs()),
        ("output", wanted_out, session.get_outputs()),
    ):
        if {arg.name for arg in found} != set(wanted):
            raise PackageError(f"the graph's {what}s are not those of the signature", where=where, fix=AGAIN)
        for arg in found:
            dtype, shape = wanted[arg.name]
            sizes = tuple(size if isinstance(size, int) else None for size in arg.shape)
            if arg.type != TYPES[dtype][0] or sizes != shape:
                raise PackageError(
                    f"{what} {arg.name} of the graph is {arg.type}{list(arg.shape)}", where=where, fix=AGAIN
                )


def _form(spec: TensorSpec) -> tuple[str, tuple[int | None, ...]]:
    return spec.dtype, (None if spec.a else spec.b, spec.cols)


def open_backend(
    package: Package,
    target: str,
    threads: int,
    isa: str | None = None,
    placement: Placement | None = None,
    portable_bits: bool = False,
) -> OnnxBackend:
    """The ONNX engine of `package`. Raises PackageError, TargetError, UsageError or CapacityError."""
    if isa is not None:
        raise UsageError("the target onnx has no variants of kernels", where="isa", fix="load without isa")
    if portable_bits:
        what = "ONNX Runtime does not promise the same bits on every machine"
        raise UsageError(what, where="portable_bits", fix="load without portable_bits, or the target cpu")
    return OnnxBackend(package, target, threads, placement)
