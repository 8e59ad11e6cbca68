"""Pictures of clients to frames of the model: decoded in a process of its own, so that a hostile file costs a worker.

A picture's size is read from its header before anything is decoded. The worker has limits on memory and processor time
(where the system has rlimits); one that hangs or dies is replaced.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import multiprocessing
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from tmlc.errors import InputError
from tmlc.processes import safe_path

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_WAITING = 8
"""Pictures of all sessions that wait for the worker; the next one is refused."""
TIMEOUT = 2.0
START_TIMEOUT = 30.0
"""Seconds for a worker to start, on a busy machine."""
PICTURES = 200
"""A worker decodes so many: its limit on processor time counts from its start."""
_URL = "send data:image/jpeg;base64, and the bytes of the file in base64"
_SMALLER = "send a smaller one"
_PREFIXES = tuple(f"data:image/{kind};base64," for kind in ("jpeg", "jpg", "png", "webp"))


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may be, `bytes` of file and `pixels`, and what its worker may use: `memory` in bytes, `seconds` of
    processor time."""

    bytes: int = 2 << 20
    pixels: int = 4 << 20
    memory: int = 1 << 30
    seconds: int = 30


def picture_of(url: object, limits: ImageLimits) -> bytes:
    """The bytes of a data URL. Raises InputError for any other URL: nothing is ever fetched."""
    if not isinstance(url, str) or not url.startswith(_PREFIXES):
        raise InputError("a picture must be a data URL of a JPEG, PNG or WebP file in base64", fix=_URL)
    text = url[url.index(",") + 1 :]
    if len(text) > limits.bytes * 4 // 3 + 4:
        raise InputError(f"the picture has more than {limits.bytes} bytes", fix=_SMALLER)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the picture is not valid base64", fix=_URL) from None


def decode_frame(data: bytes, height: int, width: int, limits: ImageLimits | None = None) -> np.ndarray:
    """uint8 [height, width, 3]: the middle of the picture in the model's proportions, as recordings are fitted.

    Raises InputError: not a picture of `FORMATS`, too large, damaged.
    """
    from PIL import Image, ImageOps

    allowed = limits or ImageLimits()
    if len(data) > allowed.bytes:
        raise InputError(f"the picture has more than {allowed.bytes} bytes", fix=_SMALLER)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > allowed.pixels:
                size = f"{picture.width} × {picture.height}"
                raise InputError(f"the picture has {size} pixels, more than {allowed.pixels}", fix=_SMALLER)
            picture.draft("RGB", (width, height))
            fitted = ImageOps.fit(picture.convert("RGB"), (width, height), method=Image.Resampling.BILINEAR)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds for damaged files
        what = f"the picture cannot be decoded: {type(error).__name__}"
        raise InputError(what, fix="send a whole JPEG, PNG or WebP file") from None
    return np.ascontiguousarray(np.asarray(fitted, np.uint8))


def _limit(memory: int, seconds: int) -> None:
    """In a new worker: what it may use, and that it ends with its server, also one that was killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import resource
    except ImportError:  # a system without rlimits
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begin() -> None:
    """In a new worker: imports what decoding needs, so that no picture waits for it."""
    from PIL import Image, ImageOps  # noqa: F401

    Image.preinit()


def _submit_first(pool: ProcessPoolExecutor) -> Future[None]:
    with safe_path():
        return pool.submit(_begin)


class FrameDecoder:
    """One worker for all sessions of a server.

    Args:
        height, width: of the model's frames.
    """

    def __init__(self, height: int, width: int, limits: ImageLimits | None = None) -> None:
        self.height, self.width, self.limits = height, width, limits or ImageLimits()
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._done = 0

    async def decode(self, data: bytes) -> np.ndarray:
        """A frame for the model. Raises InputError: as `decode_frame`, or too many wait, or it took too long."""
        if self._waiting >= MAX_WAITING:
            raise InputError(f"{MAX_WAITING} pictures wait to be decoded", fix="send fewer pictures a second")
        self._waiting += 1
        # Who leaves meanwhile does not end the work: the worker is at it, and the next picture would wait behind it.
        work = asyncio.create_task(self._in_turn(data))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(work)

    async def _in_turn(self, data: bytes) -> np.ndarray:
        try:
            async with self._turn:
                return await self._decode(data)
        finally:
            self._waiting -= 1

    async def _decode(self, data: bytes) -> np.ndarray:
        pool = await self._started()
        self._done += 1
        try:
            work = asyncio.wrap_future(pool.submit(decode_frame, data, self.height, self.width, self.limits))
            return await asyncio.wait_for(work, TIMEOUT)
        except TimeoutError:
            self._replace()
            raise InputError(f"the picture took more than {TIMEOUT:g} s to decode", fix=_SMALLER) from None
        except (BrokenProcessPool, MemoryError):
            self._replace()
            what = "the picture took more memory or time to decode than a picture may"
            raise InputError(what, fix=_SMALLER) from None

    async def start(self) -> None:
        """Starts the worker before the first picture comes. Raises InputError when it cannot be started."""
        async with self._turn:
            await self._started()

    async def _started(self) -> ProcessPoolExecutor:
        if self._done >= PICTURES:
            self._replace()
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            limits = (self.limits.memory, self.limits.seconds)
            with safe_path():  # a pool starts Python's own tracker of resources
                pool = self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_limit, initargs=limits)
            try:
                begun = await asyncio.to_thread(_submit_first, pool)  # starts the process, which takes a while
                await asyncio.wait_for(asyncio.wrap_future(begun), START_TIMEOUT)
            except asyncio.CancelledError:
                self._replace()
                raise
            except (TimeoutError, BrokenProcessPool, OSError):
                self._replace()
                what = "pictures cannot be decoded now: the worker did not start"
                raise InputError(what, fix="send it again in a minute") from None
        return self._pool

    def _replace(self) -> None:
        pool, self._pool, self._done = self._pool, None, 0
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends the worker."""
        self._replace()
