"""The images of a recipe: listed, read or downloaded, normalised by Ray Data tasks, and each kept once.

Tasks write `<sha256>.jpg` files and report hashes; the driver sees no pixels and holds about 1 kB an image. A core
normalises about 40 images of 1 MP a second; telling 100,000 apart costs the driver about 5 s.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from graft.core.errors import ConfigError, DataError
from graft.core.fetch import Address, FetchError, fetch, fetcher, is_public, without_secrets
from graft.core.recipe import Recipe
from graft.core.rows import Row
from graft.core.sections import Images

FOLDER = "images"
BLOCK = 256  # images a task, at most
DOWNLOADS = 8  # at once in a task; each holds at most max_download_bytes
COLOUR_LEVELS = 16  # images that look alike in grey but differ more in mean red, green or blue are two

ITEMS = pa.schema([("index", pa.int64()), ("remote", pa.bool_()), ("place", pa.binary())])
FOUND = pa.schema(
    [
        ("index", pa.int64()),
        ("reason", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("colour", pa.list_(pa.uint8(), 3)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Source:
    """One file of the folder or line of the JSONL; `reason` where it already cannot be used."""

    name: str  # as the user wrote it, a URL without its query
    line: int | None = None
    place: bytes = b""  # file system path, or URL
    remote: bool = False
    prompt: str | None = None
    system: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Picture:
    """A kept image: `<folder>/images/<sha256>.jpg`, and what its line wants asked.

    family: the sha256 of the first image that this one looks like, its own where it is the first.
    """

    source: str
    sha256: str
    family: str
    width: int
    height: int
    bytes: int
    prompt: str | None
    system: str | None


def gather(
    recipe: Recipe,
    base: Path,
    folder: Path,
    allow: Callable[[Address], bool] = is_public,
    on_read: Callable[[], None] = lambda: None,
) -> tuple[list[Picture], list[Row], dict[str, Any]]:
    """Normalise the recipe's images into `folder`/images; returns (kept, rejected, counts), both in the order listed.

    base: the recipe's own folder. folder: on a file system that every Ray node sees. on_read: called after each image.
    rejected: {"image", "line", "reason"}, the reason led by its kind. counts: {"in", "kept", "rejected": {kind: n}}, where
    in = kept + rejected. An image is rejected as a duplicate where an earlier one looks like it and is asked the same.
    Needs a running Ray. Raises ConfigError where the folder or file cannot be read, DataError where it lists nothing.
    """
    images = recipe.augmentation.images
    assert images is not None, "the caller looked"
    sources = list(list_sources(images, base))
    if not sources:
        raise DataError(f"augment.images: {images.folder or images.file} lists no images: add some, or mend the path")
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    found = _read_all(sources, images, folder / FOLDER, recipe.api.timeout_s, allow, on_read)
    kept, rejected = _tell_apart(sources, found, images.duplicate_bits)
    wanted = {f"{p.sha256}.jpg" for p in kept}
    for entry in os.scandir(folder / FOLDER):
        if entry.name not in wanted:  # duplicates, and halves of files that a killed task left
            os.unlink(entry.path)
    kinds = Counter(str(r["reason"]).partition(":")[0] for r in rejected)
    return kept, rejected, {"in": len(sources), "kept": len(kept), "rejected": dict(sorted(kinds.items()))}


# ---- listing ----------------------------------------------------------------------------------------------------------
def list_sources(images: Images, base: Path) -> Iterator[Source]:
    """The files of the folder, recursively, sorted by path, hidden ones left out; or the lines of the JSONL file."""
    if images.folder is not None:
        yield from _files(images.folder, base)
    elif images.file is not None:
        yield from _lines(images, base)


def _files(folder: str, base: Path) -> Iterator[Source]:
    root = base / folder
    if not root.is_dir():
        raise ConfigError(f"augment.images.folder = {folder!r}: no folder at {root}: mend the path, it is relative to the recipe")
    found = [
        os.path.relpath(os.path.join(at, name), root)
        for at, folders, names in os.walk(root)
        for folders[:] in [[f for f in folders if not f.startswith(".")]]
        for name in names
        if not name.startswith(".")
    ]
    for name in sorted(found, key=os.fsencode):
        yield Source(_readable(os.path.join(folder, name)), place=os.fsencode(root / name))


def _lines(images: Images, base: Path) -> Iterator[Source]:
    assert images.file is not None
    try:
        with (base / images.file).open("rb") as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield _line(raw, number, images, base)
    except OSError as e:
        raise ConfigError(
            f"augment.images.file = {images.file!r} cannot be read ({e.strerror}): mend the path, it is relative to the recipe"
        ) from None


def _line(raw: bytes, number: int, images: Images, base: Path) -> Source:
    where = f"{images.file}:{number}"

    def bad(reason: str, name: str = where) -> Source:
        return Source(name, number, reason=reason)

    try:
        line = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeError:
        return bad("bad line: no UTF-8")
    except (ValueError, RecursionError):
        return bad("bad line: no JSON")
    image = line.get("image") if isinstance(line, dict) else None
    if not isinstance(image, str) or not image.strip():
        return bad('bad line: no "image": write {"image": path or URL, "prompt": …}')
    remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", image) is not None
    name = without_secrets(image)[:200] if remote else image
    said = [line.get(key) for key in ("prompt", "system")]
    if any(text is not None and (not isinstance(text, str) or not text.strip()) for text in said):
        return bad('bad line: "prompt" and "system" are text, or left out', name)
    if said[0] is None and not images.prompts and not images.questions:
        return bad("nothing to ask: the line has no prompt, and the recipe neither prompts nor questions", name)
    return Source(name, number, image.encode() if remote else os.fsencode(base / image), remote, *said)


def _readable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---- reading, in Ray tasks ----------------------------------------------------------------------------------------------
def _read_all(
    sources: list[Source], images: Images, out: Path, timeout_s: float, allow: Callable[[Address], bool], on_read: Callable[[], None]
) -> dict[int, dict[str, Any]]:
    """FOUND by index, of every source that has no reason yet."""
    import ray

    items = [(i, s.remote, s.place) for i, s in enumerate(sources) if s.reason is None]
    if not items:
        return {}
    cpus = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(BLOCK, len(items) // (4 * cpus)))
    blocks = [
        pa.table(dict(zip(ITEMS.names, zip(*items[at : at + size], strict=True), strict=True)), schema=ITEMS) for at in range(0, len(items), size)
    ]
    read = partial(read_batch, images=images, out=out, timeout_s=timeout_s, allow=allow)
    found = {}
    for row in ray.data.from_arrow(blocks).map_batches(read, batch_format="pyarrow", batch_size=None).iter_rows():
        found[row["index"]] = row
        on_read()
    return found


def read_batch(batch: pa.Table, images: Images, out: Path, timeout_s: float, allow: Callable[[Address], bool]) -> pa.Table:
    """ITEMS to FOUND: downloads overlap, decoding goes one image after another; writes `out`/<sha256>.jpg."""

    async def read() -> list[dict[str, Any]]:
        downloads, decoder = asyncio.Semaphore(DOWNLOADS), asyncio.Lock()
        async with fetcher(allow) as session:

            async def one(item: dict[str, Any]) -> dict[str, Any]:
                async with downloads:
                    data = None
                    if item["remote"]:
                        try:
                            data = await fetch(session, item["place"].decode(), images.max_download_bytes, timeout_s)
                        except FetchError as e:
                            return {"index": item["index"], "reason": str(e)}
                    async with decoder:
                        return {"index": item["index"], **await asyncio.to_thread(_normalise, data, item["place"], images, out)}

            return await asyncio.gather(*map(one, batch.to_pylist()))

    return pa.Table.from_pylist(asyncio.run(read()), schema=FOUND)


def _normalise(data: bytes | None, place: bytes, images: Images, out: Path) -> dict[str, Any]:
    from io import BytesIO

    from graft.model.pixels import Unusable, normalise

    try:
        if data is None and not os.path.isfile(place):
            return {"reason": "not an image: a folder or a device" if os.path.exists(place) else "not found"}
        with BytesIO(data) if data is not None else open(place, "rb") as file:
            normal = normalise(file, images.max_side, images.max_bytes)
    except Unusable as e:
        return {"reason": str(e)}
    except OSError as e:
        return {"reason": f"not found: {e.strerror or e}"}
    final = out / f"{normal.sha256}.jpg"
    if not final.exists():
        temporary = out / f".{normal.sha256}.{os.getpid()}"
        temporary.write_bytes(normal.jpeg)
        os.replace(temporary, final)
    facts = {key: getattr(normal, key) for key in ("sha256", "phash", "colour", "width", "height")}
    return {"reason": None, **facts, "bytes": len(normal.jpeg)}


# ---- telling apart, on the driver ---------------------------------------------------------------------------------------
def _tell_apart(sources: list[Source], found: dict[int, dict[str, Any]], bits: int) -> tuple[list[Picture], list[Row]]:
    kept: list[Picture] = []
    rejected: list[Row] = []
    readable = [i for i in range(len(sources)) if i in found and found[i]["reason"] is None]
    firsts = dict(zip(readable, first_alike([found[i] for i in readable], bits), strict=True))  # by index: position in `readable`
    asked: dict[tuple[int, str | None, str | None], int] = {}  # (first image, prompt, system) -> who asked
    for i, source in enumerate(sources):
        reason = source.reason or found[i]["reason"]
        if reason is None:
            first = readable[firsts[i]]
            before = asked.setdefault((first, source.prompt, source.system), i)
            if before == i:
                facts = {key: found[i][key] for key in ("sha256", "width", "height", "bytes")}
                kept.append(Picture(source.name, family=found[first]["sha256"], prompt=source.prompt, system=source.system, **facts))
                continue
            reason = f"duplicate: of {_where(sources[before])}"
        rejected.append({"image": source.name, "line": source.line, "reason": reason})
    return kept, rejected


def _where(source: Source) -> str:
    return source.name if source.line is None else f"{source.name} (line {source.line})"


def first_alike(found: Iterable[dict[str, Any]], bits: int) -> list[int]:
    """For each image the position of the earliest one that it looks like, its own where there is none.

    Alike: the perceptual hashes differ in at most `bits` bits and the mean colours by at most COLOUR_LEVELS a channel. Only
    images that were themselves the first are compared with, so a chain of small changes does not join its two ends.
    Each hash meets all firsts before it in one numpy operation: 100,000 distinct images cost 5e9 popcounts, about 5 s.
    """
    found = list(found)
    hashes, colours = np.empty(len(found), np.uint64), np.empty((len(found), 3), np.int16)
    position: list[int] = []  # of each first
    by_sha: dict[str, int] = {}
    result = []
    for i, image in enumerate(found):
        first = by_sha.get(image["sha256"])
        if first is None:
            n, phash, colour = len(position), np.uint64(image["phash"]), np.array(image["colour"], np.int16)
            near = np.flatnonzero(np.bitwise_count(hashes[:n] ^ phash) <= bits)
            near = near[(np.abs(colours[near] - colour) <= COLOUR_LEVELS).all(axis=1)]
            if near.size:
                first = position[near[0]]
            else:
                first, hashes[n], colours[n] = i, phash, colour
                position.append(i)
            by_sha[image["sha256"]] = first
        result.append(first)
    return result
