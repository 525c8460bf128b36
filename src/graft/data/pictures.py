"""The images of rows, kept by content: `images/<sha256>.<suffix>`, each decoded once, and whole, before a row may show it.

A plain file (JPEG, PNG or WebP; one frame, upright, 8 bits of RGB, at most MAX_SIDE a side) is kept to the byte; what else can be shown as
such becomes a PNG; the rest is refused with a reason. A core takes about 40 images of 1 MP a second.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from graft.core.errors import ConfigError
from graft.core.sections import Mcq
from graft.data.readers.image_rows import to_messages_and_images, with_parts
from graft.data.readers.mcq import Refused
from graft.model.chat import Messages
from graft.model.pixels import FORMATS, MAX_SIDE, Unusable, decoded, explained, orientation, wrong_size

FOLDER = "images"
MAX_BYTES = 64 << 20  # of a file
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Pictures:
    """A folder of images, filled by rows that name files below `root`, or bring bytes."""

    def __init__(self, folder: Path, root: Path | None, changed: Counter[str]):
        """changed: counts the images that are not kept as they are, by what was done."""
        self.folder, self.root, self.changed = folder, root.resolve() if root else None, changed
        self.folder.mkdir(exist_ok=True)
        self._known: dict[str, dict[str, Any]] = {}  # by path

    def messages(self, value: dict[str, Any], layout: str, mcq: Mcq, answered: bool = True) -> tuple[Messages | None, str]:
        """As `to_messages` gives them, with parts where the record has images: {"type": "image", "file", "width", "height"}."""
        messages, images, reason = to_messages_and_images(value, layout, mcq, answered)
        if messages is None:
            return None, reason
        try:
            return with_parts(messages, [self.keep(image) for image in images]), ""
        except Unusable as e:
            return None, f"image {e}"
        except Refused as e:
            return None, str(e)

    def keep(self, image: Any) -> dict[str, Any]:
        """{"file", "width", "height"} of an image as a record names it, its file there. Raises Unusable or Refused."""
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            return self._kept(image["bytes"])
        name = image.get("path") if isinstance(image, dict) else image
        if not isinstance(name, str) or not name:
            raise Refused("an image that is no path")
        if name not in self._known:
            self._known[name] = self._kept(self._read(name))
        return self._known[name]

    def _read(self, name: str) -> bytes:
        if self.root is None or "://" in name or name.startswith("data:"):
            raise Refused("an image that is no file")
        try:
            path = Path(os.path.realpath(self.root / name))
        except ValueError:  # NUL, or a lone surrogate
            raise Refused("an image that is no path") from None
        if not path.is_relative_to(self.root):
            raise Refused("an image outside of the corpus's folder of images")
        try:
            if not path.is_file():
                raise Unusable("not found")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise Unusable(f"too large: {size} bytes, at most {MAX_BYTES}")
            return path.read_bytes()
        except OSError as e:
            raise Unusable(f"not found: {e.strerror or e}") from None

    def _kept(self, data: bytes) -> dict[str, Any]:
        file = io.BytesIO(data)
        with explained(file):
            suffix, size, why = _looked_at(file)
            if why:
                file.seek(0)
                image = decoded(file, MAX_SIDE)
                made = io.BytesIO()
                image.save(made, "PNG")
                data, suffix, size = made.getvalue(), "png", image.size
        if wrong := wrong_size(*size):
            raise Unusable(wrong)
        name = f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        self.changed.update(why)
        if not (self.folder / name).exists():
            (self.folder / name).write_bytes(data)
        return {"file": name, "width": size[0], "height": size[1]}


def _looked_at(file: io.BytesIO) -> tuple[str, tuple[int, int], list[str]]:
    """(suffix, size, why the file cannot be kept as it is: nothing, and then all of it was decoded)."""
    with Image.open(file, formats=FORMATS) as image:
        why = {
            "image scaled down": max(image.size) > MAX_SIDE,
            f"{image.format} image to PNG": image.format not in _SUFFIX,
            f"{image.mode} image to RGB": image.mode != "RGB",
            "transparent image to white": image.has_transparency_data,
            "first frame of an animation": getattr(image, "n_frames", 1) > 1,
            "image turned upright": orientation(image) not in (None, 1),
        }
        if not any(why.values()):
            image.load()
        return _SUFFIX.get(image.format or "", "png"), image.size, [name for name, so in why.items() if so]


def below(root: str, folder: Path) -> Pictures:
    """Those of files below `root`, filled into `folder`; ConfigError where it is no folder."""
    if not Path(root).is_dir():
        raise ConfigError(f"--images {root} is no folder: mend it")
    return Pictures(folder, Path(root), Counter())
