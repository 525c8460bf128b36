"""Images of rows as thumbnails that the page holds itself, each decoded from a file that is what its name says; else a plain line of why it is not shown.

A thumbnail has SIDE pixels a side and 24 KiB at most: 80 of a task are 2.6 MB of the page, those of drawings 0.1 MB. One of 1 MP costs 50 ms.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.report.scrub import cut
from graft.report.tree import Picture

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "images"  # of an artifact
SIDE = 320  # pixels, of a thumbnail
SHOWN = 4  # images of a row
ALT = 80  # code points of the question
MAX_BYTES = 64 << 20  # of a file
SMALL = 16 << 10  # bytes of a PNG, which keeps a drawing's edges and letters; a JPEG where it would have more
LARGEST, QUALITIES = 24 << 10, (80, 60, 40, 20, 5)
_NAME = re.compile(r"([0-9a-f]{64})\.(?:png|jpg|webp)")


class Album:
    """The images of an artifact; each is decoded once."""

    def __init__(self, artifact: Path):
        self.folder = artifact / FOLDER
        self._known: dict[str, Picture] = {}

    def pictures(self, messages: list[dict[str, Any]]) -> tuple[Picture, ...]:
        """The first SHOWN images of a conversation in their order, then a line of how many are left."""
        parts, about = images_of(messages), cut(" ".join(question(messages).split()), ALT)
        found = []
        for n, part in enumerate(parts[:SHOWN], 1):
            name = f"image {n} of {len(parts)}" if len(parts) > 1 else "image"
            picture = self._picture(str(part.get("file", "")))
            found.append(replace(picture, name=name, alt=f"{name}, {picture.size}: {about}"))
        return (*found, *([Picture(f"{len(parts) - SHOWN} more", wrong="not shown")] if len(parts) > SHOWN else []))

    def _picture(self, file: str) -> Picture:
        if file not in self._known:
            try:
                self._known[file] = _thumbnail(self._read(file))
            except (ValueError, OSError, MemoryError) as e:  # of a decoder, a disk or this process: one image less, not the page
                self._known[file] = Picture(wrong=cut(getattr(e, "strerror", None) or str(e) or type(e).__name__, 200))
            except ImportError:
                self._known[file] = Picture(wrong="not shown, for Pillow is not installed")
        return self._known[file]

    def _read(self, file: str) -> bytes:
        digest = _NAME.fullmatch(file)
        if not digest:
            raise ValueError(f"not shown: {cut(file, 80)!r} is no image's name")
        path, short = self.folder / file, f"{file[:12]}…{file[64:]}"
        if not path.is_file():
            raise ValueError(f"missing, {short}")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"too large, {short}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest[1]:
            raise ValueError(f"altered, {short} has another SHA-256 than its name")
        return data


def _thumbnail(data: bytes) -> Picture:
    from graft.model.pixels import MAX_SIDE, shown  # a report without images needs no Pillow

    image = shown(data, MAX_SIDE * MAX_SIDE)
    size = f"{image.width}\u00a0×\u00a0{image.height}"
    image.thumbnail((SIDE, SIDE))
    image.info.clear()  # comments and profiles would go along
    kind, made = "png", _encoded(image, "PNG", optimize=True)
    if len(made) > SMALL:
        kind, made = "jpeg", next(jpeg for q in QUALITIES if len(jpeg := _encoded(image, "JPEG", quality=q)) <= LARGEST or q == QUALITIES[-1])
    uri = f"data:image/{kind};base64,{base64.b64encode(made).decode()}"
    return Picture(data=uri, size=size, width=image.width, height=image.height)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


# ---- what a row says --------------------------------------------------------------------------------------------------
def in_marks(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of each message, with [image] where one stands, numbered where there are several."""
    several, numbers = len(images_of(messages)) > 1, count(1)

    def said(part: Any) -> str:
        if _is_image(part):
            return f"[image {next(numbers)}]" if several else "[image]"
        return str(part.get("text", "")) if isinstance(part, dict) else ""

    return [(str(m.get("role", "")), _joined(map(said, c)) if isinstance(c := m.get("content", ""), list) else str(c)) for m in messages]


def _joined(texts: Any) -> str:
    whole = ""
    for text in texts:
        whole += ("" if not whole or whole[-1].isspace() or text[:1].isspace() else " ") + text
    return whole


def question(messages: list[dict[str, Any]]) -> str:
    """The text of the last turn of the user, without its images."""
    content = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), "")
    texts = [p.get("text", "") for p in content if isinstance(p, dict) and not _is_image(p)] if isinstance(content, list) else [content]
    return _joined(map(str, texts))


def images_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts that are images, in the order in which they are shown."""
    return [part for m in messages if isinstance(c := m.get("content"), list) for part in c if _is_image(part)]


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"
