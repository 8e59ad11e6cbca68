"""The TensorRT library that builds: which one a target takes, what it builds for, and one build with its errors.

`tensorrt_rtx` (TensorRT for RTX) builds for a named architecture on any machine. `tensorrt` (datacentre TensorRT)
builds for the GPU of this machine only. Both have the same network API, so one emitter serves both.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tmlc.errors import EmitError, TargetError

RTX, DATACENTRE = "tensorrt_rtx", "tensorrt"
INSTALL = "pip install 'tmlc[tensorrt]'"
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
"""What a package can be built for without a GPU (the builder knows more; these are tested)."""
CURRENT = "current"
MIN_VERSION = (1, 7)  # of tensorrt_rtx: add_kv_cache_update and add_attention_v2
MIN_DATACENTRE = (10, 15)

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Library:
    """One installed TensorRT and the architecture that a target asks it for.

    Attributes:
        name, version: of the module.
        api: the module.
        architecture: "sm89": what the engine's code is for.
    """

    name: str
    version: str
    api: Any
    architecture: str


def open_library(target: str) -> Library:
    """The library for a target `tensorrt:smXX` or `tensorrt:current`.

    Raises:
        TargetError: the argument is missing or unknown, no library is installed, or there is no GPU to ask.
    """
    family, _, argument = target.partition(":")
    if argument != CURRENT and argument not in ARCHITECTURES:
        choice = ", ".join(f"{family}:{name}" for name in (*ARCHITECTURES, CURRENT))
        what = f"target {target} names no architecture" if not argument else f"target {target} is not one that builds"
        raise TargetError(what, where="--target", fix=f"Use one of: {choice}.")
    if argument == CURRENT:
        here = current_architecture()
        if here is None:
            fix = f"Name the architecture instead, e.g. {family}:{ARCHITECTURES[2]}."
            raise TargetError(f"target {target} asks for the GPU of this machine, and there is none", fix=fix)
        found = _installed(DATACENTRE, here) or _installed(RTX, here)
    else:
        found = _installed(RTX, argument)
        if found is None and current_architecture() == argument:
            found = _installed(DATACENTRE, argument)
    if found is None:
        raise TargetError(f"target {target} needs TensorRT, which is not installed", where="--target", fix=INSTALL)
    return found


def _installed(name: str, architecture: str) -> Library | None:
    """The library of that name where it is installed, new enough, and builds for the architecture."""
    try:
        api = import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        fix = f"Install it again: {INSTALL}."
        raise TargetError(f"{name} is installed and does not load: {error}", where="--target", fix=fix) from error
    version = str(api.__version__)
    least = MIN_VERSION if name == RTX else MIN_DATACENTRE
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
        what = f"{name} {version} is older than {'.'.join(map(str, least))}, which tmlc needs"
        raise TargetError(what, where="--target", fix=f"Upgrade it: pip install -U {name.replace('_', '-')}.")
    if name == RTX and not hasattr(api.ComputeCapability, architecture.upper()):
        what = f"{name} {version} does not build for {architecture}"
        raise TargetError(what, where="--target", fix=f"Use one of: {', '.join(ARCHITECTURES)}.")
    return Library(name, version, api, architecture)


def current_architecture() -> str | None:
    """The architecture of the first GPU here ("sm89"), asked of the driver; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0):
        return None
    return f"sm{major.value}{minor.value}"


def make_logger(library: Library) -> Any:
    """A logger that keeps what the library says is wrong, in `errors`, and prints nothing."""

    class Keeper(library.api.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a driver every error is followed by one that says so, which tells nobody anything.
            if severity <= library.api.ILogger.Severity.ERROR and "CUDA driver version is insufficient" not in message:
                self.errors.append(message)

    return Keeper()


def make_network(library: Library, builder: Any) -> Any:
    """An empty network whose tensors have the types that their layers give them, and no others."""
    flag = getattr(library.api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def build_engine(
    library: Library,
    builder: Any,
    network: Any,
    shapes: dict[str, tuple[tuple[int, int], ...]],
    profiles: list[tuple[int, int, int]],
    name: str,
    sources: dict[str, str],
    tell: Tell,
) -> bytes:
    """Builds and serialises one network.

    Args:
        shapes: of the inputs that depend on n: every dimension as (a, b), meaning a·n + b.
        profiles: (least, usual, most) positions of each optimization profile.
        name: of the method, for progress and errors.
        sources: what each layer was made from, by layer name.

    Raises:
        EmitError: the builder refuses the network; says which layer, and where in the model that comes from.
    """
    trt = library.api
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # routers and spectra are float32, not 10 bits of it
    if library.name == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, library.architecture.upper()), 0)
    for bounds in profiles:
        profile = builder.create_optimization_profile()
        for tensor, dims in shapes.items():
            profile.set_shape(tensor, *(tuple(a * n + b for a, b in dims) for n in bounds))
        config.add_optimization_profile(profile)
    config.progress_monitor = _progress(trt, name, tell)
    said = builder.logger.errors
    said.clear()
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise build_error(said, name, sources)
    return bytes(built)


def _progress(trt: Any, name: str, tell: Tell) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells the steps of the outermost phase; the phases inside it are too many to show."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps
                tell(f"building {name}", 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                tell(f"building {name}", step + 1, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            if phase in self.steps:
                tell(f"building {name}", self.steps[phase], self.steps.pop(phase))

    return Monitor()


def build_error(said: list[str], method: str, sources: dict[str, str]) -> EmitError:
    """What the library said, as one error that names the layer's place in the model where the message tells it."""
    message = said[0] if said else "no reason was given"
    layer = next((name for name in sorted(sources, key=len, reverse=True) if name in message), "")
    where = f"method {method}" + (f", {sources[layer]}" if layer else "")
    short = " ".join(message.split())[:400]
    return EmitError(
        f"TensorRT refuses the network: {short}",
        where=where,
        fix="Try another --precision, or report it with the output of `tmlc compile --dump DIR`.",
    )
