"""The images of a request, from data URLs or fetched, as an engine takes them: decoded and cut in threads of their own, within limits.

An image of 1 MP takes 60 ms of a core, and 24 MB until its answer has ended. WORKERS are decoded at once; MEMORY bounds what is held, an image
that is on its way counted as the most that it can become. A client who leaves takes along what still waits.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from graft.core.fetch import Address, FetchError, fetch, fetcher, is_public
from graft.model.images import ImageProcessor, Seen
from graft.model.pixels import Unusable, shown
from graft.serve.requests import ApiError
from graft.serve.runner import Overloaded

MAX_BYTES = 16 << 20  # of an image's file
MAX_PIXELS = 1 << 25  # of a file, by its header: a 24 MP camera's pass; 0.4 GB while it is decoded
MEMORY = 2 << 30  # bytes of all images whose answers are under way
PIXEL_BYTES = 24  # of a pixel in patches: three colours in fp32, twice, as a patch is two frames
WORKERS = 2
FETCHES, FETCH_S = 8, 10.0  # downloads at once, seconds of each
_DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64", re.IGNORECASE)


class Images:
    """Of one replica; lives on the event loop. most: of a request; fetch: http(s) URLs too, from addresses that `allow` accepts."""

    def __init__(self, most: int, fetch: bool, allow: Callable[[Address], bool] = is_public):
        self.most, self.fetch, self.allow = most, fetch, allow
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="images")
        self._fetches = asyncio.Semaphore(FETCHES)
        self._coming = 0  # bytes
        self._patches: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # whoever still holds them: a ticket, the engine
        self._number = count()

    @property
    def held(self) -> int:
        """Bytes of the images whose answers are under way, or that are on their way to the engine."""
        return self._coming + sum(patches.nbytes for patches in self._patches.values())

    async def seen(self, images: list[tuple[str, str]], processor: ImageProcessor | None) -> tuple[Seen, ...]:
        """(place in the request, URL) of each as the processor's tower takes it. ApiError names the one that cannot be shown, Overloaded."""
        if not images:
            return ()
        if processor is None:
            raise ApiError(
                400, f"{images[0][0]}: an image, and this server's models see none: their base is of text alone", images[0][0], "invalid_value"
            )
        if len(images) > self.most:
            raise ApiError(400, f"{len(images)} images, at most {self.most} a request (serve.max_images)", "messages", "too_many_images")
        room = len(images) * processor.most * PIXEL_BYTES
        if (held := self.held) and held + room > MEMORY:
            raise Overloaded(f"images of {held >> 20} MiB are under way already, try again soon")
        self._coming += room
        try:
            found = [await self._seen(place, url, processor) for place, url in images]
        finally:
            self._coming -= room
        for one in found:
            self._patches[next(self._number)] = one.patches
        return tuple(found)

    async def _seen(self, place: str, url: str, processor: ImageProcessor) -> Seen:
        source: str | bytes = url
        try:
            if url[:5].lower() != "data:":
                source = await self._fetched(url)
            return await asyncio.get_running_loop().run_in_executor(self._pool, _read, source, processor)
        except (Unusable, FetchError) as e:
            status = 413 if isinstance(e, _TooLarge) else 400
            raise ApiError(status, f"{place}: {e}", place, "invalid_image") from None

    async def _fetched(self, url: str) -> bytes:
        if not self.fetch:
            raise Unusable("an image is sent as data:image/png;base64,… (or jpeg, webp, gif): this server fetches none (serve.fetch_images)")
        async with self._fetches, fetcher(self.allow) as session:
            return await fetch(session, url, MAX_BYTES, FETCH_S, attempts=1)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _TooLarge(Unusable):
    """More bytes than an image may have."""


def _read(source: str | bytes, processor: ImageProcessor) -> Seen:
    """Of a data URL, or of a file's bytes. Raises Unusable."""
    if isinstance(source, str):
        source = _bytes_of(source)
    try:
        return processor.seen(shown(source, MAX_PIXELS))
    except MemoryError:
        raise Unusable("too large: decoding it takes more memory than there is") from None


def _bytes_of(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not _DATA.fullmatch(head):
        raise Unusable("not an image: a data URL begins with data:image/png;base64, (or jpeg, webp, gif)")
    if len(data) * 3 // 4 > MAX_BYTES + 2:
        raise _TooLarge(f"too large: {len(data) * 3 // 4} bytes, at most {MAX_BYTES}")
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError as e:
        raise Unusable(f"not an image: no base64 ({str(e)[:80]})") from None
