"""Chains of a Triton engine: read from its machine code, captured as one CUDA graph each, run for batches of sessions.

A run packs slots, counts, row numbers and inputs into the page-locked buffer that calls use too, replays one graph and
reads what it copied back. Everything is checked for all sessions before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import InputError, PackageError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core.chains import Answering, Chains, Key, Listening, Writing
from tmlc.runtimes.core.slots import Slot
from tmlc.runtimes.cuda.chains import Chain, Place, Take, compose
from tmlc.runtimes.cuda.plan import LaunchInfo, Plan, PointerArg, items, plan_error, read_launch

if TYPE_CHECKING:
    from tmlc.runtimes.cuda.backend import CudaBackend

FEATURE = "triton.chains.v1"


Put = Callable[["Run", int, int], None]
"""Writes what one session brings: the run, the session's place in it, and its number among all that were asked."""


@dataclass(frozen=True)
class Asked:
    """What a chain is to do for several sessions, one entry each.

    Attributes:
        chain: its name.
        slots: of the sessions.
        needs: new positions by method.
        texts: ids for `embed_text`.
        put: writes what a session brings.
    """

    chain: str
    slots: Sequence[Slot]
    needs: Sequence[Mapping[str, int]]
    texts: Sequence[Sequence[int]]
    put: Put


def read_chains(plan: Plan, code: Any, layout: TickLayout) -> dict[Chain, list[LaunchInfo]]:
    """The chains of an engine and the launches between their methods, checked as strictly as the plan.

    Raises:
        PlanError: a launch is not what a plan can have, or touches other bytes than the chain passes on.
        PackageError: the package was made for other chains than this version runs.
    """
    where = f"sm{plan.architecture}/code.json: chains"
    given = code.get("chains")
    if not isinstance(given, dict):
        raise plan_error("expected an object", where)
    buckets = {name: [(b.batch, b.n) for b in method.buckets] for name, method in plan.methods.items()}
    try:
        chains = compose({name: method.spec for name, method in plan.methods.items()}, buckets, layout)
    except (KeyError, IndexError) as error:
        raise plan_error("the methods are not those of a model that speaks", where) from error
    if set(given) != {chain.key for chain in chains}:
        raise PackageError(
            "the package's chains are not those of this version of tmlc", where=where,
            fix="compile the checkpoint again with this version of tmlc",
        )  # fmt: skip
    return {chain: _glue(plan, chain, given[chain.key], f"{where}, {chain.key}") for chain in chains}


def _glue(plan: Plan, chain: Chain, value: Any, where: str) -> list[LaunchInfo]:
    sizes = {(space, 0): size for space, size in chain.nbytes.items()}
    listed = items(value, where, len(chain.glue))
    if len(listed) != len(chain.glue):
        raise plan_error(f"{len(listed)} launches for {len(chain.glue)}", where)
    made = []
    for k, (one, link) in enumerate(zip(listed, chain.glue, strict=True)):
        launch = read_launch(one, f"{where}, launch {k}", sizes, plan.variants)
        nbytes = 4 * link.rows * link.cols
        wanted = [_pointer(link.out, nbytes)]
        if isinstance(link, Take):
            index = PointerArg("input", 0, link.index, 4 * link.rows)
            wanted += [_pointer(link.source, 4 * link.entries * link.cols), index]
        else:
            wanted.append(_pointer(link.source, nbytes))
        if [arg for arg in launch.args if isinstance(arg, PointerArg)] != wanted:
            raise plan_error("a launch does not move what the chain passes on", f"{where}, launch {k}")
        made.append(launch)
    return made


def _pointer(place: Place, nbytes: int) -> PointerArg:
    return PointerArg(place[0], 0, place[1], nbytes)


_BYTES: dict[type, int] = {np.int32: 4, np.int64: 8, np.float32: 4}


