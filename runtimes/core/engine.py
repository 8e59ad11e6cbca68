"""The engine: a package loaded for one target, with all session memory reserved, shared by many sessions."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tmlc.errors import CapacityError, PackageError, SessionError, TargetError, UsageError
from tmlc.package.manifest import Manifest
from tmlc.package.reader import Package, open_package
from tmlc.runtimes.core.backend import Backend
from tmlc.runtimes.core.batch import tick_batch
from tmlc.runtimes.core.chained import ChainedDriver
from tmlc.runtimes.core.model import Model
from tmlc.runtimes.core.placement import Placement
from tmlc.runtimes.core.session import LogSink, Session
from tmlc.runtimes.core.slots import SlotPool, check_count
from tmlc.runtimes.core.snapshot import read_snapshot
from tmlc.runtimes.core.text import Tokenizer, load_tokenizer
from tmlc.runtimes.core.tick import DRIVERS, Conversation, Driver, TickInput, TickOutput, finite_temperature, whole_seed

BACKENDS = {
    "cpu": "tmlc.runtimes.cpu.backend",
    "onnx": "tmlc.runtimes.onnx.backend",
    "tensorrt": "tmlc.runtimes.tensorrt.backend",
    "triton": "tmlc.runtimes.cuda.backend",
}
"""Modules with `open_backend(package, target, threads, isa, placement, portable_bits) -> Backend`, by family:
the part of the name before a colon. Those of COMPILES_AT_LOAD take `kernel_cache` too."""
COMPILES_AT_LOAD = ("tensorrt",)
MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine holds and can still admit; sizes in bytes.

    Attributes:
        sessions, free: slots in all, and not taken.
        session_bytes: state of one session; `reserved_bytes` is what all slots take.
        weight_bytes, arena_bytes, scratch_bytes: shared by all sessions.
        context_limit, context_policy: positions a session keeps, and what happens at the bound.
        max_append: positions that go through the model in one piece.
    """

    sessions: int
    free: int
    session_bytes: int
    reserved_bytes: int
    weight_bytes: int
    arena_bytes: int
    scratch_bytes: int
    context_limit: int
    context_policy: str
    max_append: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    """Made by `load`. Thread-safe: one thread at a time is on the device, sessions take turns call by
    call.

    Attributes:
        manifest: the package's manifest.
        kind: "interaction" or "tokens".
        target, isa, threads: what the engine runs on ("cpu"), the variant of its kernels, its threads.
        cores: with `pin`, the core of each thread: workers are on theirs, the first is left for the thread
            that calls, which may tie itself to it (`os.sched_setaffinity(0, {engine.cores[0]})`). Else None.
        digest: the package's digest; snapshots and tick logs are bound to it.
        tokenizer: of the package, or None when it has none.
        layout: what a tick holds.
        batched: can several sessions be ticked together?
        backend, model, driver, slots: the parts that sessions use.
    """

    def __init__(
        self, backend: Backend, manifest: Manifest, digest: str, tokenizer: Tokenizer | None, sessions: int
    ) -> None:
        self.manifest, self.digest, self.tokenizer, self.backend = manifest, digest, tokenizer, backend
        self.kind, self.layout, self.batched = manifest.model.kind, manifest.tick, not backend.unbatched
        self.target, self.isa, self.threads = backend.target, backend.isa, backend.threads
        self.cores = backend.cores
        if manifest.session_bytes != backend.slot_bytes:
            raise PackageError(
                f"the manifest says {manifest.session_bytes} bytes a session, the plan {backend.slot_bytes}",
                fix="compile the checkpoint again with this version of tmlc",
            )
        self.slots = SlotPool(backend.slots(sessions))
        self.model = Model(backend, manifest, sessions)
        self.driver: Driver
        if backend.chains is not None:
            self.driver = ChainedDriver(self.model, sessions, backend.chains)
        else:
            self.driver = DRIVERS[self.kind](self.model, sessions)
        self._package: Package | None = None
        self._device = threading.Lock()
        self._closed = False
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return self.model.vocab

    def capacity(self) -> Capacity:
        """What the engine holds and can still admit."""
        memory, context = self.backend.memory(), self.manifest.context
        return Capacity(
            sessions=self.slots.count,
            free=self.slots.free,
            session_bytes=self.slots.memory.slot_bytes,
            reserved_bytes=self.slots.memory.reserved_bytes,
            weight_bytes=memory["weights"],
            arena_bytes=memory["arena"],
            scratch_bytes=memory["scratch"],
            context_limit=context.limit,
            context_policy=context.policy,
            max_append=self.model.chunk,
        )

    @contextmanager
    def device(self) -> Iterator[None]:
        """Holds the device; whoever has it may use `model` and `driver`."""
        with self._device:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the engine is closed", fix="load the package again")

    def session(self, seed: int = 0, temperature: float = 0.0, log: LogSink | None = None) -> Session:
        """Opens a conversation.

        Args:
            seed: of all random choices, 0 to 2⁶³-1.
            temperature: of the choice of tokens; 0 takes the most likely one.
            log: called with one JSON-able record for each append and tick (`tmlc.runtimes.core.ticklog`).

        Raises:
            CapacityError: all slots are taken.
            InputError: a seed or temperature out of range.
        """
        chosen = whole_seed(seed)
        self._check_open()
        talk = self._conversation(chosen, finite_temperature(temperature))
        return self._admit(talk, log)

    def tick_batch(
        self,
        sessions: Sequence[Session],
        inputs: Sequence[TickInput | None],
        missed: Sequence[Sequence[TickInput]] | None = None,
    ) -> list[TickOutput | Exception]:
        """One tick of several sessions in lock-step: weights, and each expert that any of them needs, are read once
        for all. Each session's output and state are bit for bit those of `Session.tick`, whatever the company.

        Args:
            sessions: of this engine, none twice; they may be at different ticks.
            inputs: what each of them gets (None: nothing but silence).
            missed: for each of them the inputs of earlier ticks that are caught up without an answer, oldest first, at
            most `MAX_MISSED`. The session becomes, bit for bit, what it would be if it had run these ticks one by one
            and had been silent in each; only the newest tick is decoded. Its index is that many further on.

        Returns:
            In the order of `sessions`, each one's output, or the error that `Session.tick` would have raised:
            InputError and SessionError (nothing of that session was changed), ContextFullError (it is closed),
            KernelError (it is poisoned). What is wrong with one session changes nothing for the others, except
            that a kernel that stops on an index out of range poisons all sessions of the batch. All inputs are
            checked before anything runs.

        Raises:
            UsageError: the call makes no sense (a session twice, of another engine, without an input; a package
            whose methods take one session at a time); nothing was changed.
        """
        return tick_batch(self, sessions, inputs, missed)

    def restore(self, blob: bytes, log: LogSink | None = None) -> Session:
        """The session that `Session.snapshot` described, in a slot of this engine.

        Raises:
            SessionError: damaged, or of another package or target.
            CapacityError: all slots are taken.
        """
        self._check_open()
        talk, size = self._conversation(0, 0.0), self.backend.slot_bytes
        slot = read_snapshot(bytes(blob), size, talk, self.digest, self.target, self.tokenizer, self.model.vocab)
        return self._admit(talk, log, lambda index: self.slots.memory.write(index, slot))

    def twin(self, talk: Conversation, source: int) -> Session:
        """A session that goes on from what `talk` remembers and slot `source` holds: `Session.fork`, which keeps both
        as they are meanwhile."""
        self._check_open()
        return self._admit(talk.copy(self.tokenizer), None, lambda index: self.slots.memory.copy(source, index))

    def _admit(self, talk: Conversation, log: LogSink | None, fill: Callable[[int], None] | None = None) -> Session:
        index = self.slots.take()
        try:
            if fill is not None:
                fill(index)
            session = Session(self, index, talk, log)
        except BaseException:
            self.slots.give_back(index)
            raise
        self._sessions.add(session)
        return session

    def _conversation(self, seed: int, temperature: float) -> Conversation:
        decoder = self.tokenizer.decoder() if self.tokenizer is not None else None
        heard = np.zeros((1, self.model.hop), np.float32)
        hidden = np.zeros((1, self.model.width), np.float32)
        return Conversation(seed, temperature, heard, hidden, decoder)

    def close(self) -> None:
        """Closes every session, waits for the call that runs, and frees the target; twice does nothing."""
        for session in list(self._sessions):
            session.close()
        with self._device:
            if self._closed:
                return
            self._closed = True
            self.backend.close()
            if self._package is not None:
                self._package.close()


