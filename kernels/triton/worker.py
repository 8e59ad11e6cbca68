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
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tmlc.errors import EmitError, KernelError
from tmlc.kernels.triton.launch import Launch, Pointer

ALIGN = 256
#: Memory that no one has allocated stays a hole in the file and takes no bytes.
DEFAULT_BYTES = 1 << 34

Buffers = Mapping[tuple[str, str], npt.NDArray[Any]]


class Interpreter:
    """A child process that interprets kernels, and the memory it shares with this one."""

    def __init__(self, nbytes: int = DEFAULT_BYTES) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child runs)
        os.ftruncate(self._file.fileno(), nbytes)
        self._map = mmap.mmap(self._file.fileno(), nbytes)
        self._base = np.frombuffer(self._map, np.uint8)
        self._used = 0
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._file.fileno()), str(nbytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, pass_fds=[self._file.fileno()],
        )  # fmt: skip

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """Zeroed shared bytes at a multiple of 256. They are given back when the interpreter is closed."""
        start = self._used
        self._used = -(-(start + count) // ALIGN) * ALIGN
        if self._used > self._base.size:
            raise EmitError(f"{self._used} bytes do not fit the interpreter's {self._base.size}")
        return self._base[start : start + count]

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A zeroed shared array."""
        kind = np.dtype(dtype)
        return self.bytes(int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)

    def put(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A shared copy."""
        copy = self.array(values.shape, values.dtype)
        copy[...] = values
        return copy

    def mark(self) -> int:
        """How much is allocated; `release` goes back to it."""
        return self._used

    def release(self, mark: int) -> None:
        """Gives back, zeroed, everything that was allocated since."""
        self._base[mark : self._used] = 0
        self._used = mark

    def run(self, launches: Iterable[Launch], buffers: Buffers) -> None:
        """Runs launches in order.

        Args:
            buffers: shared arrays by (space, name), name "" but for weights, inputs and outputs. ("state", "") is the
                pool of slots; ("slots", "") and ("counts", "") are int64 and int32 arrays.

        Raises:
            EmitError: a launch names a buffer that is not there or too small.
            KernelError: a kernel touched memory outside its operands, or failed.
        """
        for launch in launches:
            self._ask(self._request(launch, buffers))

    def _request(self, launch: Launch, buffers: Buffers) -> dict[str, Any]:
        args: list[int | float] = []
        ranges: list[tuple[int, int]] = []
        for arg in launch.args:
            if isinstance(arg, Pointer):
                start, size = self._place(launch, arg, buffers)
                args.append(start + arg.offset)
                bases = [int(slot) for slot in buffers["slots", ""]] if arg.space == "state" else [0]
                for at in bases:
                    if at + arg.offset + arg.nbytes > size:
                        raise EmitError(f"{launch.kernel}: {arg} ends behind the {size} bytes of its buffer")
                    ranges.append((start + at + arg.offset, start + at + arg.offset + arg.nbytes))
            else:
                args.append(arg)
        return {
            "kernel": launch.kernel, "constexprs": dict(launch.constexprs), "grid": launch.grid,
            "signature": launch.signature(), "args": args, "ranges": ranges,
        }  # fmt: skip

    def _place(self, launch: Launch, arg: Pointer, buffers: Buffers) -> tuple[int, int]:
        key = (arg.space, arg.name)
        if key not in buffers:
            raise EmitError(f"{launch.kernel} reads {key}, which is not among the buffers {sorted(buffers)}")
        array = buffers[key]
        start = array.__array_interface__["data"][0] - self._base.__array_interface__["data"][0]
        if not 0 <= start <= self._used or not array.flags.c_contiguous:
            raise EmitError(f"the buffer {key} is not one of this interpreter", fix="allocate it with `array` or `put`")
        return start, array.nbytes

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise KernelError(f"the interpreter ended while it ran {request['kernel']}", where="triton interpreter")
        failure = json.loads(answer)
        if failure:
            raise KernelError(f"{request['kernel']}: {failure['error']}", where="triton interpreter")

    def close(self) -> None:
        """Ends the child; arrays stay readable."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._file.close()

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
