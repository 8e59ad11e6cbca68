"""The CUDA driver through `cuda-bindings`: one device, its primary context, one stream.

This file only translates. The project's tests have no GPU; docs/triton.md says what ran on one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tmlc.errors import CapacityError, DeviceError, KernelError, TargetError
from tmlc.runtimes.cuda.driver import RESTART, Address, DeviceInfo, Driver, KernelLaunch

LEAST_DRIVER = 12000  # what the calls of this file need
STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may use without asking

#: Results after which the context answers nothing but the same: the device, or what was on it, is lost.
_FATAL = frozenset({
    "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_TIMEOUT", "CUDA_ERROR_ASSERT", "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_MISALIGNED_ADDRESS", "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_UNKNOWN",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE", "CUDA_ERROR_CONTEXT_IS_DESTROYED", "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_CONTAINED", "CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_TENSOR_MEMORY_LEAK", "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
})  # fmt: skip
#: What to do about a driver that does not start, where it is known.
_STARTING = {
    "CUDA_ERROR_SYSTEM_NOT_READY": "start nvidia-fabricmanager, which GPUs behind an NVSwitch wait for",
    "CUDA_ERROR_UNKNOWN": "load the kernel module nvidia_uvm, or restart the container that lost its devices",
    "CUDA_ERROR_OPERATING_SYSTEM": "give this user access to the devices /dev/nvidia*",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "end the process that has the device for itself: nvidia-smi -q -d COMPUTE says "
    "whether it is lent to one alone",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot, or install the driver again",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "install the driver itself, not its compatibility package",
}


class Answers:
    """The calls of a module of cuda-bindings. It has no name for what a newer driver answers and raises ValueError
    then, which is a lost device here."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name.startswith("cu"):
            found = self._named(found, name)
        setattr(self, name, found)
        return found

    @staticmethod
    def _named(call: Callable[..., tuple[Any, ...]], name: str) -> Callable[..., tuple[Any, ...]]:
        def answered(*args: Any) -> tuple[Any, ...]:
            try:
                return call(*args)
            except ValueError as error:
                what = f"the GPU failed: {name}: {error}"
                raise DeviceError(what, where="cuda runtime", fix=f"{RESTART}; update cuda-bindings") from error

        return answered


def load_bindings() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        TargetError: it is not installed; says how to install it.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TargetError(
            "target triton needs cuda-bindings, which is not installed",
            where="cuda runtime",
            fix="install it with: pip install 'tmlc[cuda]'",
        ) from error
    return driver


