"""What this machine can compile for and run, and the command that installs what is missing (`tmlc
doctor`).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tmlc import __version__
from tmlc.errors import TmlcError
from tmlc.kernels.triton import versions
from tmlc.report.machine import gpus, installed, machine, tool
from tmlc.report.tables import grid, megabytes, table

if TYPE_CHECKING:
    from rich.console import RenderableType

@dataclass(frozen=True)
class Extra:
    """An extra of pyproject.toml: the distributions that it names itself, the extras that it brings, what it is for."""

    packages: tuple[str, ...]
    purpose: str
    brings: tuple[str, ...] = ()

    def all_packages(self) -> list[str]:
        """Its own distributions first, then those of the extras that it brings."""
        found = [*self.packages, *(name for extra in self.brings for name in EXTRAS[extra].all_packages())]
        return list(dict.fromkeys(found))


# Those that a user installs (`dev` and `all` are for working on tmlc); a test holds them to pyproject.toml.
EXTRAS = {
    "compile": Extra(("torch",), "compiling, tracing, the zoo"),
    "media": Extra(("soundfile", "soxr", "av", "pillow"), "audio and video files: `run`, `profile`, `eval`"),
    "text": Extra(("tokenizers",), "tokenizers other than byte-level ones"),
    "hf": Extra(("transformers",), "tracing models of transformers", ("compile",)),
    "triton": Extra(("triton",), "compiling for the target triton", ("compile",)),
    "cuda": Extra(("cuda-bindings",), "running packages of the target triton"),
    "tensorrt": Extra(("tensorrt-rtx", "cuda-bindings"), "the target tensorrt", ("compile",)),
    "onnx": Extra(("onnx", "onnxruntime"), "the target onnx", ("compile",)),
    "background": Extra(("openai", "mcp", "pillow"), "background models and their tools"),
    "serve": Extra(("aiohttp", "prometheus-client"), "the live server", ("media", "background")),
    "otel": Extra(("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"), "traces of the live server"),
    "bench": Extra(("openai", "websockets"), "the client of `tmlc bench`", ("media",)),
    "train": Extra(("matplotlib",), "training the reference model", ("compile", "media")),
}


@dataclass(frozen=True)
class TargetState:
    """One target: can this machine compile for it, can it run it, and what is missing."""

    name: str
    compile: bool
    run: bool
    note: str
    fix: str = ""


def examine() -> dict[str, Any]:
    """Everything that `tmlc doctor` says, ready for JSON."""
    kernels = _kernels()
    extras = {
        name: {
            "for": extra.purpose,
            "brings": list(extra.brings),
            "packages": {d: installed(d) for d in extra.all_packages()},
            "complete": all(installed(d) for d in extra.all_packages()),
            "install": f"pip install 'tmlc[{name}]'",
        }
        for name, extra in EXTRAS.items()
    }
    found = gpus()
    targets = [_cpu(kernels), _onnx(), _tensorrt(found), _triton(extras, found)]
    return {
        "tmlc": __version__,
        "machine": machine(),
        "compiler": tool(os.environ.get("CXX", "c++"), "--version"),
        "gpus": found,
        "cpu_kernels": kernels,
        "targets": [asdict(target) for target in targets],
        "extras": extras,
        "healthy": targets[0].compile and targets[0].run,
    }


def _kernels() -> dict[str, Any]:
    from tmlc.kernels import cpu

    state: dict[str, Any] = {
        "available": [],
        "chosen": None,
        "override": os.environ.get("TMLC_CPU_ISA"),
        "problem": None,
    }
    try:
        state["available"] = list(cpu.available_isas())
        library = cpu.load_library()
        state["chosen"], state["operations"] = library.isa, len(library.ops)
    except TmlcError as error:
        state["problem"], state["fix"] = error.what, error.fix
    return state


def _cpu(kernels: dict[str, Any]) -> TargetState:
    torch = find_spec("torch") is not None
    if kernels["problem"]:
        return TargetState("cpu", torch, False, kernels["problem"], kernels["fix"])
    if not torch:
        return TargetState("cpu", False, True, "runs packages; compiling needs PyTorch", "pip install 'tmlc[compile]'")
    return TargetState("cpu", True, True, f"kernels {kernels['chosen']}")


def _onnx() -> TargetState:
    """The target onnx: graphs are made with onnx and PyTorch, and run by onnxruntime."""
    missing = [name for name in ("torch", "onnx") if installed(name) is None]
    runtime = installed("onnxruntime")
    made = f"{', '.join(missing)} not installed" if missing else f"onnx {installed('onnx')}"
    note = f"{made}; onnxruntime {runtime or 'not installed'}"
    fix = "" if runtime and not missing else "pip install 'tmlc[onnx]'" if missing else "pip install onnxruntime"
    return TargetState("onnx", not missing, runtime is not None, note, fix)


def _tensorrt(gpus: list[str]) -> TargetState:
    """The target tensorrt: networks are built with TensorRT and PyTorch on any machine, and run on a GPU."""
    names = ("tensorrt", "tensorrt-rtx")
    libraries = [f"{name} {version}" for name in names if (version := installed(name)) is not None]
    driver = installed("cuda-bindings")
    torch = installed("torch") is not None
    parts = [", ".join(libraries) or "no TensorRT"]
    parts += [] if driver else ["cuda-bindings not installed"]
    parts += [] if torch else ["torch not installed"]
    parts += [] if gpus else ["no NVIDIA device here"]
    complete = bool(libraries) and driver is not None and torch
    runs = bool(libraries) and driver is not None and bool(gpus)
    fix = "" if complete else "pip install 'tmlc[tensorrt]'"
    return TargetState("tensorrt", bool(libraries) and torch, runs, "; ".join(parts), fix)


def _triton(extras: dict[str, Any], found: list[str]) -> TargetState:
    """Compiling needs no GPU, running no compiler; some versions of Triton are refused for some architectures."""
    compiles, runs = extras["triton"]["complete"], extras["cuda"]["complete"] and bool(found)
    missing = [extras[name]["install"] for name in ("triton", "cuda") if not extras[name]["complete"]]
    notes = [] if found else ["no NVIDIA device here: compiles, does not run" if compiles else "no NVIDIA device here"]
    version = installed("triton")
    without = versions.refused(version) if version is not None else []
    notes += [f"Triton {version} makes wrong code for sm{sm} and is refused for it" for sm in without]
    missing += dict.fromkeys(versions.install(sm) for sm in without)
    return TargetState("triton", compiles, runs, "; ".join(notes), "; ".join(missing))


def doctor_tables(view: dict[str, Any]) -> list[RenderableType]:
    """The findings for a person."""
    box, kernels = view["machine"], view["cpu_kernels"]
    memory = megabytes(box["memory_bytes"]) if box["memory_bytes"] else "unknown"
    forced = f" (TMLC_CPU_ISA={kernels['override']})" if kernels["override"] else ""
    head = grid(
        [
            ("tmlc", f"{view['tmlc']}, Python {box['python']}"),
            (
                "machine",
                f"{box['system']} {box['architecture']}, {box['cpu']}, {box['cores']} cores, {memory}",
            ),
            ("C++ compiler", view["compiler"] or "none (needed only to build the kernels from source)"),
            ("GPU", ", ".join(view["gpus"]) or "none"),
            (
                "CPU kernels",
                f"{', '.join(kernels['available']) or 'none'}; in use: {kernels['chosen'] or 'none'}{forced}",
            ),
        ]
    )
    targets = table("targets", "target", "compile", "run", "", "what to do")
    for target in view["targets"]:
        targets.add_row(target["name"], _mark(target["compile"]), _mark(target["run"]), target["note"], target["fix"])
    extras = table("extras", "extra", "installed", "for", "command")
    for name, extra in view["extras"].items():
        own = EXTRAS[name].packages
        shown = [f"{d} {v or 'missing'}" for d, v in extra["packages"].items() if d in own or v is None]
        shown += [f"[{other}]" for other in extra["brings"]]
        extras.add_row(name, ", ".join(shown), extra["for"], "" if extra["complete"] else extra["install"])
    return [head, targets, extras]


def _mark(yes: bool) -> str:
    return "yes" if yes else "no"
