"""The GPU through the driver API of `cuda-bindings`, and TensorRT through its Python module. Nothing else touches them.

Both are imported here and only here, when a TensorRT package is loaded.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from tmlc.errors import CapacityError, KernelError, PackageError, TargetError
from tmlc.runtimes.tensorrt.device import Device, EngineBinding, LoadedEngine
from tmlc.runtimes.tensorrt.plan import Plan

INSTALL = {"tensorrt_rtx": "pip install tensorrt-rtx=={}", "tensorrt": "pip install tensorrt=={}"}
INSTALL_CUDA = "pip install cuda-bindings"
AGAIN = "Compile the checkpoint again with this version of tmlc and TensorRT."
RELOAD = "load the package again; if it stays so, see dmesg"
REPORT = "This is a fault of tmlc: report it with the output of `tmlc doctor --json`."
MAJOR, MINOR = 75, 76  # attributes of a device: its compute capability


def open_library(plan: Plan) -> Any:
    """The TensorRT module that built the plan's engines, of the same version.

    Engines are for the version that built them, so anything else is refused before a byte of them is looked at.

    Raises:
        TargetError: it is not installed, does not load, or is another version.
    """
    fix = INSTALL[plan.library].format(plan.version if re.fullmatch(r"[\d.]+", plan.version) else "VERSION")
    try:
        module = import_module(plan.library)
    except ImportError as error:
        what = f"the package's engines need {plan.library} {plan.version[:40]}, which is not installed"
        if not isinstance(error, ModuleNotFoundError):
            what = f"{plan.library} is installed and does not load: {error}"
        raise TargetError(what, fix=f"Install it: {fix}") from error
    if str(module.__version__) != plan.version:
        built = f"{plan.library} {plan.version[:40]}"
        what = f"the package's engines were built with {built}, and this is {module.__version__}"
        raise TargetError(what, fix=f"Install that version ({fix}), or compile the checkpoint again.")
    return module


class CudaDevice(Device):
    """The first GPU, with one stream on which everything is started in order.

    Args:
        library: the TensorRT module.
        plan: what the engines were built for.
    """

    def __init__(self, library: Any, plan: Plan) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            what = "running TensorRT engines needs cuda-bindings, which is not installed"
            raise TargetError(what, fix=f"Install it: {INSTALL_CUDA}") from error
        self._driver, self._trt = driver, library
        self._closed = True
        self._open(plan)
        self._closed = False
        self._keep = False
        self._cache: Any = None
        self._known: bytes | None = None
        self._logger = _logger(library)
        self._runtime = library.Runtime(self._logger)

    def _open(self, plan: Plan) -> None:
        driver = self._driver
        try:
            self._do(driver.cuInit(0))
            self._device = self._do(driver.cuDeviceGet(0))
        except (KernelError, RuntimeError) as error:
            what = f"no NVIDIA GPU can be used here ({getattr(error, 'what', error)})"
            raise TargetError(what, fix="Run the package on a machine with the driver and a GPU.") from error
        major, minor = (
            self._do(driver.cuDeviceGetAttribute(driver.CUdevice_attribute(number), self._device))
            for number in (MAJOR, MINOR)
        )
        self.architecture = f"sm{major}{minor}"
        self.name = self._do(driver.cuDeviceGetName(128, self._device)).decode().rstrip("\0")
        if self.architecture != plan.architecture:
            raise TargetError(
                f"the package's engines are for {plan.architecture}, and {self.name} is {self.architecture}",
                fix=f"Compile the checkpoint with --target tensorrt:{self.architecture}.",
            )
        self._context = self._do(driver.cuDevicePrimaryCtxRetain(self._device))
        self._enter()
        self._stream = self._do(driver.cuStreamCreate(1))  # does not wait for the default stream

    def _do(self, answer: tuple[Any, ...]) -> Any:
        """What a call of the driver gives. Raises KernelError with the driver's own words."""
        code, *values = answer
        if int(code):
            text = self._driver.cuGetErrorString(code)[1]
            words = text.decode() if isinstance(text, bytes) else str(code)
            raise KernelError(f"the GPU refused: {words}", fix=RELOAD)
        return values[0] if len(values) == 1 else tuple(values)

    def _enter(self) -> None:
        """The context belongs to a thread; calls may come from any."""
        self._do(self._driver.cuCtxSetCurrent(self._context))

    def allocate(self, nbytes: int) -> int:
        self._enter()
        try:
            address = int(self._do(self._driver.cuMemAlloc(nbytes)))
        except KernelError as error:
            free, total = self._do(self._driver.cuMemGetInfo())
            what = f"{self.name} has {free} of {total} bytes free, and {nbytes} are needed"
            raise CapacityError(what, fix="load with fewer sessions, or free the GPU") from error
        self.zero(address, nbytes)
        return address

    def free(self, address: int) -> None:
        self._enter()
        self._driver.cuMemFree(address)

    def upload(self, address: int, array: np.ndarray) -> None:
        self._enter()
        self._do(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    def download(self, array: np.ndarray, address: int) -> None:
        self._enter()
        self._do(self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self._enter()
        self._do(self._driver.cuMemcpyDtoDAsync(to, source, nbytes, self._stream))

    def zero(self, address: int, nbytes: int) -> None:
        self._enter()
        self._do(self._driver.cuMemsetD8Async(address, 0, nbytes, self._stream))

    def wait(self) -> None:
        self._enter()
        self._do(self._driver.cuStreamSynchronize(self._stream))

    def host_buffer(self, nbytes: int) -> np.ndarray:
        self._enter()
        # Page-locked; it lives as long as the context, since views of it may be handed on.
        address = int(self._do(self._driver.cuMemHostAlloc(max(nbytes, 1), 0)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def load(self, data: bytes, name: str) -> LoadedEngine:
        self._enter()
        where = f"engine of {name}"
        if hasattr(self._runtime, "get_engine_validity"):
            validity, why = self._runtime.get_engine_validity(data)
            if validity == self._trt.EngineValidity.INVALID:
                raise PackageError(f"TensorRT refuses the engine: {_reasons(self._trt, why)}", where=where, fix=AGAIN)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            said = " ".join(self._logger.errors[-1:])[:300]
            raise PackageError(f"TensorRT refuses the engine: {said}", where=where, fix=AGAIN)
        return CudaEngine(self, self._trt, engine, len(data), self._stream)

    def keep_kernels(self, known: bytes | None) -> None:
        self._keep, self._known = True, known

    def runtime_cache(self, config: Any) -> Any:
        """TensorRT's cache, which the contexts of all engines share; None where nothing is kept."""
        if self._keep and self._cache is None:
            self._enter()  # it compares what is known with the device of this thread
            self._cache = config.create_runtime_cache()
            if self._known:
                self._cache.deserialize(self._known)  # False where it does not fit: then it stays empty
            self._known = None
        return self._cache

    def kernels(self) -> bytes:
        return b"" if self._cache is None else bytes(self._cache.serialize())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._cache = self._runtime = None
        self._enter()
        self._driver.cuStreamDestroy(self._stream)
        self._driver.cuDevicePrimaryCtxRelease(self._device)


class CudaEngine(LoadedEngine):
    """An engine of TensorRT with one execution context for each profile."""

    def __init__(self, device: CudaDevice, trt: Any, engine: Any, size: int, stream: Any) -> None:
        self._device, self._trt, self._engine, self._stream = device, trt, engine, stream
        self._contexts: list[Any] = []
        self._profiler: Any = None
        self.profiles = int(engine.num_optimization_profiles)
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.code_bytes = size
        dtypes = {trt.float32: "f32", trt.float16: "f16", trt.bfloat16: "bf16", trt.int32: "i32", trt.int64: "i64",
                  trt.uint8: "u8", trt.int8: "i8"}  # fmt: skip
        names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
        self.bindings = {
            name: EngineBinding(
                name,
                dtypes.get(engine.get_tensor_dtype(name), "unknown"),
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT,
                engine.get_aliased_input_tensor(name) or "",
            )
            for name in names
        }

    def bounds(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def prepare(self, scratch: int) -> None:
        trt = self._trt
        for profile in range(self.profiles):
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if hasattr(trt, "CudaGraphStrategy"):  # TensorRT for RTX captures and replays the graph itself
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
                # No kernels are compiled for a shape while ticks run, and no bits change when one is ready.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.NONE
                )
            cache = self._device.runtime_cache(config)
            if cache is not None and not config.set_runtime_cache(cache):
                raise KernelError("TensorRT takes no cache of kernels", fix="load without kernel_cache")
            context = self._engine.create_execution_context(config)
            if context is None:
                raise CapacityError("TensorRT cannot make an execution context", fix="free memory of the GPU")
            if self.scratch_bytes:
                context.set_device_memory(scratch, self.scratch_bytes)
            if not context.set_optimization_profile_async(profile, int(self._stream)):
                raise PackageError(f"the engine has no profile {profile}", fix=AGAIN)
            self._contexts.append(context)

    def run(self, profile: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._device._enter()
        context = self._contexts[profile]
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                what = f"TensorRT refuses shape {list(shape)} for {name} in profile {profile}"
                raise KernelError(what, fix=REPORT)
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise KernelError(f"TensorRT refuses the address of {name}", fix=REPORT)
        if not context.execute_async_v3(int(self._stream)):
            raise KernelError("TensorRT cannot start the engine", fix=RELOAD)

    def report_layers(self, report: Callable[[str, float], None] | None) -> None:
        profiler = None if report is None else _profiler(self._trt, report)
        for context in self._contexts:
            context.profiler = profiler
        self._profiler = profiler  # TensorRT holds no reference

    def close(self) -> None:
        self._contexts.clear()
        self._engine = None


def _profiler(trt: Any, report: Callable[[str, float], None]) -> Any:
    class Reporter(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return Reporter()


def _logger(trt: Any) -> Any:
    class Keeper(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Keeper()


def _reasons(trt: Any, bits: int) -> str:
    """The diagnostics of an engine that is not valid here, in words."""
    kinds = getattr(trt, "EngineInvalidityDiagnostics", None)
    members = kinds.__members__.items() if kinds is not None else ()
    named = [name.lower().replace("_", " ") for name, value in members if int(value) & int(bits)]
    return ", ".join(named) or "it gives no reason"
