"""A GPU in host memory: the driver interface of the cuda runtime, with Triton's interpreter, or the kernels' PTX run on
NumPy (kernels/triton/ptx/), behind its launches.

    with open_interpreter() as machine:
        backend = CudaBackend(package, "triton:sm90", HostDevice.of(package, machine))

So the runtime runs the very plan of a package, with its graphs, buffers and pointers, on a machine without a GPU.
Machine code is not run: a kernel is known by the digest of its machine code, and made again from its source. Every
launch may touch only the bytes that the plan names behind its pointers; the interpreter refuses everything else. Much
too slow to serve; for tests.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.emit.triton.build import frozen
from tmlc.errors import DeviceError, KernelError, PackageError
from tmlc.kernels.triton.launch import TRITON_NAMES, Argument, Launch, Pointer
from tmlc.kernels.triton.mode import PARAMETERS
from tmlc.kernels.triton.overlap import UNWRITTEN
from tmlc.kernels.triton.registry import load_kernels
from tmlc.kernels.triton.worker import Interpreter
from tmlc.package.reader import Package
from tmlc.runtimes.cuda.driver import Address, DeviceInfo, Driver, KernelLaunch
from tmlc.runtimes.cuda.plan import code_name

if TYPE_CHECKING:
    from tmlc.kernels.triton.ptx.host import PtxMachine

_DTYPES = {name: dtype for dtype, name in TRITON_NAMES.items()}
_POOL = ("state", "")
_SLOTS = ("slots", "")


@dataclass(frozen=True)
class Kernel:
    """What stands for a loaded kernel."""

    kernel: str
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int


class HostDevice(Driver):
    """One device.

    Args:
        machine: the interpreter, or the machine that runs PTX, and its memory; stays open.
        kernels: by sha256 of the machine code.
        info: what to present as.
        nbytes: of device memory.

    Attributes:
        fault: raised by the next thing that is asked for; a DeviceError by all that follow too.
        log: names of what was asked for, launches by their kernel; replays not unfolded.
    """

    def __init__(
        self, machine: Interpreter | PtxMachine, kernels: Mapping[str, Kernel], info: DeviceInfo, nbytes: int = 1 << 32
    ) -> None:
        self.info, self.machine, self.kernels, self.nbytes = info, machine, kernels, nbytes
        self.fault: Exception | None = None
        self.log: list[str] = []
        self.closed = False
        self._blocks: list[np.ndarray] = []
        self._recording: list[Callable[[], None]] | None = None

    @staticmethod
    def of(package: Package, machine: Interpreter | PtxMachine, sm: int = 90, **more: Any) -> HostDevice:
        """A device that runs the package's engine for an architecture.

        Raises:
            PackageError: a kernel of the package takes other arguments than the one here.
        """
        load_kernels()
        kernels = {}
        for v in package.json(code_name(sm))["variants"]:
            fixed = tuple(sorted((name, frozen(value)) for name, value in v["constexprs"].items()))
            here, given = PARAMETERS.get(v["kernel"], ()), {name for name, _ in fixed}
            if not given <= set(here) or len(here) != len(given) + len(v["signature"]):
                what = f"{v['kernel']} of the package takes other arguments than the kernel here, which stands for it"
                raise PackageError(what, where=str(package.path), fix="compile the package again")
            kernels[v["sha256"]] = Kernel(v["kernel"], fixed, v["num_warps"], v["num_stages"])
        return HostDevice(machine, kernels, DeviceInfo("a device in host memory", sm, 99000), **more)

    def _ask(self, what: str, work: Callable[[], None] | None = None) -> None:
        """Does something now, or keeps it for the graph that is being captured."""
        if self.closed:
            raise KernelError("the device is closed", where="host device", fix="make another with HostDevice.of")
        if self.fault is not None:
            fault = self.fault
            if not isinstance(fault, DeviceError):
                self.fault = None
            raise fault
        if work is None or self._recording is None:
            self.log.append(what)
        if work is not None and self._recording is not None:
            self._recording.append(work)
        elif work is not None:
            work()

    def activate(self) -> None:
        self._ask("activate")

    def memory(self) -> tuple[int, int]:
        return self.nbytes - sum(block.nbytes for block in self._blocks), self.nbytes

    def allocate(self, nbytes: int) -> int:
        self._ask("allocate")
        self._blocks.append(self.machine.bytes(nbytes))
        return _address(self._blocks[-1])

    def host_buffer(self, nbytes: int) -> np.ndarray:
        self._ask("host_buffer")
        return np.zeros(nbytes, np.uint8)

    def load(self, cubin: bytes, entry: str, shared: int) -> Kernel:
        self._ask("load")
        found = self.kernels.get(hashlib.sha256(cubin).hexdigest())
        if found is None:
            what = f"{entry} is machine code that this device was not told of"
            raise KernelError(what, where="host device", fix="make the device with HostDevice.of this very package")
        return found

    def to_device(self, address: int, host: np.ndarray) -> None:
        def work() -> None:
            self._bytes(address, host.nbytes)[:] = host.reshape(-1).view(np.uint8)

        self._ask("to_device", work)

    def to_host(self, host: np.ndarray, address: int) -> None:
        def work() -> None:
            host.reshape(-1).view(np.uint8)[:] = self._bytes(address, host.nbytes)

        self._ask("to_host", work)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        def work() -> None:
            self._bytes(to, nbytes)[:] = self._bytes(source, nbytes)

        self._ask("copy", work)

    def zero(self, address: int, nbytes: int) -> None:
        self._ask("zero", lambda: self._bytes(address, nbytes).fill(0))

    def launch(self, launch: KernelLaunch) -> None:
        self._ask(launch.function.kernel, lambda: self._interpret(launch))

    def capture(self, work: Callable[[], None]) -> Any:
        self._ask("capture")
        graph: list[Callable[[], None]] = []
        self._recording = graph
        try:
            work()
        finally:
            self._recording = None
        return graph

    def replay(self, graph: Any) -> None:
        self._ask("replay")
        for work in graph:
            work()

    def forget(self, graph: Any) -> None:
        graph.clear()

    def synchronize(self) -> None:
        self._ask("synchronize")

    def timed(self, work: Callable[[], None], ahead: Callable[[], None] | None = None) -> float:
        if ahead is not None:
            ahead()
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    def mark(self) -> Any:
        held = [0.0]

        def work() -> None:
            held[0] = time.perf_counter()

        self._ask("mark", work)
        return held

    def elapsed(self, begin: Any, end: Any) -> float:
        return float(end[0] - begin[0])

    def close(self) -> None:
        self.closed = True

    # Memory.

    def _block(self, address: int, nbytes: int) -> tuple[int, np.ndarray, int]:
        """Number, bytes and offset of the allocation that holds a range."""
        for number, block in enumerate(self._blocks):
            offset = address - _address(block)
            if 0 <= offset < block.nbytes or (offset == block.nbytes and not nbytes):
                if offset + nbytes > block.nbytes:
                    break
                return number, block, offset
        fix = "correct the plan or the runtime: on a GPU this would read or write what is not the engine's"
        raise KernelError(f"{nbytes} bytes at {address:#x} are no allocation's", where="host device", fix=fix)

    def _bytes(self, address: int, nbytes: int) -> np.ndarray:
        _, block, offset = self._block(address, nbytes)
        return block[offset : offset + nbytes]

    def _interpret(self, launch: KernelLaunch) -> None:
        """One launch, with pointers named by the allocations that they point into."""
        kernel: Kernel = launch.function
        buffers: dict[tuple[str, str], np.ndarray] = {}
        args: list[Argument] = []
        for arg, kind in zip(launch.args, launch.signature, strict=True):
            if not isinstance(arg, Address):
                args.append(arg)
                continue
            number, block, offset = self._block(arg.value, arg.nbytes)
            name = _POOL if arg.space == "state" else (arg.space if arg.space in UNWRITTEN else "scratch", str(number))
            buffers[name] = block
            if arg.space == "slots":
                buffers[_SLOTS] = block[offset : offset + arg.nbytes].view(np.int64)
            args.append(Pointer(*name, offset, _DTYPES[kind[1:].removesuffix(":16")], arg.nbytes))
        if _POOL in buffers and _SLOTS not in buffers:
            what = f"{launch.variant} reads states and gets no slots"
            raise KernelError(what, where="host device", fix="give the launch `call.slots` where its op is lowered")
        made = Launch(
            kernel.kernel, kernel.constexprs, kernel.num_warps, kernel.num_stages, launch.grid, tuple(args),
            launch.overlap,
        )  # fmt: skip
        self.machine.run([made], buffers, [tuple(launch.signature)])


def _address(block: np.ndarray) -> int:
    return int(block.__array_interface__["data"][0])
