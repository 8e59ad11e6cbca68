"""A GPU that is memory of this process, and engines that are networks run by the evaluator.

Everything but the chip takes part: the plan, the cutting of calls, slots, bindings, staging and the network itself.
"""

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from tmlc.emit.tensorrt.evaluate import Evaluation
from tmlc.emit.tensorrt.library import Library
from tmlc.emit.tensorrt.network import MethodNetwork, networks
from tmlc.emit.tensorrt.target import PLAN, engine_name, plan_of, profiles_of, slot_layout
from tmlc.errors import CapacityError, KernelError
from tmlc.ir.program import Program
from tmlc.package.manifest import StateInfo
from tmlc.runtimes.tensorrt.backend import TensorRTBackend
from tmlc.runtimes.tensorrt.device import Device, EngineBinding, LoadedEngine

POISON = 0xA5


class StandIn(Device):
    """Args: networks: by the bytes of the engine that a package names."""

    name, architecture = "stand-in", "sm89"

    def __init__(self, networks: Mapping[bytes, MethodNetwork], limit: int = 2**31) -> None:
        self.networks, self.limit = networks, limit
        self.held: dict[int, np.ndarray] = {}
        self.runs: list[tuple[str, int]] = []
        self.lost = False
        self.closed = 0
        self.driver = "driver 1"  # kernels of another are left out
        self.known: bytes | None = None
        self.compiled: list[bytes] = []  # kernels of this load, for each engine that was prepared
        self.keeps = False

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.limit:
            raise CapacityError(f"{nbytes} bytes are needed", fix="free the GPU")
        memory = np.zeros(nbytes + 256, np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        self.held[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.held[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def wait(self) -> None:
        if self.lost:
            raise KernelError("the GPU is lost", fix="load the package again")

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, POISON, np.uint8)

    def keep_kernels(self, known: bytes | None) -> None:
        self.keeps, self.known = True, known if known and self.driver.encode() in known else None

    def kernels(self) -> bytes:
        return b"".join(sorted(self.compiled)) if self.known is None else self.known

    def load(self, data: bytes, name: str) -> LoadedEngine:
        return StandInEngine(self, self.networks[bytes(data)])

    def close(self) -> None:
        self.closed += 1


class StandInEngine(LoadedEngine):
    """A network whose bindings are read from and written to addresses."""

    scratch_bytes, code_bytes = 1024, 10

    def __init__(self, device: StandIn, net: MethodNetwork) -> None:
        self.device, self.net, trt = device, net, net.graph.trt
        self.evaluation = Evaluation(trt, net.network, net.graph.constants)
        dtypes = {trt.float32: "f32", trt.float16: "f16", trt.bfloat16: "bf16", trt.int32: "i32", trt.uint8: "u8",
                  trt.int8: "i8"}  # fmt: skip
        inputs = [net.network.get_input(k) for k in range(net.network.num_inputs)]
        outputs = [net.network.get_output(k) for k in range(net.network.num_outputs)]
        self.bindings = {
            t.name: EngineBinding(t.name, dtypes[t.dtype], tuple(t.shape), out, self._alias(t.name))
            for ts, out in ((inputs, False), (outputs, True))
            for t in ts
        }
        self.limits: list[tuple[int, int]] = []
        self.reports: Callable[[str, float], None] | None = None

    def _alias(self, name: str) -> str:
        """What TensorRT says of outputs of its cache update."""
        for index in range(self.net.network.num_layers):
            layer = self.net.network.get_layer(index)
            if "KV_CACHE_UPDATE" in str(type(layer).type.__get__(layer)) and layer.get_output(0).name == name:
                return str(layer.get_input(0).name)
        return ""

    @property
    def profiles(self) -> int:
        return len(profiles_of(self.net.most))

    def bounds(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        least, _, most = profiles_of(self.net.most)[profile]
        shape = next(b.shape for b in self.net.bindings if b.name == name)
        return tuple(a * least + b for a, b in shape), tuple(a * most + b for a, b in shape)

    def prepare(self, scratch: int) -> None:
        assert scratch % 256 == 0
        if self.device.keeps and self.device.known is None:
            self.device.compiled.append(f"{self.net.name} for {self.device.driver};".encode())

    def run(self, profile: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        assert set(addresses) == set(self.bindings) and not any(a % 256 for a in addresses.values())
        given = {name: read(addresses[name], self.bindings[name].dtype, shape) for name, shape in shapes.items()}
        sizes = [n for n in range(1, self.net.most + 1) if all(b.shape_at(n) == shapes[b.name] for b in self._inputs())]
        least, _, most = profiles_of(self.net.most)[profile]
        assert least <= sizes[0] <= most
        self.device.runs.append((self.net.name, sizes[0]))
        for name, value in self.evaluation.run(given).items():
            write(addresses[name], self.bindings[name].dtype, value)

        if self.reports is not None:
            for index in range(self.net.network.num_layers):
                self.reports(self.net.network.get_layer(index).name, 0.5)

    def report_layers(self, report: Callable[[str, float], None] | None) -> None:
        self.reports = report

    def _inputs(self):
        for b in self.net.bindings:
            if b.kind not in ("output", "next"):
                yield _Sized(b.name, b.shape)

    def close(self) -> None:
        pass


class _Sized:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape

    def shape_at(self, n):
        return tuple(a * n + b for a, b in self.shape)


STORED = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i32": np.int32, "i64": np.int64, "u8": np.uint8,
          "i8": np.int8}  # fmt: skip


def _view(address: int, dtype: str, count: int) -> np.ndarray:
    kind = np.dtype(STORED[dtype])
    return np.frombuffer((ctypes.c_uint8 * (count * kind.itemsize)).from_address(address), kind)


def read(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What lies at an address; floats as float32."""
    raw = _view(address, dtype, int(np.prod(shape))).reshape(shape)
    if dtype == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32) if dtype == "f16" else raw.copy()


def write(address: int, dtype: str, value: np.ndarray) -> None:
    if dtype == "bf16":  # the evaluator has rounded it
        value = (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    _view(address, dtype, value.size)[:] = value.reshape(-1).astype(STORED[dtype])


class OpenNetworks:
    """What a backend asks of a package, for networks that were never built."""

    def __init__(self, program: Program, made: Mapping[str, MethodNetwork], library: Library) -> None:
        states, slot_bytes, regions = slot_layout(program, list(made.values()))
        self.states: tuple[StateInfo, ...] = states
        self.plan = plan_of(library, list(made.values()), slot_bytes, regions)
        self.engines = {engine_name(k, name): name.encode() for k, name in enumerate(made)}
        targets = {"tensorrt:sm89": SimpleNamespace(plan=PLAN)}
        self.manifest = SimpleNamespace(targets=targets, states=states)

    def json(self, name: str) -> Any:
        return self.plan

    def read(self, name: str) -> bytes:
        return self.engines[name]


def open_program(program: Program, source: Any, library: Library) -> tuple[TensorRTBackend, StandIn]:
    """A program's networks behind the runtime, on a stand-in."""
    made = networks(library, program, source)
    device = StandIn({name.encode(): net for name, net in made.items()})
    return TensorRTBackend(OpenNetworks(program, made, library), "tensorrt:sm89", device), device
