"""What the runtime asks of a GPU and of TensorRT: the handful of calls that a test replaces by a stand-in in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tmlc.runtimes.tensorrt.plan import Plan


@dataclass(frozen=True, slots=True)
class EngineBinding:
    """A binding as the engine itself reports it; -1 is a dimension that depends on n."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    output: bool
    aliases: str = ""  # the input whose memory an output is


class LoadedEngine(ABC):
    """One engine on the device.

    Attributes:
        bindings: by name, as the engine reports them.
        profiles: number of its optimization profiles.
        scratch_bytes: device memory that a run needs; one piece serves all engines, since runs follow each other.
        code_bytes: device memory of the engine itself, as near as is known.
    """

    bindings: Mapping[str, EngineBinding]
    profiles: int
    scratch_bytes: int
    code_bytes: int

    @abstractmethod
    def bounds(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and largest shape of an input in a profile."""

    @abstractmethod
    def prepare(self, scratch: int) -> None:
        """Makes what a run of each profile needs, with scratch memory at that address."""

    @abstractmethod
    def run(self, profile: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Starts a run behind what was started before. Raises KernelError when it cannot be started."""

    @abstractmethod
    def report_layers(self, report: Callable[[str, float], None] | None) -> None:
        """Tells of each layer of every run from here on, by its name, how many milliseconds it took; None: no more.
        A run then waits until it is done."""

    @abstractmethod
    def close(self) -> None:
        """Frees the engine."""


class Device(ABC):
    """One GPU. Everything that is started on it happens in the order of the calls.

    Attributes:
        name: for reports.
        architecture: "sm89".
    """

    name: str
    architecture: str

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of zeroed device memory, at a multiple of 256. Raises CapacityError."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Gives memory back."""

    @abstractmethod
    def upload(self, address: int, array: np.ndarray) -> None:
        """Starts a copy of a dense array to the device; the array may be changed after `wait`."""

    @abstractmethod
    def download(self, array: np.ndarray, address: int) -> None:
        """Starts a copy from the device into a dense array, which holds it after `wait`."""

    @abstractmethod
    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Starts a copy inside the device."""

    @abstractmethod
    def zero(self, address: int, nbytes: int) -> None:
        """Starts filling memory with zeros."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything that was started is done. Raises KernelError when some of it failed."""

    @abstractmethod
    def host_buffer(self, nbytes: int) -> np.ndarray:
        """uint8 memory of this machine that copies to and from the device can use directly."""

    @abstractmethod
    def keep_kernels(self, known: bytes | None) -> None:
        """From now on keeps what is compiled for engines that are prepared, beginning with what was kept before.
        Kernels that do not fit this GPU, driver or library are left out."""

    @abstractmethod
    def kernels(self) -> bytes:
        """What was kept."""

    @abstractmethod
    def load(self, data: bytes, name: str) -> LoadedEngine:
        """An engine from its serialised form. Raises PackageError when TensorRT refuses it."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the device."""


def open_device(plan: Plan) -> Device:
    """The GPU of this machine with the library that built the plan.

    Raises:
        TargetError: no library, another version of it, no driver, no GPU, or one of another architecture.
    """
    from tmlc.runtimes.tensorrt.cuda import CudaDevice, open_library

    return CudaDevice(open_library(plan), plan)
