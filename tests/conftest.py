"""What tests of several rooms share: no compile cache, commands that can be interrupted, and the kernel sources
compiled with the sanitizers once."""

import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# A shell starts what runs in its background with interrupts ignored, and children inherit that: `make test &` would
# find commands that Ctrl-C does not end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

KERNELS = Path(__file__).parents[1] / "kernels/cpu"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi", '-DTMLC_ISA="sanitized"'),
]
SANITIZE = [
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]


class SanitizedBuild:
    """Builds with AddressSanitizer and UndefinedBehaviorSanitizer into a folder of the test session."""

    sources = sorted((KERNELS / "src").glob("*.cpp"))

    def __init__(self, compiler: str, folder: Path) -> None:
        self.compiler, self.folder = compiler, folder
        self._objects: dict[Path, Path] = {}

    def program(self, name: str, sources: Sequence[Path]) -> Path:
        """An executable of these sources."""
        return self._link(name, sources)

    def library(self) -> Path:
        """The whole kernel library, as the binding loads it; a process needs `preload` to load it."""
        return self._link("tmlc_cpu_sanitized.so", self.sources, "-shared")

    @property
    def preload(self) -> str:
        """The value of LD_PRELOAD with which a program that is not sanitized can load the library."""
        names = ("libasan.so", "libubsan.so")
        found = [subprocess.check_output([self.compiler, f"-print-file-name={name}"], text=True) for name in names]
        return ":".join(path.strip() for path in found)

    def _link(self, name: str, sources: Sequence[Path], *flags: str) -> Path:
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(self._compile, sources))
        command = [self.compiler, "-pthread", *SANITIZE, *flags, *map(str, objects), "-o", str(self.folder / name)]
        subprocess.run(command, check=True)
        return self.folder / name

    def _compile(self, source: Path) -> Path:
        if source not in self._objects:
            target = self.folder / f"{source.stem}.o"
            command = [self.compiler, *FLAGS, *SANITIZE, f"-I{KERNELS / 'src'}", "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
            self._objects[source] = target
        return self._objects[source]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> SanitizedBuild:
    """The sanitized build of this test session."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "probe.cpp").write_text("int main() {}")
    command = [compiler, *SANITIZE, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the address and undefined-behaviour sanitizers of the C++ compiler")
    return SanitizedBuild(compiler, folder)


@pytest.fixture(scope="session", autouse=True)
def no_compile_cache():
    """Tests of what compiling does must compile; tests/cache brings a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMLC_CACHE", "off")
        yield
