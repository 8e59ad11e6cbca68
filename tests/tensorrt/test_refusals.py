"""What cannot be: one clear line each, before minutes are spent or a byte is given to TensorRT."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import tmlc
from tmlc.emit.targets import find_target
from tmlc.emit.tensorrt import library as library_room
from tmlc.emit.tensorrt.network import networks
from tmlc.errors import EmitError, InputError, KernelError, PackageError, TargetError, UsageError
from tmlc.runtimes.core.placement import Placement
from tmlc.runtimes.tensorrt.backend import check_engine, open_backend
from tmlc.runtimes.tensorrt.cuda import CudaDevice, CudaEngine, open_library
from tmlc.runtimes.tensorrt.device import EngineBinding
from tmlc.runtimes.tensorrt.plan import Plan, read_plan

from ..emit.conftest import Builder, decoder
from .stand_in import OpenNetworks, open_program
from .test_streaming import SHORT

PLAN = Plan("tensorrt_rtx", "1.7.1.116", "sm89", 0, {})


def both_lines(error: pytest.ExceptionInfo) -> str:
    return f"{error.value.what}\n{error.value.fix}"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt:sm90", "tensorrt:SM89", "tensorrt:"])
def test_an_architecture_that_does_not_build_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(TargetError, match=r"tensorrt:sm80, tensorrt:sm86, tensorrt:sm89, tensorrt:sm120") as error:
        raise_fix(lambda: find_target(name))
    assert name in str(error.value)


def raise_fix(call) -> None:
    try:
        call()
    except TargetError as error:
        raise TargetError(f"{error.what} {error.fix}", fix=error.fix) from None


def test_current_needs_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(library_room, "current_architecture", lambda: None)
    with pytest.raises(TargetError, match="asks for the GPU of this machine, and there is none"):
        find_target("tensorrt:current")


def test_current_builds_for_the_gpu_that_is_there(monkeypatch) -> None:
    monkeypatch.setattr(library_room, "current_architecture", lambda: "sm86")
    assert find_target("tensorrt:current").library.architecture == "sm86"
    monkeypatch.setattr(library_room, "current_architecture", lambda: "sm90")
    with pytest.raises(TargetError, match="does not build for sm90"):
        find_target("tensorrt:current")


def test_a_missing_library_comes_with_the_command_that_installs_it(monkeypatch) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TargetError, match="needs TensorRT, which is not installed") as error:
        find_target("tensorrt:sm89")
    assert error.value.fix == "pip install 'tmlc[tensorrt]'"


def test_too_old_a_library_is_refused(monkeypatch) -> None:
    old = ModuleType("tensorrt_rtx")
    old.__version__ = "1.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", old)
    with pytest.raises(TargetError, match=r"tensorrt_rtx 1.3.0 is older than 1.7"):
        find_target("tensorrt:sm89")


@pytest.mark.parametrize(("option", "value"), [("precision", "fp8"), ("kv", "fp8")])
def test_precisions_and_caches_that_it_has_not(checkpoints, tmp_path, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=value) as error:
        tmlc.compile(checkpoints["inkling"], tmp_path / "x.tmlc", target="tensorrt:sm89", **{option: value})
    assert "fp16, bf16, fp32" in error.value.fix


def computed_weight() -> Builder:
    b = Builder().method("m")
    x = b.input("x", 4)
    b.output(b.op("linear", x, b.op("silu", b.weight("w", 4, 4)), None))
    return b


def test_an_op_that_cannot_lower_is_refused_with_place_reason_and_what_to_do(library) -> None:
    b = Builder().method("m")
    x = b.input("x", 4)
    b.output(b.op("short_conv", x, b.weight("w", 4, 3), True))
    next(iter(b.program.methods["m"].calls("short_conv"))).meta["source"] = "layers.0.conv at model.py:12"
    with pytest.raises(EmitError) as error:
        networks(library, b.program, b.source)
    assert error.value.what.startswith("op short_conv cannot be lowered to TensorRT: it is stateless")
    assert error.value.where == "method m, layers.0.conv at model.py:12" and "--preset tensorrt" in error.value.fix
    (row,) = find_target("tensorrt:sm89").coverage(b.program)
    assert (row.kernel, row.source) == (None, "layers.0.conv at model.py:12") and "stateless" in row.reason and row.fix


def test_computed_weights_are_refused_by_the_coverage_too(library) -> None:
    builder = computed_weight()
    refused = [row for row in find_target("tensorrt:sm89").coverage(builder.program) if row.kernel is None]
    assert [row.op for row in refused] == ["linear"] and "computed" in refused[0].reason and refused[0].fix
    with pytest.raises(EmitError, match="computed"):
        networks(library, builder.program, builder.source)


def test_a_dry_run_prints_the_table_and_fails_where_something_is_refused(checkpoints) -> None:
    from click.testing import CliRunner

    from tmlc.cli.compile import command

    run = CliRunner().invoke
    arguments = [str(checkpoints["qwen3_moe"]), "--target", "tensorrt:sm89", "--dry-run", "--json"]
    whole = run(command, arguments, standalone_mode=True)
    rows = json.loads(whole.stdout)["coverage"]
    assert whole.exit_code == 0 and all(row["kernel"] == "tensorrt_rtx" for row in rows)
    bad = run(command, [*arguments, "--passes", "canonicalize.dead_code"])
    refused = [row for row in json.loads(bad.stdout)["coverage"] if row["kernel"] is None]
    assert bad.exit_code == 1 and {row["op"] for row in refused} == {"attention", "rope"}
    assert all(" at modeling_qwen3_moe.py:" in row["source"] and row["reason"] and row["fix"] for row in refused)
    shown = run(command, [*arguments[:-1], "--passes", "canonicalize.dead_code"]).stdout
    assert all(word in shown for word in ("op", "target", "source", "reason", "what to do", "attention", "refused"))


# The runtime.


def test_the_library_is_checked_before_any_byte_of_an_engine(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TargetError, match=r"need tensorrt_rtx 1.7.1.116, which is not installed") as error:
        open_library(PLAN)
    assert error.value.fix == "Install it: pip install tensorrt-rtx==1.7.1.116"
    other = ModuleType("tensorrt_rtx")
    other.__version__ = "1.8.0.1"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", other)
    with pytest.raises(TargetError, match=r"built with tensorrt_rtx 1.7.1.116, and this is 1.8.0.1") as error:
        open_library(PLAN)
    assert "pip install tensorrt-rtx==1.7.1.116" in error.value.fix
    with pytest.raises(TargetError) as error:
        open_library(replace(PLAN, version="1; rm -rf /"))
    assert "rm" not in error.value.fix


class Driver(ModuleType):
    """The calls of the driver API before memory is asked for; `code` is what the first of them says."""

    def __init__(self, code: int = 0, architecture: tuple[int, int] = (8, 9)) -> None:
        super().__init__("cuda.bindings.driver")
        self.code, self.architecture = code, architecture

    def cuInit(self, flags: int) -> tuple:
        return (self.code,)

    def cuGetErrorString(self, code: int) -> tuple:
        return 0, b"no CUDA-capable device is detected"

    def cuDeviceGet(self, number: int) -> tuple:
        return 0, number

    def CUdevice_attribute(self, number: int) -> int:
        return number

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple:
        return 0, self.architecture[attribute - 75]

    def cuDeviceGetName(self, size: int, device: int) -> tuple:
        return 0, b"A GPU\0\0"


def with_driver(monkeypatch, driver: ModuleType | None) -> None:
    bindings = ModuleType("cuda.bindings")
    if driver is not None:
        bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings if driver is not None else None)


def test_a_machine_without_driver_gpu_or_bindings_says_so(monkeypatch) -> None:
    with_driver(monkeypatch, None)
    with pytest.raises(TargetError, match="cuda-bindings, which is not installed") as error:
        CudaDevice(SimpleNamespace(), PLAN)
    assert error.value.fix == "Install it: pip install cuda-bindings"
    with_driver(monkeypatch, Driver(code=100))
    with pytest.raises(TargetError, match=r"no NVIDIA GPU can be used here .*no CUDA-capable device"):
        CudaDevice(SimpleNamespace(), PLAN)


@pytest.mark.parametrize(
    ("refused", "what", "fix"),
    [
        ("set_input_shape", r"refuses shape \[2\] for ids in profile 0", "fault of tmlc: .* `tmlc doctor"),
        ("set_tensor_address", "refuses the address of ids", "fault of tmlc: report it"),
        ("execute_async_v3", "cannot start the engine", "load the package again"),
    ],
)
def test_an_engine_that_does_not_run_says_whose_fault_it_is(refused, what, fix) -> None:
    engine = CudaEngine.__new__(CudaEngine)
    engine._device, engine._stream = SimpleNamespace(_enter=lambda: None), 7
    calls = ("set_input_shape", "set_tensor_address", "execute_async_v3")
    engine._contexts = [SimpleNamespace(**{name: lambda *_, name=name: name != refused for name in calls})]
    with pytest.raises(KernelError, match=f"{what}\n  .*{fix}"):
        engine.run(0, {"ids": 64}, {"ids": (2,)})


def test_another_architecture_is_refused_with_the_target_to_compile_for(monkeypatch) -> None:
    with_driver(monkeypatch, Driver(architecture=(8, 6)))
    with pytest.raises(TargetError, match="engines are for sm89, and A GPU is sm86") as error:
        CudaDevice(SimpleNamespace(), PLAN)
    assert error.value.fix == "Compile the checkpoint with --target tensorrt:sm86."


def test_what_is_the_cpus_is_refused() -> None:
    with pytest.raises(UsageError, match="isa is for the target cpu"):
        open_backend(None, "tensorrt:sm89", 1, isa="portable")
    with pytest.raises(UsageError, match="portable_bits is for the target cpu"):
        open_backend(None, "tensorrt:sm89", 1, portable_bits=True)
    with pytest.raises(UsageError, match="lock_memory is for the target cpu"):
        open_backend(None, "tensorrt:sm89", 1, placement=Placement(lock_memory=True))


class Odd:
    """An engine that is not quite the plan's."""

    def __init__(self, engine, **changes) -> None:
        self.bindings, self.profiles, self.most = dict(engine.bindings), engine.profiles, None
        self._engine = engine
        self.__dict__ |= changes

    def bounds(self, name: str, profile: int):
        least, most = self._engine.bounds(name, profile)
        return least, most if self.most is None or name != "in.0" else (min(most[0], self.most), *most[1:])