class Run:
    """One replay of a chain: what its graph's copies carry."""

    def __init__(self, chain: Chain, given: np.ndarray, taken: np.ndarray, slots: Sequence[int]) -> None:
        self.chain, self._given, self._taken = chain, given, taken
        given[: chain.nbytes["input"]] = 0  # no counts, no ids, no samples
        for at, count in chain.indices:
            given[at : at + 4 * count].view(np.int32)[:] = -1
        given[: 8 * len(slots)].view(np.int64)[:] = slots

    def field(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        return self._view(self._given, self.chain.fields[name], dtype, shape)

    def result(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        return self._view(self._taken, self.chain.fields[name], dtype, shape)

    @staticmethod
    def _view(buffer: np.ndarray, at: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = prod(shape) * _BYTES[dtype]  # some thirty times a tick: numpy's own product was a third of its time
        return buffer[at : at + nbytes].view(dtype).reshape(shape)

    def count(self, name: str, row: int, count: int) -> None:
        """The new positions of a session in a method."""
        at = self.chain.counts[name] + 4 * row
        self._given[at : at + 4].view(np.int32)[0] = count

    def text(self, row: int, ids: Sequence[int]) -> None:
        self.count("embed_text", row, len(ids))
        self.field("ids", np.int32, (self.chain.batch, self.chain.positions("embed_text")))[row, : len(ids)] = ids

    def choose(self, row: int, key: Key, temperature: float) -> None:
        self.count("next_token", row, 1)
        self.field("key", np.int64, (self.chain.batch, 3))[row] = key
        self.field("heat", np.float32, (self.chain.batch,))[row] = temperature

    def decode(self, row: int, parts: Sequence[tuple[int, int, int]]) -> None:
        """A session's rows for `decode`, parts after parts: (source, first row of the session's there, rows)."""
        where = np.array([(k, first + i) for k, first, count in parts for i in range(count)], np.int32)
        for piece in self.chain.pieces:
            mine = where[piece.start : piece.start + piece.n]
            if not len(mine):
                return
            self._given[piece.counts + 4 * row : piece.counts + 4 * row + 4].view(np.int32)[0] = len(mine)
            for source, (at, rows) in enumerate(zip(piece.takes, self.chain.rows, strict=True)):
                index = self._view(self._given, at, np.int32, (self.chain.batch, piece.n))[row, : len(mine)]
                own = mine[:, 0] == source
                index[own] = row * rows + mine[own, 1]
            if piece.start + len(mine) == len(where):
                last = self._view(self._given, piece.last, np.int32, (self.chain.batch,))
                last[row] = row * piece.n + len(mine) - 1


class CudaChains(Chains):
    """The chains of one backend.

    Args:
        chains: as `read_chains` gives them.
    """

    def __init__(self, backend: CudaBackend, chains: Mapping[Chain, list[LaunchInfo]], layout: TickLayout) -> None:
        self._backend, self._layout, self.glue = backend, layout, chains
        self._by_name: dict[str, list[Chain]] = {}
        for chain in sorted(chains, key=lambda c: c.batch):
            self._by_name.setdefault(chain.name, []).append(chain)
        self.typed = min(chain.positions("embed_text") for chain in self._by_name["listen_text"])

    def listen(self, asked: Sequence[Listening]) -> list[int | None]:
        sound, hop = self._layout.audio_in, self._layout.hop
        texts = [[*one.before, *one.typed] for one in asked]
        if any(one.pcm.shape != (sound, hop) for one in asked):
            raise InputError(f"a tick hears float32[{sound}, {hop}]", fix="fill it up with zeros")
        needs = [
            {"embed_audio": sound, "decode": sound + len(text), **({"embed_text": len(text)} if text else {})}
            for text in texts
        ]

        def put(run: Run, row: int, number: int) -> None:
            one, text = asked[number], texts[number]
            run.count("embed_audio", row, sound)
            shape = (run.chain.batch, run.chain.positions("embed_audio"), hop)
            run.field("pcm", np.float32, shape)[row, :sound] = one.pcm
            before, parts = len(one.before), [(0, 0, sound)]
            if text:
                run.text(row, text)
                parts = [(1, 0, before), *parts, (1, before, len(text) - before)]
            run.decode(row, parts)
            if one.key is not None:
                run.choose(row, one.key, one.temperature)

        name = "listen_text" if any(texts) else "listen"
        tokens = self._tokens(Asked(name, [one.slot for one in asked], needs, texts, put))
        return [None if one.key is None else token for one, token in zip(asked, tokens, strict=True)]

    def write(self, asked: Sequence[Writing]) -> list[int]:
        def put(run: Run, row: int, number: int) -> None:
            one = asked[number]
            run.text(row, [one.token])
            run.count("decode", row, 1)
            run.choose(row, one.key, one.temperature)

        needs = [{"embed_text": 1, "decode": 1} for _ in asked]
        texts = [[one.token] for one in asked]
        return self._tokens(Asked("write", [one.slot for one in asked], needs, texts, put))

    def _tokens(self, asked: Asked) -> list[int]:
        tokens: list[int] = []
        for run, count in self._runs(asked):
            tokens += run.result("token", np.int32, (run.chain.batch,))[:count].tolist()
        return tokens

    def answer(self, asked: Sequence[Answering]) -> list[np.ndarray]:
        count, hop = self._layout.audio_out, self._layout.hop
        needs = [
            {"embed_text": len(one.tail), "embed_speech": count, "decode": len(one.tail) + count, "vocode": count,
             **({"speak": count} if one.keys else {})}
            for one in asked
        ]  # fmt: skip
        texts, slots = [one.tail for one in asked], [one.slot for one in asked]

        def put(run: Run, row: int, number: int) -> None:
            run.text(row, asked[number].tail)
            run.field("quiet", np.float32, (run.chain.frame,))[:] = self._layout.silence_level
            run.field("heard", np.float32, (run.chain.batch, hop))[row] = asked[number].heard

        def speaking(run: Run, row: int, number: int) -> None:
            put(run, row, number)
            one = asked[number]
            run.decode(row, [(0, 0, len(one.tail)), (1, 0, 1)])
            for method in ("embed_speech", "vocode", *(["after"] if count > 1 else [])):
                run.count(method, row, 1)
            if not one.keys:
                run.field("silent", np.int32, (run.chain.batch,))[row] = 0
                return
            run.count("speak", row, 1)
            for j, key in enumerate(one.keys):
                run.field(f"key{j}", np.int64, (run.chain.batch, 3))[row] = key

        def resting(run: Run, row: int, number: int) -> None:
            put(run, row, number)
            batch, mels, heard = run.chain.batch, run.chain.positions("vocode"), run.chain.positions("embed_speech")
            run.decode(row, [(0, 0, len(asked[number].tail)), (1, 0, count)])
            run.count("vocode", row, count)
            run.count("embed_speech", row, count)
            run.field("mel", np.int32, (batch, mels))[row, :count] = 0
            run.field("first", np.int32, (batch, heard))[row, 0] = row
            run.field("later", np.int32, (batch, heard))[row, 1:count] = row * mels + np.arange(count - 1)

        samples: list[np.ndarray] = []
        if any(one.keys for one in asked):
            for run, size in self._runs(Asked("speak", slots, needs, texts, speaking)):
                own = [run.result(f"pcm{j}", np.float32, (run.chain.batch, hop))[:size] for j in range(count)]
                samples += list(np.stack(own, 1))
        else:
            for run, size in self._runs(Asked("rest", slots, needs, texts, resting)):
                shape = (run.chain.batch, run.chain.positions("vocode"), hop)
                samples += list(run.result("pcm", np.float32, shape)[:size, :count].copy())
        return samples

    def _runs(self, asked: Asked) -> Iterator[tuple[Run, int]]:
        """Runs a chain for all sessions, in groups as large as there are graphs for; each run is given out when it is
        done, with how many sessions it held."""
        backend, slots, at = self._backend, asked.slots, 0
        backend.admit(slots, asked.needs)
        for ids in asked.texts:
            backend.check_ids("embed_text", 0, np.array(ids, np.int32))
        held = self._by_name[asked.chain]
        while at < len(slots):
            size = min(len(slots) - at, held[-1].batch)
            chain = next(chain for chain in held if chain.batch >= size)
            run = Run(chain, *backend.staging, [backend.offset(slot) for slot in slots[at : at + size]])
            for row in range(size):
                asked.put(run, row, at + row)
            backend.run_chain(chain.key, slots[at : at + size], asked.needs[at : at + size])
            yield run, size
            at += size
