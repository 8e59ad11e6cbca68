"""Finds the rooms (top-level folders) as sub-packages of `tmlc` and builds the CPU kernel library.

Everything declarative is in pyproject.toml; this file holds the two things that need code: the packages of the
mapped folders, and one shared library for each instruction-set variant of the same C++ sources.
"""

import platform
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ROOMS = ("passes", "kernels", "runtimes", "model_zoo")


def packages() -> list[str]:
    found = ["tmlc", *(f"tmlc.{name}" for name in find_packages("tmlc"))]
    for room in ROOMS:
        found += [f"tmlc.{room}", *(f"tmlc.{room}.{name}" for name in find_packages(room))]
    return found


def variants() -> dict[str, list[str]]:
    """Compiler flags of each instruction-set variant that the kind of machine we build for can have."""
    # get_platform obeys _PYTHON_HOST_PLATFORM, by which builds for another machine say so ("linux-aarch64").
    machine = sysconfig.get_platform().rpartition("-")[2].lower()
    if machine == "universal2":
        machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        v4 = ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"]
        exact = ["-march=x86-64", "-DTMLC_EXACT_FMA"]  # `portable` for load(portable_bits=True), where x86 has no FMA
        return {"portable": ["-march=x86-64"], "portable_exact": exact, "v3": ["-march=x86-64-v3"], "v4": v4}
    if machine in ("aarch64", "arm64"):
        return {"portable": ["-march=armv8-a"], "neon": ["-march=armv8.2-a+dotprod"]}
    return {"portable": []}


class BuildKernels(build_ext):
    """Plain shared libraries with a C interface: no Python symbol is needed, they are loaded by ctypes."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels/cpu/src").glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels/cpu/src").glob("*.[hd]*"))
COMMON = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
]

setup(
    packages=packages(),
    ext_modules=[
        Extension(
            f"tmlc.kernels.cpu._tmlc_cpu_{name}",
            sources=SOURCES,
            depends=HEADERS,
            language="c++",
            extra_compile_args=[*COMMON, *flags, f'-DTMLC_ISA="{name.removesuffix("_exact")}"'],
            extra_link_args=["-pthread"],
        )
        for name, flags in variants().items()
    ]
    if SOURCES
    else [],
    cmdclass={"build_ext": BuildKernels},
)