def test_an_engine_that_is_not_the_plans_is_refused(library) -> None:
    backend, _ = open_program(decoder().program, decoder().source, library)
    entry = backend._loaded["decode"]
    check_engine(entry.plan, entry.engine)
    with pytest.raises(PackageError, match=r"profile 2 takes .*, too little for 5 to 8 positions"):
        check_engine(entry.plan, Odd(entry.engine, most=6))
    with pytest.raises(PackageError, match="1 profiles, the plan 3"):
        check_engine(entry.plan, Odd(entry.engine, profiles=1))
    fewer = {name: b for name, b in entry.engine.bindings.items() if name != "next.tail"}
    with pytest.raises(PackageError, match=r"binding next.tail is in the engine or in the plan, not in both"):
        check_engine(entry.plan, Odd(entry.engine, bindings=fewer))
    apart = {n: replace(b, aliases="") if n == "next.k_cache" else b for n, b in entry.engine.bindings.items()}
    with pytest.raises(PackageError, match=r"binding next.k_cache is not written where it is read"):
        check_engine(entry.plan, Odd(entry.engine, bindings=apart))
    other = entry.engine.bindings | {"in.0": EngineBinding("in.0", "f16", (-1, 24), False)}
    with pytest.raises(PackageError, match=r"in.0 is f16"):
        check_engine(entry.plan, Odd(entry.engine, bindings=other))


