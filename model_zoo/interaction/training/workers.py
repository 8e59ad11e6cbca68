"""A second process (and a third) that computes the gradient of its share of each batch.

The models are small: threads within an operation wait for each other more than they work, and processes do not. The
weights lie in memory that all processes share and only the first one changes; a worker is told the number of a step,
puts its gradient into shared memory, and says what there is to log. What a step computes depends on the number of
workers and not on which is faster.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tmlc.errors import TmlcError

from .stages import Share, Stage, means

Make = Callable[[Share], Stage]
"""Makes a stage over the shared model, for one share; it is pickled into the workers."""


class Workers:
    """The gradient of a whole batch, from this process's stage and from the workers.

    Args:
        make: makes the stage of a share.
        count: processes in all; 1 starts none.
    """

    def __init__(self, make: Make, count: int) -> None:
        self.stage = make(Share(0, count))
        self._gradients: list[list[Tensor]] = []
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = mp.get_context("spawn")
        if count > 1:
            for tensor in self.stage.tensors.values():
                tensor.data = tensor.data.share_memory_()
        for index in range(1, count):
            room = [torch.zeros_like(p).share_memory_() for p in parameters(self.stage)]
            ours, theirs = context.Pipe()
            weights = {name: t.data for name, t in self.stage.tensors.items()}
            arguments = (make, Share(index, count), weights, room, theirs, torch.get_num_threads())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._gradients.append(room)
            self._pipes.append(ours)
            self._processes.append(process)

    def step(self, step: int) -> dict[str, float]:
        """Leaves the gradient of the batch of a step in the parameters; returns what to log.

        Raises:
            TmlcError: a worker has ended.
        """
        try:
            for pipe in self._pipes:
                pipe.send(step)
            loss, parts = self.stage.loss(step)
            loss.backward()
            told = [{"loss": float(loss.detach()), **parts}]
            told += [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise TmlcError("a worker process has ended", where=self.stage.name, fix="start the run again") from error
        if self._pipes:
            for number, parameter in enumerate(parameters(self.stage)):
                # A parameter of which no share made use has no gradient here, and zero there.
                total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for room in self._gradients:
                    total = total.add_(room[number])
                parameter.grad = total.div_(1 + len(self._pipes))
        whole = means(told)
        if "positions" in whole:
            whole["positions"] *= len(told)
        return whole

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def parameters(stage: Stage) -> list[nn.Parameter]:
    return [t for t in stage.tensors.values() if isinstance(t, nn.Parameter)]


def _work(
    make: Make, share: Share, weights: dict[str, Tensor], room: list[Tensor], pipe: Connection, threads: int
) -> None:
    """A worker: until the pipe is closed. What interrupts a run is the first process's to handle."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    stage = make(share)
    for name, tensor in stage.tensors.items():
        tensor.data = weights[name]
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        loss, parts = stage.loss(step)
        loss.backward()
        for place, parameter in zip(room, parameters(stage), strict=True):
            if parameter.grad is None:
                place.zero_()
            else:
                place.copy_(parameter.grad)
                parameter.grad = None
        pipe.send({"loss": float(loss.detach()), **parts})
