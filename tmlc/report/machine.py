"""What this machine is and has: the facts that go beside every measured figure, and that `tmlc doctor` judges
by.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def machine() -> dict[str, Any]:
    """The facts that identify a measurement: system, processor, cores, memory, Python."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
    }


def slug() -> str:
    """A file name for this kind of machine, e.g. `amd-epyc-9r14-2c`."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {cores()}c").strip("-")


def installed(distribution: str) -> str | None:
    """The version of an installed Python distribution, or None. Imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def tool(command: str, *arguments: str) -> str | None:
    """The first line that a program prints about itself, or None when it is not there."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def gpus() -> list[str]:
    """NVIDIA devices as the driver names them; empty without a driver."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return []
    try:
        done = subprocess.run(
            [path, "--query-gpu=name,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
