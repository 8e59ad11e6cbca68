"""The aarch64 libraries, cross-compiled with the flags of setup.py and run under an emulator.

With portable bits their outputs are those of this machine's library, bit for bit. Emulation says nothing about speed.
"""

import platform
import runpy
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import kernel_cases
import numpy as np
import pytest
import replay
import setuptools

from tmlc.kernels.cpu import load_library

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DOT = b"sdot"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools():
    if platform.machine().lower() in ("aarch64", "arm64"):
        pytest.skip("needs another machine: here the libraries run as they are")
    for tool in (COMPILER, EMULATOR, "aarch64-linux-gnu-objdump"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    root = subprocess.run([COMPILER, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    return Path(root.stdout.strip()).resolve().parents[1]  # where the emulator finds the machine's libraries


@pytest.fixture(scope="module")
def libraries(tools, tmp_path_factory):
    """name -> shared library, as setup.py would build it on an aarch64 machine."""
    folder, made = tmp_path_factory.mktemp("aarch64"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
        patch.setattr(setuptools, "setup", lambda **arguments: made.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    built = {}
    for extension in made["ext_modules"]:
        name = extension.name.rpartition("_")[2]
        built[name] = folder / f"{name}.so"
        command = [COMPILER, *extension.extra_compile_args, "-shared", *(str(ROOT / s) for s in extension.sources)]
        subprocess.run([*command, "-o", str(built[name]), *extension.extra_link_args], check=True)
    assert set(built) == {"portable", "neon"}
    return built


@pytest.fixture(scope="module")
def emulated(tools, libraries, tmp_path_factory):
    """name, output -> a target for `replay`."""
    program = replay.compile_replay(tmp_path_factory.mktemp("aarch64"), COMPILER)

    def target(name, portable, output):
        return replay.Target(name, [EMULATOR, "-L", tools, program], libraries[name], portable=portable, output=output)

    return target


def test_quantised_sums_use_the_dot_product_where_there_is_one(libraries):
    for name, path in libraries.items():
        code = subprocess.run(["aarch64-linux-gnu-objdump", "-d", str(path)], capture_output=True, check=True).stdout
        assert (DOT in code) == (name == "neon")


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_portable_bits_are_those_of_this_machine(emulated, best, rng, tmp_path, op):
    cases = list(chain(kernel_cases.sweep(best.Builder, rng, op, 16), kernel_cases.mixed(best.Builder, rng, op, 12)))
    targets = [emulated(name, True, tmp_path / name) for name in ("neon", "portable")]
    replay.replay(targets, cases, best.library)
    fused = load_library(portable_bits=True)
    want = b"".join(array.tobytes() for case in cases for array in case.run(fused, portable_bits=True))
    for target in targets:
        assert target.output.read_bytes() == want, target.name


@pytest.mark.parametrize("op", ["linear", "moe", "attention"])  # where a machine may have ways of its own
def test_the_fastest_ways_are_close_to_portable_bits(emulated, best, rng, tmp_path, op):
    cases = list(kernel_cases.sweep(best.Builder, rng, op, 16))
    targets = [emulated("neon", portable, tmp_path / str(portable)) for portable in (False, True)]
    replay.replay(targets, cases, best.library)
    fast, exact = (target.output.read_bytes() for target in targets)
    at = 0
    for case in cases:
        for n, _ in case.calls:
            for kind, rows, cols in case.outputs(n):
                a, b = (np.frombuffer(data, kind, rows * cols, at) for data in (fast, exact))
                at += a.nbytes
                assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), case.name
        at += case.slot.nbytes
    assert at == len(fast)
