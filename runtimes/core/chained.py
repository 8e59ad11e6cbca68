"""The tick of an interaction model on a target that has chains: two to `text_out` + 1 calls in place of a call for
each method, the same bits.

Appends what came in with the first choice (`listen`); while a session writes, each token with the choice of the next
(`write`); then the end of the text with all output positions (`answer`). A tick that catches up, brings a clip, or
brings more tokens than `listen` takes, takes its input in method by method: such ticks are rare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import TypeVar

import numpy as np

from tmlc.errors import ContextFullError, KernelError
from tmlc.runtimes.core.chains import Answering, Chains, Listening, Writing
from tmlc.runtimes.core.model import Model
from tmlc.runtimes.core.tick import InteractionDriver, Job

STAGES = ("tick.listen", "tick.write", "tick.answer")
"""What chains are called in `TickOutput.timings`, beside the methods."""

A = TypeVar("A")
R = TypeVar("R")


class ChainedDriver(InteractionDriver):
    """`InteractionDriver` over the chains of a target."""

    def __init__(self, model: Model, sessions: int, chains: Chains) -> None:
        super().__init__(model, sessions)
        self._chains = chains
        model.times.update(dict.fromkeys(STAGES, 0))

    def _run(self, jobs: Sequence[Job]) -> None:
        if not self._chains.ready:
            super()._run(jobs)
            return
        for job in jobs:
            job.tokens = list(job.staged.say)
        if all(map(self._plain, jobs)):
            self._listen(jobs)
        else:
            self._catch_up(jobs)
            self._take_in(jobs, [(s, job.staged) for s, job in enumerate(jobs)])
            self.model.flush()
            self._choose(jobs, [s for s in self.model.present if not jobs[s].tokens], 0)
        choosing = [s for s in self.model.present if not jobs[s].staged.say]
        for output in range(1, self.layout.text_out):
            choosing = [s for s in choosing if s not in self.model.failed and jobs[s].tokens[-1] not in self._stops]
            if not choosing:
                break
            self._write(jobs, choosing, output)
        self._answer(jobs)

    def _plain(self, job: Job) -> bool:
        """Does `listen` take this session's input?"""
        staged = job.staged
        typed = min(self.layout.text_in, len(job.talk.queue) + len(staged.tokens))
        return not job.missed and staged.clip is None and len(staged.inject) + typed <= self._chains.typed

    def _through(
        self, stage: str, sessions: Sequence[int], asked: Sequence[A], run: Callable[[Sequence[A]], Sequence[R]]
    ) -> Iterator[tuple[int, R]]:
        """One chain for these sessions, and again without one that it is refused for."""
        begun, left, results = perf_counter_ns(), list(zip(sessions, asked, strict=True)), list[R]()
        while left and not results:
            try:
                results = list(run([one for _, one in left]))
            except (ContextFullError, KernelError) as error:
                if error.part is None:
                    raise
                self.model.leave(left.pop(error.part)[0], error)
        self.model.times[stage] += perf_counter_ns() - begun
        yield from zip([s for s, _ in left], results, strict=True)

    def _listen(self, jobs: Sequence[Job]) -> None:
        asked = []
        for job in jobs:
            key = None if job.tokens else job.key(0)
            typed = self._typed(job, job.staged)
            asked.append(
                Listening(job.slot, job.staged.pcm, job.staged.inject, typed, key, job.talk.temperature)
            )
        for s, token in self._through(STAGES[0], range(len(jobs)), asked, self._chains.listen):
            self.model.appended[s] += len(asked[s].before) + len(asked[s].pcm) + len(asked[s].typed)
            if token is not None:
                jobs[s].tokens.append(token)

    def _write(self, jobs: Sequence[Job], sessions: Sequence[int], output: int) -> None:
        asked = [
            Writing(jobs[s].slot, jobs[s].tokens[-1], jobs[s].key(output), jobs[s].talk.temperature) for s in sessions
        ]
        for s, token in self._through(STAGES[1], sessions, asked, self._chains.write):
            self.model.appended[s] += 1
            jobs[s].tokens.append(token)

    def _answer(self, jobs: Sequence[Job]) -> None:
        text, count = self.layout.text_out, self.layout.audio_out
        sessions, asked = self.model.present, []
        for s in sessions:
            silent = self._silent(jobs[s].tokens)
            keys = [] if silent else [jobs[s].key(text + j) for j in range(count)]
            asked.append(Answering(jobs[s].slot, self._tail(jobs[s]), jobs[s].talk.heard[0], keys))
        for s, pcm in self._through(STAGES[2], sessions, asked, self._chains.answer):
            jobs[s].audio = np.clip(pcm, -1.0, 1.0)
            jobs[s].talk.heard[:] = jobs[s].audio[-1:]
            jobs[s].first = perf_counter_ns()
            self.model.appended[s] += len(self._tail(jobs[s])) + count
