"""The file that speaks to the driver, over a stand-in for cuda-bindings that writes down every call: what is asked for,
in which order, and what each kind of failure becomes. Nothing here ran on a GPU."""

import ctypes
import subprocess
import sys
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

from tmlc.errors import CapacityError, DeviceError, KernelError, TargetError
from tmlc.runtimes.cuda.driver import Address, KernelLaunch
from tmlc.runtimes.cuda.nvidia import NvidiaDriver, load_bindings

MB = 1 << 20


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_OPERATING_SYSTEM = 304
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_TENSOR_MEMORY_LEAK = 721
    CUDA_ERROR_SYSTEM_NOT_READY = 802
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_UNKNOWN = 999


class Bindings:
    """The calls that the runtime makes, with their results in the order of cuda-bindings."""

    def __init__(self, **values):
        self.values = {"version": 12080, "sm": (9, 0), "free": 100 * MB, **values}
        self.log, self.fail, self.kept = [], {}, []
        self.CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
        )
        self.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        self.CUevent_record_flags = SimpleNamespace(CU_EVENT_RECORD_DEFAULT=0, CU_EVENT_RECORD_EXTERNAL=1)
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args):
            self.log.append((name, *args))
            failed = self.fail.get(name, Result.CUDA_SUCCESS)
            if failed:
                failed = Result(failed)  # as cuda-bindings does: ValueError for what it has no name for
                return (failed, *[None] * 2)
            return (Result.CUDA_SUCCESS, *self._answer(name, args))

        return call

    def _answer(self, name, args):
        if name == "cuMemHostAlloc":
            self.kept.append(ctypes.create_string_buffer(args[0]))
            return (ctypes.addressof(self.kept[-1]),)
        if name == "cuMemAlloc":
            return (0x1000 * (len(self.log) + 1),)
        fixed = {
            "cuDriverGetVersion": (self.values["version"],), "cuDeviceGetName": (b"Test GPU\0\0",),
            "cuMemGetInfo": (self.values["free"], 2 * self.values["free"]), "cuEventElapsedTime": (2.5,),
        }  # fmt: skip
        if name == "cuDeviceGetAttribute":
            return (self.values["sm"][args[0] - 75],)
        return fixed.get(name, (f"<{name[2:]}>",))

    def names(self):
        return [entry[0] for entry in self.log]


@pytest.fixture
def bindings():
    return Bindings()


def test_what_the_driver_says_of_the_device(bindings):
    driver = NvidiaDriver(bindings)
    assert (driver.info.name, driver.info.architecture, driver.info.driver) == ("Test GPU", 90, 12080)
    assert driver.memory() == (100 * MB, 200 * MB)


def test_a_launch_passes_arguments_with_the_types_of_its_signature(bindings):
    driver = NvidiaDriver(bindings)
    function = driver.load(b"cubin", "kernel", 1000)
    assert "cuFuncSetAttribute" not in bindings.names()
    args = (Address(0x7000, "arena", 64), 5, 2**40, 0.5)
    driver.launch(KernelLaunch(function, "v", (3, 2, 1), 128, 1000, ("*fp32:16", "i32", "i64:16", "fp32"), args, 2))
    name, f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra = bindings.log[-1]
    assert (name, f, gx, gy, gz, bx, by, bz, shared, extra) == (
        "cuLaunchKernel", "<ModuleGetFunction>", 3, 2, 1, 128, 1, 1, 1000, 0
    )  # fmt: skip
    assert stream == "<StreamCreate>"
    assert parameters[0] == (0x7000, 5, 2**40, 0.5, 0, 0)
    void = ctypes.c_void_p
    assert parameters[1] == (void, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, void, void)


def test_a_launch_may_begin_before_the_one_before_has_ended(bindings):
    bindings.CUlaunchConfig = SimpleNamespace
    bindings.CUlaunchAttribute = lambda: SimpleNamespace(id=None, value=SimpleNamespace())
    bindings.CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    driver = NvidiaDriver(bindings)
    driver.launch(KernelLaunch("f", "v", (3, 2, 1), 128, 1000, ("i32",), (5,), 0, True))
    name, config, function, parameters, extra = bindings.log[-1]
    assert (name, function, extra) == ("cuLaunchKernelEx", "f", 0) and parameters[0] == (5,)
    assert (config.gridDimX, config.gridDimY, config.blockDimX, config.sharedMemBytes) == (3, 2, 128, 1000)
    (attribute,) = config.attrs
    assert config.numAttrs == 1 and config.hStream == "<StreamCreate>" and attribute.id == 6
    assert attribute.value.programmaticStreamSerializationAllowed == 1


def test_much_shared_memory_is_asked_for(bindings):
    NvidiaDriver(bindings).load(b"cubin", "kernel", 100_000)
    assert bindings.log[-1] == ("cuFuncSetAttribute", "<ModuleGetFunction>", 8, 100_000)


