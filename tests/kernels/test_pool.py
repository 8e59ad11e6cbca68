"""The thread pool under ThreadSanitizer: every unit of a split is done once, and nothing races."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cpu" / "src"


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    binary = tmp_path_factory.mktemp("pool") / "pool_check"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, HERE / "pool_check.cpp", SOURCES / "pool.cpp", "-o", binary], check=True)
    return binary


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_unit_is_done_once_and_nothing_races(check, threads):
    result = subprocess.run([check, str(threads), "2500"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