CHANGES = {
    "version 9 is not 1": lambda p: p.update(version=9),
    "not one of tensorrt_rtx": lambda p: p["library"].update(name="os"),
    "expected a name like sm89": lambda p: p.update(architecture="../x"),
    "lies outside the slot": lambda p: p.update(slot_bytes=256),
    "do not join": lambda p: p["methods"][0]["profiles"][1].__setitem__(0, 3),
    "a binding is given twice": lambda p: p["methods"][0]["bindings"].append(p["methods"][0]["bindings"][0]),
    "do not give every result": lambda p: p["methods"][0]["bindings"].pop(),
    "it is no count": lambda p: p["methods"][0].update(position="k_cache"),
    "it is needed": lambda p: p["methods"][0].update(position=""),
    "expected pairs of capacity": lambda p: p["methods"][0].update(rings=[[16, 16]]),
    "is not written whole": lambda p: p["methods"][0].update(rewritten=[0, 0]),
    "it does not lie in the slot": lambda p: p["methods"][0].update(rewritten=[256, 2**30]),
    "unknown field": lambda p: p["methods"][0].update(extra=1),
    "field is missing": lambda p: p["methods"][0].pop("limits"),
    "a method is given twice": lambda p: p["methods"].append(p["methods"][0]),
    "does not fit the state": lambda p: state_of(p).update(dtype="i32"),
    "no such state": lambda p: state_of(p).update(state="other"),
    "expected true or false": lambda p: state_of(p).update(cache=1),
}


