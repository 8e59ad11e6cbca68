"""Memory that stands for a GPU's, and what runs launches over it: what is refused, and what to do then."""

from dataclasses import replace

import numpy as np
import pytest

from tmlc.errors import EmitError, KernelError
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.host_memory import HostMemory
from tmlc.kernels.triton.launch import Launch, Operand, Pointer
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.worker import open_interpreter

ROWS, COLS = 4, 32


def silu() -> Launch:
    x, out = (Operand(space, "f32", (1, 0), COLS, COLS) for space in ("input", "output"))
    (launch,) = lower(Call("silu", {"x": x}, {}, (out,), Bucket(1, ROWS), 90)).launches
    return launch


def test_memory_that_is_used_up_says_how_to_get_more():
    memory = HostMemory(4096)
    memory.array((ROWS, COLS), np.float32)
    with pytest.raises(EmitError, match="do not fit into the 4096") as caught:
        memory.array((1024,), np.float32)
    assert "`nbytes`" in caught.value.fix and "`release`" in caught.value.fix
    memory.close()


def test_buffers_that_are_missing_or_too_small_are_named():
    memory = HostMemory(1 << 16)
    x, out = memory.array((ROWS, COLS), np.float32), memory.array((ROWS - 1, COLS), np.float32)
    with pytest.raises(EmitError, match="not among the buffers") as caught:
        memory.places(silu(), {("input", ""): x})
    assert caught.value.fix == "give an array of this memory under ('output', '')"
    with pytest.raises(EmitError, match="ends behind the 384 bytes") as caught:
        memory.places(silu(), {("input", ""): x, ("output", ""): out})
    assert "larger buffer" in caught.value.fix
    with pytest.raises(EmitError, match="not in this memory") as caught:
        memory.places(silu(), {("input", ""): np.zeros((ROWS, COLS), np.float32), ("output", ""): x})
    assert caught.value.fix == "allocate it with `array` or `put`"
    memory.close()


def test_a_kernel_that_leaves_its_operands_is_stopped_with_what_to_do(machine):
    mark = machine.mark()
    buffers = {(space, ""): machine.array((ROWS, COLS), np.float32) for space in ("input", "output")}
    whole = silu()
    short = [replace(arg, nbytes=64) if isinstance(arg, Pointer) else arg for arg in whole.args]
    with pytest.raises(KernelError, match=r"^elementwise_kernel: .*outside") as caught:
        machine.run([replace(whole, args=tuple(short))], buffers)
    assert caught.value.where in ("triton interpreter", *(f"PTX for sm{sm}" for sm in (80, 90, 100, 120)))
    assert caught.value.fix.startswith("correct the kernel")
    machine.run([whole], buffers)  # it goes on
    machine.release(mark)


def test_an_interpreter_that_is_gone_is_one_error_that_says_what_to_do():
    with open_interpreter(1 << 16) as machine:
        buffers = {(space, ""): machine.array((ROWS, COLS), np.float32) for space in ("input", "output")}
        machine._child.kill()
        machine._child.wait()
        with pytest.raises(KernelError, match="ended while it ran elementwise_kernel") as caught:
            machine.run([silu()], buffers)
        assert "more memory" in caught.value.fix
