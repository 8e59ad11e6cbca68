"""Pictures are decoded in a process of its own: a hostile file costs no more than that, and it ends with its server."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmlc.errors import InputError
from tmlc.runtimes.gateway.frames import FrameDecoder, ImageLimits, picture_of

SERVER = """
import asyncio, os, sys, time
from tmlc.runtimes.gateway.frames import FrameDecoder

async def main():
    decoder = FrameDecoder(8, 8)
    await decoder.start()
    print(*decoder._pool._processes, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def png(width: int, height: int, color: tuple[int, int, int] = (10, 200, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def alive(pid: int) -> bool:
    """Is the process there, and not only its entry, which nobody has asked for yet?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return not status.parent.parent.is_dir() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_picture_becomes_a_frame_of_the_model() -> None:
    async def play() -> np.ndarray:
        decoder = FrameDecoder(8, 12)
        try:
            return await decoder.decode(png(64, 64))
        finally:
            decoder.close()

    frame = asyncio.run(play())
    assert frame.shape == (8, 12, 3) and frame.dtype == np.uint8
    assert np.all(frame == np.array([10, 200, 30]))


def test_a_worker_that_died_costs_one_picture_and_is_replaced() -> None:
    async def play() -> np.ndarray:
        decoder = FrameDecoder(8, 8)
        try:
            await decoder.start()
            (first,) = decoder._pool._processes
            os.kill(first, signal.SIGKILL)
            with pytest.raises(InputError, match=r"memory or time .*\n  send a smaller one"):
                await decoder.decode(png(16, 16))
            frame = await decoder.decode(png(16, 16))
            assert first not in decoder._pool._processes
            return frame
        finally:
            decoder.close()

    assert asyncio.run(play()).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (png(100, 100), ImageLimits(pixels=9_999)),
        (b"\x89PNG not one", ImageLimits()),
        (png(16, 16)[:40], ImageLimits()),
    ],
    ids=["more pixels than allowed", "no picture", "cut off"],
)
def test_a_file_that_is_no_picture_is_refused(data: bytes, limits: ImageLimits) -> None:
    async def play() -> None:
        decoder = FrameDecoder(8, 8, limits)
        try:
            with pytest.raises(InputError, match=r"picture .*\n  send a (smaller one|whole JPEG, PNG or WebP file)"):
                await decoder.decode(data)
            assert (await decoder.decode(png(16, 16))).shape == (8, 8, 3)
        finally:
            decoder.close()

    asyncio.run(play())


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///etc/passwd", "data:text/html;base64,AAAA", 7])
def test_nothing_is_ever_fetched(url: object) -> None:
    with pytest.raises(InputError, match="data URL"):
        picture_of(url, ImageLimits())


def test_the_worker_of_a_server_that_was_killed_ends(tmp_path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as server:
        worker = int(server.stdout.readline())
        assert alive(worker)
        server.kill()
    until = time.monotonic() + 60
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)
