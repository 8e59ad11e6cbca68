"""No call of a plan allocates, on the caller or on a worker: whatever is needed is reserved when the plan is made."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs gcc on Linux with glibc")
    library = tmp_path_factory.mktemp("alloc") / "alloc_count.so"
    flags = ["-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-fno-builtin"]
    subprocess.run([compiler, *flags, HERE / "alloc_count.c", "-o", library], check=True)
    return library


def test_running_a_plan_allocates_nothing(bench, counter):
    run = subprocess.run(
        [sys.executable, HERE / "alloc_child.py", bench.library.path, counter],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"LD_PRELOAD": str(counter)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found.pop("building") > 100  # the counter counts
    assert found and not any(found.values()), found
