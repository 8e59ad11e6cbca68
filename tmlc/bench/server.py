"""A server that the bench starts itself, in a process of its own, and what a server says of itself in numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from tmlc.errors import UsageError
from tmlc.processes import python_module

START_SECONDS, STOP_SECONDS = 120.0, 20.0
MEMORY_SECONDS = 5.0
"""Between two looks at the server's memory."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address on which nobody listens at present."""
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


class ServedPackage:
    """`tmlc serve` of a package on free loopback ports; a context manager.

    Attributes:
        url: of the API, with `/v1`.
        admin: of the admin port.
        process: the server's.
    """

    def __init__(self, package: Path, *options: str) -> None:
        port, admin = free_ports(2)
        self.package = package
        self.url, self.admin = f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{admin}"
        command = python_module("tmlc.cli.main", "serve", package, "--port", port)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            [*command, "--admin-port", str(admin), *options],
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Returns when the server is ready. Raises UsageError when it ends before, or takes too long."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                fix = "try what it was started with: tmlc serve"
                raise UsageError(f"the server ended at once: {self.tail()}", where=str(self.package), fix=fix)
            try:
                with urllib.request.urlopen(f"{self.admin}/readyz", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        what = f"the server was not ready after {START_SECONDS:g} s: {self.tail()}"
        raise UsageError(what, where=str(self.package), fix="start `tmlc serve` yourself and give its URL")

    def tail(self) -> str:
        """The end of what the server printed, on one line."""
        self._said.seek(0)
        return " ".join(self._said.read().decode("utf-8", "replace").split())[-400:]

    def close(self) -> None:
        """Ends the server, by force when it does not follow."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._said.close()

    def __enter__(self) -> ServedPackage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(url: str) -> dict[str, float]:
    """The samples of a Prometheus page, by name and labels as they stand there; buckets and times of creation left out.

    Raises UsageError: nobody answers there, or something else than a page of metrics.
    """
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read(16 << 20).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the server's metrics cannot be read: {error}", where=url, fix="give --metrics URL"
        ) from error
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        if "_bucket" in name or name.partition("{")[0].endswith("_created"):
            continue
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError("this is not a page of metrics", where=url, fix="give the URL of /metrics") from None
    return found


class Memory:
    """Follows the resident memory of a server while it is benched.

    Args:
        url: of its metrics; None follows nothing.
    """

    def __init__(self, url: str | None) -> None:
        self._url, self._next = url, 0.0
        self.samples: list[tuple[float, float]] = []

    def look(self, passed: float) -> None:
        """`passed` seconds of the bench are over: reads the server's memory when it is time to. A server that does not
        answer in time, or does not say it, is asked again later."""
        if self._url is None or passed < self._next:
            return
        self._next = passed + MEMORY_SECONDS
        try:
            found = read_metrics(self._url).get("tmlc_resident_bytes", 0.0)
        except UsageError:
            return
        if found:
            self.samples.append((passed, found / 1e6))


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much every sample that changed did."""
    return {
        name: round(value - before.get(name, 0.0), 6) for name, value in after.items() if value != before.get(name, 0.0)
    }