def default_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def load(
    path: str | Path,
    target: str | None = None,
    threads: int | None = None,
    sessions: int = 4,
    isa: str | None = None,
    pin: bool = False,
    lock_memory: bool = False,
    portable_bits: bool = False,
    huge_pages: bool = False,
    kernel_cache: str | Path | None = None,
) -> Engine:
    """Loads a package and reserves everything its sessions will need.

    Args:
        path: a `.tmlc` file or folder.
        target: which of the package's targets, by name or by family ("cpu"); None takes the first that this tmlc runs.
        threads: kernel threads; None takes every core that this process may use.
        sessions: how many conversations may be open at once.
        isa: instruction-set variant of the kernels (see `tmlc doctor`); None takes the best this machine
        has.
        pin: tie each worker thread to a core of its own, among those that this process may use.
        lock_memory: keep weights, states and buffers in memory, so that no tick waits for a page.
        portable_bits: outputs and snapshots have the same bits on every machine, at some cost in speed
        (docs/plan-format.md, "Determinism"); otherwise only the last bits of floats depend on the machine.
        huge_pages: copy the weights into large pages of this process, instead of reading them where the package's
        file is mapped. Loading takes longer and memory for the copy; ticks are faster (docs/latency.md).
        kernel_cache: a folder of yours in which kernels that a TensorRT package compiles while it is loaded are kept
        for the next load (docs/tensorrt.md). Packages of other targets compile none, and refuse it.

    Raises:
        PackageError, PlanError: the package is damaged, altered, foreign, newer, or its plan is refused.
        TargetError: the package has not this target, or this machine cannot run it.
        CapacityError: the memory for the sessions cannot be reserved, or not be locked.
        UsageError: threads or sessions out of range, threads that cannot be pinned, a system without large pages.
    """
    count = default_threads() if threads is None else threads
    if not isinstance(count, int) or not 1 <= count <= MAX_THREADS:
        raise UsageError(
            f"threads must be 1 to {MAX_THREADS}, not {threads}",
            where="threads",
            fix="leave it out for every core that this process may use",
        )
    check_count(sessions)
    placement = Placement(pin, lock_memory, huge_pages)
    package = open_package(path)
    try:
        backend = _open_target(package, target, count, isa, placement, portable_bits, kernel_cache)
        try:
            named = package.manifest.tokenizer
            tokenizer = load_tokenizer(package.read(named)) if named else None
            engine = Engine(backend, package.manifest, package.digest, tokenizer, sessions)
            for address, nbytes in engine.slots.memory.host_blocks():
                placement.lock(address, nbytes, "session states")
        except BaseException:
            backend.close()
            raise
    except MemoryError as error:
        package.close()
        raise CapacityError(
            f"this machine has not the memory that {path} asks for", fix="load with fewer sessions"
        ) from error
    except BaseException:
        package.close()
        raise
    engine._package = package
    return engine