def state_of(plan: dict) -> dict:
    return next(b for b in plan["methods"][0]["bindings"] if b["kind"] == "state")


@pytest.mark.parametrize("message", CHANGES)
def test_a_plan_that_was_tampered_with_is_refused(library, message: str) -> None:
    b = decoder()
    opened = OpenNetworks(b.program, networks(library, b.program, b.source), library)
    plan = json.loads(json.dumps(opened.plan))
    states = {state.name: state for state in opened.states}
    read_plan(plan, states)
    CHANGES[message](plan)
    with pytest.raises(PackageError) as error:
        read_plan(plan, states)
    assert message in error.value.what or message in str(error.value)


def test_ids_outside_their_table_are_refused_for_their_session_only(checkpoints, stand_in) -> None:
    engine, _ = stand_in(checkpoints["inkling"], precision="fp16", **SHORT)
    backend, slots = engine.backend, engine.slots
    ids = np.array([[1], [2], [engine.model.vocab]], np.int32)
    with pytest.raises(KernelError, match="index outside 0") as error:
        backend.call("embed_text", [(2, slots.handle(0)), (1, slots.handle(1))], [ids])
    assert error.value.part == 1 and error.value.fix == "give ids of the vocabulary"
    with pytest.raises(InputError, match="a slot is given twice\n  give each session one part"):
        backend.call("embed_text", [(2, slots.handle(0)), (1, slots.handle(0))], [ids])
    with pytest.raises(InputError, match="no positions\n  give each session one part"):
        backend.call("embed_text", [(2, slots.handle(0)), (0, slots.handle(1))], [ids[:2]])


def test_a_lost_device_poisons_the_session_and_closing_still_works(checkpoints, stand_in) -> None:
    engine, device = stand_in(checkpoints["inkling"], precision="fp16", **SHORT)
    session = engine.session()
    session.append(tokens=[1, 2, 3])
    device.lost = True
    with pytest.raises(KernelError, match="the GPU is lost"):
        session.append(tokens=[1])
    session.close()
    engine.close()
    assert not device.held and device.closed == 1