def test_a_graph_is_captured_on_the_stream_and_replayed(bindings):
    driver = NvidiaDriver(bindings)
    before = len(bindings.log)
    buffer = driver.host_buffer(64)
    graph = driver.capture(lambda: (driver.to_device(0x5000, buffer), driver.to_host(buffer, 0x6000)))
    driver.replay(graph)
    driver.synchronize()
    assert bindings.names()[before + 1 :] == [
        "cuStreamBeginCapture", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamEndCapture", "cuGraphInstantiate",
        "cuGraphDestroy", "cuGraphUpload", "cuGraphLaunch", "cuStreamSynchronize",
    ]  # fmt: skip
    assert bindings.log[-2][1:] == ("<GraphInstantiate>", "<StreamCreate>")


def test_a_capture_that_fails_ends(bindings):
    driver = NvidiaDriver(bindings)
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: 1 // 0)
    assert bindings.names()[-1] == "cuStreamEndCapture"


def test_memory_is_cleared_when_it_is_reserved_and_freed_on_close(bindings):
    driver = NvidiaDriver(bindings)
    address = driver.allocate(4096)
    assert bindings.log[-1][:4] == ("cuMemsetD8Async", address, 0, 4096)
    driver.host_buffer(16)
    driver.load(b"cubin", "kernel", 0)
    kept, gone = driver.capture(lambda: None), driver.capture(lambda: None)
    driver.forget(gone)
    driver.close()
    driver.close()
    names = bindings.names()
    for freed in ("cuMemFree", "cuMemFreeHost", "cuModuleUnload", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"):
        assert names.count(freed) == 1, freed
    assert kept and [entry for entry in bindings.log if entry[0] == "cuGraphExecDestroy"] == [
        ("cuGraphExecDestroy", gone), ("cuGraphExecDestroy", kept)
    ]  # fmt: skip
    assert names.index("cuGraphExecDestroy") < names.index("cuMemFree") < names.index("cuModuleUnload")


def test_no_device_is_one_clear_error(bindings):
    bindings.fail["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
    with pytest.raises(TargetError, match=r"shows no device.*\n  check nvidia-smi"):
        NvidiaDriver(bindings)


def test_too_old_a_driver_is_one_clear_error():
    with pytest.raises(TargetError, match=r"supports CUDA 11\.4, this runtime needs 12\.0.*\n  update the driver"):
        NvidiaDriver(Bindings(version=11040))


@pytest.mark.parametrize(
    ("call", "result", "fix"),
    [
        ("cuInit", Result.CUDA_ERROR_SYSTEM_NOT_READY, "nvidia-fabricmanager"),
        ("cuInit", Result.CUDA_ERROR_UNKNOWN, "nvidia_uvm"),
        ("cuInit", Result.CUDA_ERROR_OPERATING_SYSTEM, "/dev/nvidia"),
        ("cuInit", Result.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "reboot"),
        ("cuDevicePrimaryCtxRetain", Result.CUDA_ERROR_DEVICE_UNAVAILABLE, "nvidia-smi -q -d COMPUTE"),
        ("cuStreamCreate", Result.CUDA_ERROR_INVALID_VALUE, "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start_is_one_clear_error(bindings, call, result, fix):
    """And leaves no context behind."""
    bindings.fail[call] = result
    with pytest.raises(TargetError, match=result.name) as caught:
        NvidiaDriver(bindings)
    assert fix in caught.value.fix
    names = bindings.names()
    opened = "cuDevicePrimaryCtxRetain" in names and call != "cuDevicePrimaryCtxRetain"
    assert ("cuDevicePrimaryCtxRelease" in names) == opened and "cuStreamDestroy" not in names


def test_no_memory_for_a_context_is_an_error_of_capacity(bindings):
    bindings.fail["cuDevicePrimaryCtxRetain"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(CapacityError, match="not the memory to open a context"):
        NvidiaDriver(bindings)


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuMemsetD8Async"])
@pytest.mark.parametrize("result", [Result.CUDA_ERROR_TENSOR_MEMORY_LEAK, 4321])
def test_what_ends_the_context_loses_the_device_whether_the_bindings_know_its_name_or_not(bindings, call, result):
    driver = NvidiaDriver(bindings)
    bindings.fail[call] = result
    with pytest.raises(DeviceError, match=str(int(result)) if result == 4321 else "TENSOR_MEMORY_LEAK") as caught:
        driver.replay("graph"), driver.zero(0x4000, 8)
    assert caught.value.fix.startswith("restart the process")


@pytest.mark.parametrize("call", ["cuStreamSynchronize", "cuEventSynchronize"])
def test_whatever_a_wait_answers_is_of_what_ran_and_loses_the_device(bindings, call):
    driver = NvidiaDriver(bindings)
    bindings.fail[call] = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        driver.synchronize(), driver.timed(lambda: None)


def test_a_driver_that_does_not_start_for_an_unknown_reason_is_there_all_the_same(bindings):
    bindings.fail["cuInit"] = 4321
    with pytest.raises(TargetError, match=r"the NVIDIA driver does not start: .*4321.*\n  see nvidia-smi") as caught:
        NvidiaDriver(bindings)
    assert "no NVIDIA driver" not in str(caught.value)


@pytest.mark.parametrize("result", [Result.CUDA_ERROR_ILLEGAL_ADDRESS, 4321])
def test_a_failed_kernel_loses_the_device_and_closing_it_raises_nothing(bindings, result):
    driver = NvidiaDriver(bindings)
    driver.allocate(64)
    bindings.fail = dict.fromkeys(("cuStreamSynchronize", "cuMemFree"), result)
    with pytest.raises(DeviceError, match=str(int(result)) if result == 4321 else "ILLEGAL_ADDRESS"):
        driver.synchronize()
    driver.close()
    assert "cuDevicePrimaryCtxRelease" in bindings.names()


@pytest.mark.parametrize(
    ("call", "result", "error", "match"),
    [
        ("cuMemAlloc", Result.CUDA_ERROR_OUT_OF_MEMORY, CapacityError, "not the memory to reserve 77 bytes"),
        ("cuModuleLoadData", Result.CUDA_ERROR_NO_BINARY_FOR_GPU, TargetError, "refuses the machine code"),
        ("cuGraphLaunch", Result.CUDA_ERROR_INVALID_VALUE, KernelError, "cannot start a graph: CUDA_ERROR_INVALID"),
    ],
)
def test_what_each_failure_becomes(bindings, call, result, error, match):
    driver = NvidiaDriver(bindings)
    bindings.fail[call] = result
    with pytest.raises(error, match=match) as raised:
        driver.allocate(77), driver.load(b"", "kernel", 0), driver.replay("graph")
    assert not isinstance(raised.value, DeviceError) and raised.value.fix


def test_events_time_what_the_device_does(bindings):
    driver = NvidiaDriver(bindings)
    assert driver.timed(lambda: driver.zero(0x4000, 8)) == 2.5e-3
    assert bindings.names()[-4:] == ["cuMemsetD8Async", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"]


def test_the_device_is_busy_with_what_is_ahead_when_its_clock_starts(bindings):
    """It passes the first event when that is done, and by then the host has asked for what is timed."""
    driver = NvidiaDriver(bindings)
    driver.timed(lambda: driver.zero(0x4000, 8), ahead=lambda: driver.replay("graph"))
    assert bindings.names()[-6:-2] == ["cuGraphLaunch", "cuEventRecord", "cuMemsetD8Async", "cuEventRecord"]


def test_missing_bindings_name_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(TargetError, match=r"needs cuda-bindings.*\n  install it with: pip install 'tmlc\[cuda\]'"):
        load_bindings()


def test_without_a_driver_the_real_bindings_give_one_clear_error():
    bindings = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    try:
        there = int(bindings.cuInit(0)[0]) == 0
    except Exception:
        there = False
    if there:
        pytest.skip("this machine has a GPU")
    with pytest.raises(TargetError, match=r"no NVIDIA driver|shows no device"):
        NvidiaDriver()


def test_the_calls_are_those_that_cuda_bindings_has(bindings):
    real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    driver = NvidiaDriver(bindings)
    driver.capture(lambda: driver.copy(0x10, 0x20, 8)), driver.replay("g"), driver.timed(lambda: None)
    driver.allocate(8), driver.host_buffer(8), driver.load(b"", "k", 99999), driver.memory()
    driver.to_device(1, np.zeros(1, np.uint8)), driver.to_host(np.zeros(1, np.uint8), 1), driver.close()
    assert not [name for name in bindings.names() if not callable(getattr(real, name, None))]
    for group in ("CUdevice_attribute", "CUstream_flags", "CUstreamCaptureMode", "CUfunction_attribute"):
        assert all(hasattr(getattr(real, group), name) for name in vars(getattr(bindings, group)))
    from tmlc.runtimes.cuda import nvidia

    later = {"CUDA_ERROR_CONTAINED", "CUDA_ERROR_TENSOR_MEMORY_LEAK"}  # than the oldest bindings that are allowed
    assert {name for name in (*nvidia._FATAL, *nvidia._STARTING) if not hasattr(real.CUresult, name)} <= later
    with pytest.raises(ValueError, match="4321"):
        real.CUresult(4321)


def test_loading_a_package_brings_in_no_compiler(tiny):
    """Serving needs neither PyTorch nor Triton: a fresh interpreter opens a GPU's package and comes as far as the
    driver (or, on a machine with a GPU, as the machine code, which is none in these tests)."""
    code = f"""
import sys
import tmlc
import tmlc.runtimes.cuda.backend, tmlc.runtimes.cuda.nvidia
try:
    tmlc.load({str(tiny.gpu)!r})
except tmlc.TmlcError as error:
    print(error.what)
heavy = {{"torch", "triton", "onnx", "pydantic", "rich", "yaml", "click", "transformers", "tmlc.ir", "tmlc.passes",
         "tmlc.pipeline", "tmlc.frontend", "tmlc.emit", "tmlc.compiler"}}
kernels = {{name for name in sys.modules if name.startswith("tmlc.kernels.triton.")}}
print(sorted(heavy & set(sys.modules) | kernels - {{"tmlc.kernels.triton.architectures"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, modules = done.stdout.strip().splitlines()
    assert modules == "[]" and said