class NvidiaDriver(Driver):
    """The first device that the driver shows.

    Args:
        bindings: the module that speaks to the driver; None imports cuda-bindings.

    Raises (when made):
        TargetError: no bindings, no driver, one that is too old or does not start, or no device that is free.
        CapacityError: the device has not the memory for a context.
    """

    def __init__(self, bindings: Any = None) -> None:
        self._c = Answers(bindings if bindings is not None else load_bindings())
        self._closed = self._ready = self._capturing = False
        self._held: list[int] = []
        self._pinned: list[int] = []
        self._modules: list[Any] = []
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        self._stream: Any = None
        version = self._start()
        _, self._device = self._must(self._c.cuDeviceGet(0), "find a device")
        self._context = self._must(self._c.cuDevicePrimaryCtxRetain(self._device), "open a context")[1]
        try:
            self._describe(version)
        except BaseException:
            self.close()
            raise
        self._ready = True

    def _describe(self, version: int) -> None:
        """What the device is, and what every call needs."""
        self.activate()
        kinds = self._c.CUdevice_attribute
        major, minor = (
            int(self._must(self._c.cuDeviceGetAttribute(kind, self._device), "describe the device")[1])
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
            )
        )  # fmt: skip
        raw = self._must(self._c.cuDeviceGetName(128, self._device), "describe the device")[1]
        name = bytes(raw).split(b"\0")[0].decode(errors="replace").strip()
        self.info = DeviceInfo(name, 10 * major + minor, version)
        flags = self._c.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._must(self._c.cuStreamCreate(flags), "make a stream")[1]
        self._events += [self._must(self._c.cuEventCreate(0), "make an event")[1] for _ in range(2)]

    def _start(self) -> int:
        """Starts the driver; its version."""
        nothing = TargetError(
            "this machine has no NVIDIA driver",
            where="cuda runtime",
            fix="use the package on a machine with an NVIDIA GPU and its driver; here, compile for another target",
        )
        try:
            result = self._c.cuInit(0)[0]
        except DeviceError as error:
            what = f"the NVIDIA driver does not start: {error.what}"
            fix = "see nvidia-smi and dmesg; update cuda-bindings"
            raise TargetError(what, where="cuda runtime", fix=fix) from error
        except Exception as error:  # cuda-bindings: the driver's library is not there
            raise nothing from error
        if result.name in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY"):
            raise TargetError(
                "the NVIDIA driver shows no device",
                where="cuda runtime",
                fix="check nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        self._must((result,), "start")
        version = int(self._must(self._c.cuDriverGetVersion(), "ask for the driver's version")[1])
        if version < LEAST_DRIVER:
            raise TargetError(
                f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}, this runtime needs "
                f"{LEAST_DRIVER // 1000}.{LEAST_DRIVER % 1000 // 10}",
                where="cuda runtime",
                fix="update the driver",
            )
        return version

    def _must(self, result: tuple[Any, ...], what: str, waited: bool = False) -> tuple[Any, ...]:
        """The result of a call of the driver. Raises what `Driver` says, TargetError while the driver starts.

        Args:
            waited: the call waited for what was asked for before, so what it answers is of that, and ends the context.
        """
        code = result[0]
        if int(code) == 0:
            return result
        name = code.name
        if name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise CapacityError(f"the GPU has not the memory to {what}", where="cuda runtime", fix="free the device")
        if not self._ready:
            fix = _STARTING.get(name, "see nvidia-smi and dmesg")
            raise TargetError(f"the NVIDIA driver cannot {what}: {name}", where="cuda runtime", fix=fix)
        if waited or name in _FATAL:
            raise DeviceError(f"the GPU failed: cannot {what}: {name}", where="cuda runtime", fix=RESTART)
        if name in ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
            raise TargetError(
                f"the driver refuses the machine code: cannot {what}: {name}",
                where="cuda runtime",
                fix="update the driver, or compile for this architecture",
            )
        raise KernelError(
            f"the CUDA driver cannot {what}: {name}",
            where="cuda runtime",
            fix="load the package again; if it stays so, see dmesg",
        )

    def activate(self) -> None:
        self._must(self._c.cuCtxSetCurrent(self._context), "use the context")

    def memory(self) -> tuple[int, int]:
        _, free, total = self._must(self._c.cuMemGetInfo(), "ask for free memory")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        address = int(self._must(self._c.cuMemAlloc(nbytes), f"reserve {nbytes} bytes")[1])
        self._held.append(address)
        self.zero(address, nbytes)
        return address

    def host_buffer(self, nbytes: int) -> np.ndarray:
        address = int(self._must(self._c.cuMemHostAlloc(nbytes, 0), f"lock {nbytes} bytes of the host")[1])
        self._pinned.append(address)
        out: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        out[:] = 0
        return out

    def load(self, cubin: bytes, entry: str, shared: int) -> Any:
        module = self._must(self._c.cuModuleLoadData(cubin), f"load {entry}")[1]
        self._modules.append(module)
        function = self._must(self._c.cuModuleGetFunction(module, entry.encode()), f"find {entry}")[1]
        if shared > STATIC_SHARED:
            kind = self._c.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            what = f"give {entry} {shared} bytes of shared memory"
            self._must(self._c.cuFuncSetAttribute(function, kind, shared), what)
        return function

    def to_device(self, address: int, host: np.ndarray) -> None:
        if host.nbytes:
            copied = self._c.cuMemcpyHtoDAsync(address, host.ctypes.data, host.nbytes, self._stream)
            self._must(copied, "copy to the device")

    def to_host(self, host: np.ndarray, address: int) -> None:
        if host.nbytes:
            copied = self._c.cuMemcpyDtoHAsync(host.ctypes.data, address, host.nbytes, self._stream)
            self._must(copied, "copy to the host")

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._must(self._c.cuMemcpyDtoDAsync(to, source, nbytes, self._stream), "copy on the device")

    def zero(self, address: int, nbytes: int) -> None:
        self._must(self._c.cuMemsetD8Async(address, 0, nbytes, self._stream), "clear memory")

    def launch(self, launch: KernelLaunch) -> None:
        values = [arg.value if isinstance(arg, Address) else arg for arg in launch.args] + [0] * launch.hidden
        kinds = [_ctype(kind) for kind in launch.signature] + [ctypes.c_void_p] * launch.hidden
        if launch.overlap:
            started = self._c.cuLaunchKernelEx(self._config(launch), launch.function, (tuple(values), tuple(kinds)), 0)
        else:
            started = self._c.cuLaunchKernel(
                launch.function, *launch.grid, launch.threads, 1, 1, launch.shared, self._stream,
                (tuple(values), tuple(kinds)), 0,
            )  # fmt: skip
        self._must(started, f"start {launch.variant}")

    def _config(self, launch: KernelLaunch) -> Any:
        """What a launch says that may begin before the one before it has ended (programmatic dependent launch)."""
        config, attribute = self._c.CUlaunchConfig(), self._c.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, self._stream
        attribute.id = self._c.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def capture(self, work: Callable[[], None]) -> Any:
        mode = self._c.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._must(self._c.cuStreamBeginCapture(self._stream, mode), "capture a graph")
        self._capturing = True
        try:
            work()
        finally:
            self._capturing = False
            ended = self._c.cuStreamEndCapture(self._stream)
        graph = self._must(ended, "capture a graph")[1]
        try:
            made = self._must(self._c.cuGraphInstantiate(graph, 0), "make a graph")[1]
        finally:
            self._c.cuGraphDestroy(graph)
        self._graphs.append(made)
        # Otherwise its first replay would bring it to the device, and take longer for it.
        self._must(self._c.cuGraphUpload(made, self._stream), "bring a graph to the device")
        return made

    def replay(self, graph: Any) -> None:
        self._must(self._c.cuGraphLaunch(graph, self._stream), "start a graph")

    def forget(self, graph: Any) -> None:
        self._graphs.remove(graph)
        self._must(self._c.cuGraphExecDestroy(graph), "free a graph")

    def synchronize(self) -> None:
        self._must(self._c.cuStreamSynchronize(self._stream), "finish a call", waited=True)

    def timed(self, work: Callable[[], None], ahead: Callable[[], None] | None = None) -> float:
        begin, end = self._events[:2]
        if ahead is not None:
            ahead()
        self._must(self._c.cuEventRecord(begin, self._stream), "take the time")
        work()
        self._must(self._c.cuEventRecord(end, self._stream), "take the time")
        self._must(self._c.cuEventSynchronize(end), "take the time", waited=True)
        return self.elapsed(begin, end)

    def mark(self) -> Any:
        event = self._must(self._c.cuEventCreate(0), "make an event")[1]
        self._events.append(event)
        # In a capture a plain record would be no part of the graph.
        flags = self._c.CUevent_record_flags
        kind = flags.CU_EVENT_RECORD_EXTERNAL if self._capturing else flags.CU_EVENT_RECORD_DEFAULT
        self._must(self._c.cuEventRecordWithFlags(event, self._stream, int(kind)), "mark the time")
        return event

    def elapsed(self, begin: Any, end: Any) -> float:
        return float(self._must(self._c.cuEventElapsedTime(begin, end), "take the time")[1]) / 1e3

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Results are not looked at, known or not: on a lost device each call answers that it is lost. The context
        # outlives this where somebody else in the process has it too, and with it whatever is not freed here.
        steps: list[tuple[Callable[..., Any], Any]] = [(self._c.cuCtxSetCurrent, self._context)]
        steps += [(self._c.cuGraphExecDestroy, graph) for graph in self._graphs]
        steps += [(self._c.cuMemFree, address) for address in self._held]
        steps += [(self._c.cuMemFreeHost, address) for address in self._pinned]
        steps += [(self._c.cuModuleUnload, module) for module in self._modules]
        steps += [(self._c.cuEventDestroy, event) for event in self._events]
        steps += [] if self._stream is None else [(self._c.cuStreamDestroy, self._stream)]
        for call, what in [*steps, (self._c.cuDevicePrimaryCtxRelease, self._device)]:
            with suppress(DeviceError):
                call(what)


def _ctype(kind: str) -> Any:
    if kind.startswith("*"):
        return ctypes.c_void_p
    return {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind.removesuffix(":16")]