def _open_target(
    package: Package,
    target: str | None,
    threads: int,
    isa: str | None,
    placement: Placement,
    portable_bits: bool,
    kernel_cache: str | Path | None,
) -> Backend:
    held = list(package.manifest.targets)
    runnable = [name for name in held if _family(name) in BACKENDS]
    wanted = [name for name in held if target in (name, _family(name))] if target is not None else runnable
    if not wanted:
        raise TargetError(
            f"the package has no engine for {target or 'any target that this tmlc runs'}",
            where=str(package.path),
            fix=f"it has: {', '.join(held) or 'none'}; compile the checkpoint for the target you want",
        )
    if wanted[0] not in runnable:
        raise TargetError(f"this tmlc cannot run target {wanted[0]}", fix=f"it runs: {', '.join(BACKENDS)}")
    module = import_module(BACKENDS[_family(wanted[0])])
    kept = {} if kernel_cache is None else {"kernel_cache": Path(kernel_cache)}
    if kept and _family(wanted[0]) not in COMPILES_AT_LOAD:
        what = f"target {wanted[0]} compiles no kernels when it is loaded, so there are none to keep"
        raise UsageError(what, where="kernel_cache", fix="load without kernel_cache")
    backend: Backend = module.open_backend(package, wanted[0], threads, isa, placement, portable_bits, **kept)
    return backend


def _family(target: str) -> str:
    return target.partition(":")[0]
