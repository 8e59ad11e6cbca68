"""What the runtime asks of a GPU: memory, modules, one stream, graphs. One implementation speaks to the driver
(`nvidia.py`); tests have one in host memory.

Everything but the last copies of a call is asynchronous and in order. Any thread may call: `activate` first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What to do about a device that is lost.
RESTART = "restart the process: CUDA answers nothing else in this one"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The device, as the driver describes it.

    Attributes:
        name: of the product.
        architecture: compute capability, 90 for 9.0.
        driver: what it supports, 12080 for CUDA 12.8.
    """

    name: str
    architecture: int
    driver: int


@dataclass(frozen=True, slots=True)
class Address:
    """A pointer argument: an address, and the plan's word on what a launch touches behind it. Only an implementation
    that checks looks at `space` and `nbytes`."""

    value: int
    space: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch, bound to addresses.

    Attributes:
        function: what `Driver.function` gave.
        variant: its name, for errors.
        args: addresses, integers and floats, as `signature` types them (`*fp32:16`, `i32`, `i64`, `fp32`).
        hidden: null pointers that follow the arguments.
        overlap: the kernel waits for the one before it by itself, so it may begin before that one has ended.
    """

    function: Any
    variant: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    signature: tuple[str, ...]
    args: tuple[Address | int | float, ...]
    hidden: int
    overlap: bool = False


class Driver(ABC):
    """One device, one context, one stream.

    Methods raise DeviceError when the device failed and everything on it is lost (from then on each of them does),
    KernelError for a launch that was refused, CapacityError where memory is short.
    """

    info: DeviceInfo

    @abstractmethod
    def activate(self) -> None:
        """Makes the context current on the calling thread."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of device memory."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of zeroed device memory, at a multiple of 256."""

    @abstractmethod
    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory, uint8[nbytes]; freed by `close`."""

    @abstractmethod
    def load(self, cubin: bytes, entry: str, shared: int) -> Any:
        """A kernel of some machine code, allowed to use `shared` bytes of dynamic shared memory."""

    @abstractmethod
    def to_device(self, address: int, host: np.ndarray) -> None:
        """Copies a contiguous array; page-locked memory is read later, in the order of the stream."""

    @abstractmethod
    def to_host(self, host: np.ndarray, address: int) -> None:
        """Copies into a contiguous array, as `to_device`."""

    @abstractmethod
    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copies inside device memory."""

    @abstractmethod
    def zero(self, address: int, nbytes: int) -> None:
        """Fills device memory with zeros."""

    @abstractmethod
    def launch(self, launch: KernelLaunch) -> None:
        """Starts a kernel."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of everything that `work` asks of this driver, in place on the device; nothing of it is run. Freed by
        `close`."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Runs a graph."""

    @abstractmethod
    def forget(self, graph: Any) -> None:
        """Frees a graph that is not running."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all that was asked for is done."""

    @abstractmethod
    def timed(self, work: Callable[[], None], ahead: Callable[[], None] | None = None) -> float:
        """Seconds that the device takes for what `work` asks of this driver, by its own clock.

        `ahead` is asked for before the clock starts: while the device is busy with it, the host asks for `work`.
        Without it an idle device waits for the host, and that counts.
        """

    @abstractmethod
    def mark(self) -> Any:
        """A mark behind what was asked for so far, in a graph too: it holds when the device came by it last. Freed by
        `close`."""

    @abstractmethod
    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two marks, once the device has come by both and all is done."""

    @abstractmethod
    def close(self) -> None:
        """Frees everything; raises nothing, also when the device is lost. Twice does nothing."""
