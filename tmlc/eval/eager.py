"""A checkpoint that nobody compiled, behind the engine's own ticks and sessions: PyTorch runs its methods.

The program is what the model's PyTorch code was traced to, with the states that streaming needs and no other pass. Its
calls are the reference ops in eager PyTorch (`tmlc.ir.run`), so that a score of it is a score of the model, and what a
compile changed is the difference. Slow: one session after another, and every reference op as it is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import tmlc
from tmlc.compiler import compile
from tmlc.emit.graph import key_values, slot_layout, tick_layout
from tmlc.errors import CheckpointError, InputError
from tmlc.frontend.checkpoint import Checkpoint, open_checkpoint
from tmlc.ir.dims import Dim
from tmlc.ir.program import Method, type_of
from tmlc.ir.run import ProgramRunner, RunnerSession
from tmlc.ir.types import TensorType
from tmlc.package.manifest import ContextInfo, Manifest, MemoryInfo, ModelInfo, StateInfo, TargetInfo
from tmlc.runtimes.core.backend import DTYPES, Backend, MethodSpec, TensorSpec, check_inputs
from tmlc.runtimes.core.engine import Engine
from tmlc.runtimes.core.text import load_tokenizer

TARGET = "pytorch"


class EagerBackend(Backend):
    """The methods of a stateful program, in PyTorch.

    Args:
        runner: of the program; its ops change states in place.
        states: where each state lies in a slot.
        slot_bytes: of a slot.
    """

    target = TARGET

    def __init__(self, runner: ProgramRunner, states: Sequence[StateInfo], slot_bytes: int) -> None:
        self._runner, self._states, self.slot_bytes = runner, states, slot_bytes
        self.methods = {name: _spec(method) for name, method in runner.program.methods.items()}
        self._types = {name: [type_of(node) for node in m.inputs] for name, m in runner.program.methods.items()}
        self.isa, self.threads = f"torch {torch.__version__}", torch.get_num_threads()
        self._sessions: dict[int, RunnerSession] = {}

    def call(
        self, method: str, parts: Sequence[tuple[int, np.ndarray]], inputs: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        """See `Backend.call`. Sessions run one after the other; answers are new arrays."""
        spec = self.methods[method]
        check_inputs(spec, sum(n for n, _ in parts), inputs)
        if len(parts) > 1 and any(s.b for s in (*spec.inputs, *spec.outputs)):
            what = f"{method} has rows that belong to no position: it takes one session at a time"
            raise InputError(what, where=f"method {method}", fix="make a call for each session")
        found: list[list[np.ndarray]] = [[] for _ in spec.outputs]
        at = 0
        for count, slot in parts:
            cuts = [array[at * s.a : (at + count) * s.a + s.b] for array, s in zip(inputs, spec.inputs, strict=True)]
            given = (_given(cut, kind, count) for cut, kind in zip(cuts, self._types[method], strict=True))
            results = self._session(slot).call(method, *given)
            for kept, result, s in zip(found, results, spec.outputs, strict=True):
                kept.append(result.numpy().astype(DTYPES[s.dtype]).reshape(s.rows(count), s.cols))
            at += count
        return [np.ascontiguousarray(np.concatenate(kept)) for kept in found]

    def _session(self, slot: np.ndarray) -> RunnerSession:
        """A slot's states as tensors over its very bytes, which they keep."""
        address = slot.ctypes.data
        if address not in self._sessions:
            session = self._runner.session()
            for info in self._states:
                held = slot[info.offset : info.offset + info.bytes].view(DTYPES[info.dtype])
                session.states[info.name] = torch.from_numpy(held).reshape(info.shape)
            self._sessions[address] = session
        return self._sessions[address]

    def memory(self) -> dict[str, int]:
        """PyTorch does not say what its ops take beside the weights, and it is not counted."""
        return {"weights": sum(t.nbytes for t in self._runner._weights.values()), "arena": 0, "scratch": 0}

    def close(self) -> None:
        self._sessions.clear()


def open_model(checkpoint: Path, sessions: int) -> Engine:
    """An engine whose target is PyTorch, in float32 (weights of a bf16 checkpoint are widened).

    Args:
        checkpoint: a folder in the Hugging Face form, of an interaction model.
        sessions: how many may be open at once.

    Raises:
        CheckpointError: it is damaged, or has no tokenizer.
    """
    source = open_checkpoint(checkpoint)
    report = compile(source, checkpoint, precision="fp32", stop_after="state.insert")
    program = report.program
    assert program is not None
    states, slot_bytes = slot_layout(program)
    backend = EagerBackend(ProgramRunner(program, source), states, slot_bytes)
    manifest = Manifest(
        model=ModelInfo(report.model, report.kind),
        methods=(),
        states=states,
        session_bytes=slot_bytes,
        tick=tick_layout(program.meta["tick"]),
        context=ContextInfo(**program.meta["context"]),
        memory=MemoryInfo(0, 0, 0),
        targets={TARGET: TargetInfo("none", "fp32", "none")},
        tolerances={},
        producer={"tmlc": tmlc.__version__, "torch": torch.__version__},
    )
    return Engine(backend, manifest, "", load_tokenizer(_tokenizer(source, program.meta.get("tokenizer"))), sessions)


def _tokenizer(source: Checkpoint, name: object) -> bytes:
    path = Path(source.folder) / str(name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError("the tokenizer cannot be read", where=str(path), fix="Export it again.") from error


def _spec(method: Method) -> MethodSpec:
    """The signature that engines have of a method."""
    keys = key_values(method.graph)
    inputs = tuple(_tensor(type_of(node), (node, 0) in keys) for node in method.inputs)
    return MethodSpec(method.name, method.max_n, inputs, tuple(_tensor(type_of(node)) for node in method.outputs))


def _tensor(kind: TensorType, key: bool = False) -> TensorSpec:
    """Engines have i32 for ids and levels, and i64 for keys of the random stream."""
    rows = kind.rows if isinstance(kind.rows, Dim) else Dim(0, int(kind.rows))
    return TensorSpec("i32" if kind.dtype == "i64" and not key else kind.dtype, rows.a, rows.b, int(kind.cols))


def _given(array: np.ndarray, kind: TensorType, n: int) -> torch.Tensor:
    """An argument as the program has it, of a call with n positions."""
    shape = [size.at(n) if isinstance(size, Dim) else int(size) for size in kind.shape]
    return torch.from_numpy(array.copy()).to(kind.torch_dtype).reshape(shape)
