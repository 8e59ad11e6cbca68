"""Tick logs of a server: private, bounded, and never in the way of the session that they are of."""

import json
import logging
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from tmlc.errors import UsageError
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.gateway.logs import LAST_RECORD, TickLogs

OPEN = ticklog.opened("digest", 1, 0.0, 0, 0)


def tick(index: int) -> dict:
    output = TickOutput(index, [1, 2], "x", np.zeros(8, np.float32), {}, {})
    return ticklog.ticked(TickInput(audio=np.zeros(300, np.float32)), output, [])


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def records(folder) -> list[dict]:
    return [json.loads(line) for line in only_file(folder).read_text().splitlines()]


@contextmanager
def files_up_to(size: int):
    """The system takes no byte more of a file; it says so as for a full disk, in the midst of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_log_is_private_and_holds_what_was_written(tmp_path):
    log = TickLogs(tmp_path / "logs", 1 << 20)()
    for record in (OPEN, tick(0), ticklog.decided("end", 1, reason="closed")):
        log(record)
    folder = tmp_path / "logs"
    assert (folder.stat().st_mode & 0o777, only_file(folder).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [record["event"] for record in records(folder)] == ["open", "tick", "end"]


def test_at_its_bound_a_log_says_so_and_the_session_goes_on(tmp_path, caplog):
    log, bound = TickLogs(tmp_path, 10_000)(), 10_000
    log(OPEN)
    for index in range(50):
        log(tick(index))
    log(ticklog.decided("end", 50, reason="closed"))
    *ticks, last = records(tmp_path)[1:]
    assert last == {"event": "cut", "tick": ticks[-1]["tick"], "reason": "bound"}
    assert bound - LAST_RECORD - 3000 < only_file(tmp_path).stat().st_size <= bound
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("room", [5000, 300])
def test_a_full_disk_ends_the_log_and_not_the_session(tmp_path, caplog, room):
    log = TickLogs(tmp_path, 1 << 20)()
    with files_up_to(room):
        log(OPEN)
        for index in range(20):
            log(tick(index))
    log(tick(20))  # and not when there is room again: what is between would be missing
    found = records(tmp_path)
    assert found[-1] == {"event": "cut", "tick": len(found) - 3, "reason": "disk"}
    assert "could not be written" in caplog.text


def test_a_disk_that_takes_nothing_at_all_is_no_error_either(tmp_path, caplog):
    log = TickLogs(tmp_path, 1 << 20)()
    with files_up_to(0):
        log(OPEN)
        log(tick(0))
    assert only_file(tmp_path).read_bytes() == b""
    assert "no proper end" in caplog.text


def test_a_folder_that_vanished_leaves_a_session_without_a_log(tmp_path, caplog):
    logs = TickLogs(tmp_path / "logs", 1 << 20)
    (tmp_path / "logs").rmdir()
    logs()(OPEN)
    assert "no tick log" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be kept"):
        TickLogs(tmp_path / "file" / "logs", 1 << 20)
