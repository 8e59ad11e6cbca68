"""Which variants of the CPU kernel library run here, and the library as an object."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sysconfig
from pathlib import Path

from tmlc.errors import TargetError

ABI = 3

_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
# Variants, best first, and the flags (as /proc/cpuinfo names them) that each needs.
_VARIANTS: dict[str, dict[str, set[str]]] = {
    "x86_64": {"v4": _V4, "v3": _V3, "portable": set()},
    "aarch64": {"neon": {"asimd", "asimddp"}, "portable": set()},
}


def _machine() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _cpu_flags() -> set[str]:
    """Feature flags as Linux names them; empty where they cannot be read (then only `portable` runs)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()


def _library_file(name: str) -> Path | None:
    here = Path(__file__).parent
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    exact = here / f"_tmlc_cpu_{name}{suffix}"
    if exact.exists():
        return exact
    return next(iter(sorted(here.glob(f"_tmlc_cpu_{name}.*"))), None)


def _known_isas() -> dict[str, set[str]]:
    return _VARIANTS.get(_machine(), {"portable": set()})


def available_isas() -> list[str]:
    """The variants that are built and that this CPU can run, best first."""
    flags = _cpu_flags()
    return [isa for isa, needs in _known_isas().items() if needs <= flags and _library_file(isa) is not None]


class Library:
    """One loaded variant of the kernel library.

    Attributes:
        isa: the variant's name (`v4`, `v3`, `neon`, `portable`).
        fused: its multiply-add rounds once, so plans may run with portable bits.
        ops: opcode of each operation, by name.
        path: the shared library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        if loaded.tmlc_abi() != ABI:
            raise TargetError(
                f"the kernel library has interface {loaded.tmlc_abi()}, this tmlc needs {ABI}",
                where=str(path),
                fix="build it again: pip install --force-reinstall tmlc",
            )
        self._c = _declare(loaded)
        self.isa: str = self._c.tmlc_isa().decode()
        self.fused = bool(self._c.tmlc_fused())
        self.ops: dict[str, int] = {
            self._c.tmlc_op_name(k).decode(): k for k in range(self._c.tmlc_op_count())
        }


def load_library(isa: str | None = None, portable_bits: bool = False) -> Library:
    """Loads a variant of the kernel library (each once per process).

    Args:
        isa: a variant; None takes `TMLC_CPU_ISA` from the environment, else the best that runs here.
        portable_bits: the library must be able to run plans with portable bits: where the variant has no fused
            multiply-add (`portable` on x86), its twin that emulates one is taken.

    Raises:
        TargetError: the variant is unknown, not built, or this CPU cannot run it.
    """
    wanted = isa or os.environ.get("TMLC_CPU_ISA") or None
    available = available_isas()
    if not available:
        raise TargetError(
            f"no CPU kernel library is built for {_machine()}",
            fix="install a C++17 compiler and run: pip install --force-reinstall tmlc",
        )
    if wanted is not None and wanted not in available:
        known = wanted in _known_isas()
        built = known and _library_file(wanted) is not None
        why = (
            "this CPU cannot run it" if built else "it is not built" if known else "there is no such variant"
        )
        raise TargetError(
            f"instruction set {wanted!r}: {why}",
            where="isa" if isa else "TMLC_CPU_ISA",
            fix=f"use one of: {', '.join(available)}",
        )
    library = _load(wanted or available[0])
    return library if library.fused or not portable_bits else _load(f"{library.isa}_exact")


@functools.cache
def _load(name: str) -> Library:
    path = _library_file(name)
    if path is None:
        raise TargetError(
            f"the kernel library {name!r} is not built", fix="run: pip install --force-reinstall tmlc"
        )
    return Library(path)


def _declare(c: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    text = ctypes.c_char_p
    signatures = {
        "tmlc_abi": (i32, []),
        "tmlc_isa": (text, []),
        "tmlc_fused": (i32, []),
        "tmlc_op_count": (i32, []),
        "tmlc_op_name": (text, [i32]),
        "tmlc_pool_create": (ptr, [i32]),
        "tmlc_pool_threads": (i32, [ptr]),
        "tmlc_pool_pin": (i32, [ptr, ptr, i32]),
        "tmlc_pool_destroy": (None, [ptr]),
        "tmlc_plan_create": (ptr, [ptr, i64, ptr, i64, i32, ptr, i64]),
        "tmlc_plan_portable_bits": (None, [ptr, i32]),
        "tmlc_plan_arena_bytes": (i64, [ptr]),
        "tmlc_plan_slot_bytes": (i64, [ptr]),
        "tmlc_plan_scratch_bytes": (i64, [ptr]),
        "tmlc_plan_arena": (ptr, [ptr]),
        "tmlc_plan_scratch": (ptr, [ptr]),
        "tmlc_plan_inputs": (i32, [ptr, i32]),
        "tmlc_plan_outputs": (i32, [ptr, i32]),
        "tmlc_plan_run": (i32, [ptr, ptr, i32, ptr, i64, i64, ptr, ptr, ptr, ptr, ptr, ptr, i64]),
        "tmlc_plan_unbatched": (text, [ptr, i32]),
        "tmlc_plan_profile": (None, [ptr, i32]),
        "tmlc_plan_times": (i32, [ptr, i32, ptr, ptr, i64, ptr]),
        "tmlc_plan_destroy": (None, [ptr]),
        "tmlc_read_memory": (ctypes.c_uint64, [ptr, ptr, i64]),
        "tmlc_multiply_adds": (i64, [ptr, i32, i64, i64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    return c
