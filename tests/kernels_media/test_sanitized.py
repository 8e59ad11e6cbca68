"""What the checks of the media and random kernels accept runs inside its operands, under ASan and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cpu" / "src"
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
FLAGS = [*["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread"], *SANITIZE]
OPS = {"bag_embedding", "dmel", "patchify", "overlap_add", "philox_normal", "sample"}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++)")
    folder = tmp_path_factory.mktemp("fuzz")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    command = [compiler, *FLAGS, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the address and undefined-behaviour sanitizers of the C++ compiler")
    program = folder / "check_fuzz"
    sources = [HERE / "check_fuzz.cpp", SOURCES / "media.cpp", SOURCES / "random.cpp"]
    subprocess.run([compiler, *FLAGS, f"-I{SOURCES}", *map(str, sources), "-o", str(program)], check=True)
    return program


def test_no_accepted_call_leaves_its_operands(fuzzer: Path) -> None:
    result = subprocess.run([str(fuzzer), "1500"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {line[0] for line in lines} == OPS
    for name, _, refused, _, ran, _, refused_valid in lines:
        assert int(ran) > 300, name  # the fuzz reached the kernel …
        assert int(refused) > 300, name  # … and the checks
        assert int(refused_valid) == 0, name
