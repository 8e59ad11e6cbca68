"""Threads tied to cores and locked pages: what is promised, and what is said when it cannot be had."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tmlc.errors import CapacityError, UsageError
from tmlc.kernels.cpu import Pool, load_library
from tmlc.runtimes.core.placement import HUGE_PAGE, Placement, copy_to_huge_pages, lock_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def affinities() -> dict[int, set[int]]:
    return {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}


@linux
def test_workers_get_a_core_each_and_the_caller_keeps_all_of_its_own():
    allowed = os.sched_getaffinity(0)
    cores = Placement(pin=True).cores(len(allowed))
    assert cores == tuple(sorted(allowed))
    before = set(affinities())
    pool = Pool(load_library(), len(cores), cores)
    after = affinities()
    assert sorted(after[t].copy().pop() for t in set(after) - before) == sorted(cores[1:])
    assert all(len(after[t]) == 1 for t in set(after) - before)
    assert os.sched_getaffinity(0) == allowed
    pool.close()


@linux
def test_cores_come_from_those_that_the_process_may_use():
    code = (
        "import os; last = max(os.sched_getaffinity(0)); os.sched_setaffinity(0, {last})\n"
        "from tmlc.runtimes.core.placement import Placement\n"
        "assert Placement(pin=True).cores(1) == (last,)\n"
        "try: Placement(pin=True).cores(2)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("UsageError 2 threads cannot be pinned to 1 cores")


@linux
def test_a_core_that_is_not_there_is_an_error_and_leaves_no_thread():
    before = set(affinities())
    with pytest.raises(UsageError, match="cannot pin 2 threads to cores 0, 1000"):
        Pool(load_library(), 2, (0, 1000))
    assert set(affinities()) == before
    with pytest.raises(UsageError, match="cannot pin"):
        Pool(load_library(), 3, (0, 1))  # a core is missing


def test_without_pin_there_are_no_cores():
    assert Placement().cores(10_000) is None


def locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck")) * 1024


@linux
def test_locked_pages_are_locked():
    array = np.zeros(20_000, np.uint8)
    before = locked_bytes()
    Placement().lock(array.ctypes.data, array.nbytes, "zeros")
    assert locked_bytes() == before
    Placement(lock_memory=True).lock(array.ctypes.data, array.nbytes, "zeros")
    assert locked_bytes() >= before + array.nbytes - 4096


@linux
def test_weights_stay_where_they_are_unless_large_pages_are_asked_for():
    data = np.random.default_rng(1).integers(0, 256, 3 * HUGE_PAGE + 5, np.uint8)
    assert Placement().weights(data) is data
    copy = Placement(huge_pages=True).weights(data)
    assert np.array_equal(copy, data) and not np.shares_memory(copy, data)
    assert copy.ctypes.data % HUGE_PAGE == 0
    assert "hg" in flags_of_memory_at(copy.ctypes.data)


def flags_of_memory_at(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("nothing is mapped there")


@linux
def test_too_little_memory_for_a_copy_is_said(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("tmlc.runtimes.core.placement.mmap.mmap", refuse)
    with pytest.raises(CapacityError, match="copy of 64 bytes of weights"):
        copy_to_huge_pages(np.zeros(64, np.uint8))


@linux
def test_a_limit_that_is_too_low_is_explained():
    code = (
        "import ctypes, os, resource, numpy as np\n"
        "from tmlc.errors import CapacityError\n"
        "from tmlc.runtimes.core.placement import lock_pages\n"
        "array = np.zeros(1 << 20, np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"  # root may lock what it likes
        "try: lock_pages(array.ctypes.data, array.nbytes, 'weights')\n"
        "except CapacityError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not let this process lock 1048576 bytes of weights; it may lock 4096 bytes in all" in run.stdout
    assert "ulimit -l" in run.stdout


@linux
def test_pages_that_are_not_there_are_an_error():
    page = resource.getpagesize()
    with pytest.raises(CapacityError, match=r"lock .*\n  .*load without lock_memory"):
        lock_pages(1 << 46, page, "nothing")
