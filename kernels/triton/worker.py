"""Interpreting launches from any process: a child runs Triton's interpreter over memory that both share.

    with open_interpreter() as machine:
        x = machine.array((4, 192), np.float32)
        machine.run([launch], {("input", "0"): x, ...})

The child is started with TRITON_INTERPRET=1 (mode.py says why it has to be another process). Launches go to it as lines
of JSON; operands never travel.
"""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from tmlc.errors import KernelError
from tmlc.kernels.triton.host_memory import DEFAULT_BYTES, Buffers, HostMemory
from tmlc.kernels.triton.launch import Launch
from tmlc.processes import python_module


class Interpreter(HostMemory):
    """A child process that interprets kernels, and the memory it shares with this one."""

    def __init__(self, nbytes: int = DEFAULT_BYTES) -> None:
        super().__init__(nbytes)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self._child = subprocess.Popen(
            python_module(__name__, self._file.fileno(), nbytes),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, pass_fds=[self._file.fileno()],
        )  # fmt: skip

    def run(
        self, launches: Iterable[Launch], buffers: Buffers, signatures: Iterable[tuple[str, ...]] | None = None
    ) -> None:
        """Runs launches in order; buffers as `places` takes them. `signatures`: of the launches, if not their own.

        Raises:
            EmitError: a launch names a buffer that is not there or too small.
            KernelError: a kernel touched memory outside its operands, or failed.
        """
        launches = list(launches)
        for launch, signature in zip(launches, signatures or (one.signature() for one in launches), strict=True):
            args, ranges = self.places(launch, buffers)
            self._ask({
                "kernel": launch.kernel, "constexprs": dict(launch.constexprs), "grid": launch.grid,
                "signature": signature, "args": args, "ranges": ranges,
            })  # fmt: skip

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            what = f"the interpreter ended while it ran {request['kernel']}"
            fix = "run it again, with more memory free; if it ends in the same way, report the kernel"
            raise KernelError(what, where="triton interpreter", fix=fix)
        failure = json.loads(answer)
        if failure:
            fix = "correct the kernel, or what its lowering says of the operands; nothing of its results may be used"
            raise KernelError(f"{request['kernel']}: {failure['error']}", where="triton interpreter", fix=fix)

    def close(self) -> None:
        """Ends the child; arrays stay readable."""
        if self._child.stdin is not None:
            with suppress(BrokenPipeError):  # the child is gone, and what was asked of it last with it
                self._child.stdin.close()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        super().close()

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_interpreter(nbytes: int = DEFAULT_BYTES) -> Interpreter:
    """Starts an interpreter with up to `nbytes` of shared memory; close it, or use it in a `with`."""
    return Interpreter(nbytes)


def serve(descriptor: int, nbytes: int) -> None:
    """The child: one request a line, one answer a line."""
    from tmlc.kernels.triton.interpreter import run_launch

    memory = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)
    start = memory.__array_interface__["data"][0]
    for line in sys.stdin:
        request = json.loads(line)
        kinds = request["signature"]
        args = [value + start if kind[0] == "*" else value for kind, value in zip(kinds, request["args"], strict=True)]
        ranges = [(first + start, last + start) for first, last in request["ranges"]]
        try:
            run_launch(request["kernel"], request["constexprs"], tuple(request["grid"]), kinds, args, ranges)
            answer: dict[str, str] = {}
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            answer = {"error": f"{type(error).__name__}: {error} (line {trace.tb_lineno if trace else '?'})"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        serve(int(sys.argv[1]), int(sys.argv[2]))
