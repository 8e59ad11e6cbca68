"""How an engine makes the calls of a tick: cut into which parts, with how many launches, and where the host waits.

`OpsEngine` is the CPU's: an op is a launch. `KernelsEngine` is that of the Triton target: its buckets, the kernels of
each, and the graphs of a tick (docs/triton.md, "Chains").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmlc.ir.program import Program
from tmlc.report.plan.work import MethodCall, OpWork, tick_calls

if TYPE_CHECKING:
    from tmlc.emit.triton.target import TritonTarget
    from tmlc.runtimes.cuda.chains import Chain


@dataclass(frozen=True)
class Part:
    """One run of a method: `rows` positions of `sessions` sessions together, in so many launches."""

    method: str
    sessions: int
    rows: int
    launches: int


@dataclass(frozen=True)
class Run:
    """What is done between two waits of the host; `between` are launches that move rows between its parts."""

    parts: tuple[Part, ...]
    between: int = 0


class Engine(ABC):
    """One engine of a program.

    Args:
        launches: what is counted as a launch, for people.
    """

    def __init__(self, program: Program, launches: str) -> None:
        self.program, self.launches = program, launches

    def tick(self, sessions: int, video: bool) -> list[Run]:
        """One tick of so many sessions in which the model does all it can; with `video` each of them brings a clip."""
        return self.calls(tick_calls(self.program, video), sessions)

    @abstractmethod
    def calls(self, calls: Iterable[MethodCall], sessions: int) -> list[Run]:
        """These calls, one after another, for so many sessions together."""


class OpsEngine(Engine):
    """An op is a launch, and a call takes at most `max_n` rows of all its sessions.

    Args:
        work: `method_work` of the program.
        why: a reason to count so that is to be told; empty for the CPU engine, which is like that.
    """

    def __init__(self, program: Program, work: Mapping[str, Sequence[OpWork]], why: str = "") -> None:
        super().__init__(program, f"an op is a launch{': ' * bool(why)}{why}")
        self._ops = {method: sum(op.computes for op in ops) for method, ops in work.items()}

    def calls(self, calls: Iterable[MethodCall], sessions: int) -> list[Run]:
        made = []
        for call in calls:
            pieces = _groups(call.n * sessions, self.program.methods[call.method].max_n)
            made += [Run((Part(call.method, min(sessions, n), n, self._ops[call.method]),)) for n in pieces]
        return made


class KernelsEngine(Engine):
    """The launches of a Triton engine: those of the bucket that a call runs in, and of the graphs of a tick.

    Args:
        program: after the passes of the target triton.
        target: of one architecture.

    Raises EmitError: an op has no kernel.
    """

    def __init__(self, program: Program, target: TritonTarget) -> None:
        from tmlc.emit.triton.chains import chains_of

        (sm,) = target.architectures
        lowered = target.lower(program)
        super().__init__(program, "; ".join((f"launches are those of the kernels of {target.name}", *lowered.notes)))
        self._buckets = lowered.buckets
        self._kernels = {
            (method, bucket.batch, bucket.n): len(launches)
            for method, buckets in lowered.launches[sm].items()
            for bucket, launches in buckets.items()
        }
        self._between = {key: len(launches) for key, launches in lowered.chains[sm].items()}
        self._chains: dict[str, list[Chain]] = defaultdict(list)
        for chain in sorted(chains_of(program, lowered.methods, lowered.buckets)[0], key=lambda chain: chain.batch):
            self._chains[chain.name].append(chain)

    def tick(self, sessions: int, video: bool) -> list[Run]:
        calls = tick_calls(self.program, video)
        if not self._chains:
            return self.calls(calls, sessions)
        # A token ends each stage but the last; what brings a clip is taken in method by method.
        stages: list[list[MethodCall]] = [[]]
        for call in calls:
            stages[-1].append(call)
            if call.method == "next_token":
                stages.append([])
        heard, *written, said = stages
        typed = any(call.method == "embed_text" for call in heard)
        listen = "listen_text" if typed else "listen"
        runs = self.calls(heard, sessions) if video else self._chain(listen, heard, sessions)
        for stage in written:
            runs += self._chain("write", stage, sessions)
        return runs + self._chain("speak", said, sessions)

    def calls(self, calls: Iterable[MethodCall], sessions: int) -> list[Run]:
        from tmlc.runtimes.cuda.schedule import schedule

        made = []
        for call in calls:
            buckets = self._buckets[call.method]
            for size in _groups(sessions, max(bucket.batch for bucket in buckets)):
                for shape, pieces in schedule([call.n] * size, buckets):
                    launches = self._kernels[call.method, shape.batch, shape.n]
                    made.append(Run((Part(call.method, len(pieces), sum(n for _, _, n in pieces), launches),)))
        return made

    def _chain(self, name: str, calls: Sequence[MethodCall], sessions: int) -> list[Run]:
        """A graph for as many sessions as the largest takes, in the place of the calls that are made in it."""
        from tmlc.runtimes.cuda.chains import Link

        held, made = self._chains[name], []
        for size in _groups(sessions, held[-1].batch):
            chain = next(chain for chain in held if chain.batch >= size)
            left: dict[str, list[int]] = defaultdict(list)
            for call in calls:
                left[call.method].append(call.n)
            parts = []
            for link in chain.links:
                if isinstance(link, Link):
                    # A graph cuts a call into several links where no bucket holds it, and has links that are padded.
                    asked = left[link.method] or [0]
                    n = min(asked[0], link.n)
                    asked[0] -= n
                    if not asked[0]:
                        asked.pop(0)
                    parts.append(Part(link.method, size, n * size, self._kernels[link.method, chain.batch, link.n]))
            made.append(Run(tuple(parts), self._between[chain.key]))
        return made


def _groups(count: int, most: int) -> list[int]:
    """`count` in groups of at most `most`."""
    return [most] * (count // most) + ([count % most] if count % most else [])
