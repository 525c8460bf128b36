"""Image files as strangers make them: what one shows, decoded within limits, or why it shows nothing; as a plain JPEG, with the numbers that tell it again.

Decoding, scaling, hashing and encoding a 1 MP JPEG costs about 25 ms of one core. At most one decoded image is in memory:
MAX_PIXELS of RGBA, 0.5 GB, in the worst case; a JPEG is decoded at a fraction of its size where that is enough.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from graft.core.errors import ArtifactError

MAX_PIXELS = 1 << 27  # a phone's 108 MP pass
MAX_SIDE = 4096  # pixels, of an image that is shown to a model
MIN_SIDE = 4
NARROW = 200  # times as long as wide, which no image processor of Qwen takes
QUALITIES = (90, 80, 70, 60, 50, 40, 30)
# No EPS, PSD, PDF, WMF and the like: they start other programs, or are no pictures of what they show
Image.init()  # only what is registered can be asked for by name
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO") if f in Image.OPEN)

_MAGIC = (  # offset, bytes, what it is; those of FORMATS come here only when their header is broken
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"BM", "BMP"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"RIFF", "audio or video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (4, b"ftyphe", "HEIC, which is not read: convert it"),
    (4, b"ftypmif1", "HEIC, which is not read: convert it"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyp", "a video"),
)
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(ValueError):
    """Why an image is rejected, as one line that starts with its kind: not an image, truncated, corrupt, too large."""


@dataclass(frozen=True)
class Normal:
    """An image as it will be sent.

    phash: 64 bits, similar for images that look alike. colour: mean red, green and blue, 0 to 255.
    """

    jpeg: bytes
    sha256: str
    phash: int
    colour: tuple[int, int, int]
    width: int
    height: int


def normalise(file: BinaryIO, max_side: int, max_bytes: int) -> Normal:
    """The first frame of an image file, upright, on white, in RGB, at most max_side pixels wide and high, without metadata.

    A function of the bytes and the two limits under one version of Pillow. Raises Unusable for whatever the file is instead.
    """
    with explained(file):
        image = decoded(file, max_side)
    jpeg = _encode(image, max_bytes)
    phash, colour = fingerprint(image)
    return Normal(jpeg, hashlib.sha256(jpeg).hexdigest(), phash, colour, *image.size)


@contextmanager
def explained(file: BinaryIO) -> Iterator[None]:
    """Whatever a decoder raises over a file's bytes, as Unusable."""
    try:
        yield
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit comes first, at twice its MAX_IMAGE_PIXELS
        raise Unusable(f"too large: more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        file.seek(0)
        raise Unusable(_what(file.read(512))) from None
    except Exception as e:  # noqa: BLE001 - a decoder that is fed arbitrary bytes may raise anything
        text = " ".join(str(e).split())[:120] or type(e).__name__
        kind = "truncated" if "truncated" in text.lower() or isinstance(e, EOFError) else "corrupt"
        raise Unusable(f"{kind}: {text}") from None


def fingerprint(image: Image.Image) -> tuple[int, tuple[int, int, int]]:
    """(perceptual hash, mean colour) of an RGB image.

    The hash is the usual pHash (Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf): the 8x8 lowest
    frequencies of a 32x32 grey version, each above or below their median.
    """
    small = image.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    grey = np.asarray(small.convert("L"), dtype=np.float64)
    low = np.round(_DCT @ grey @ _DCT.T, 6)  # rounded: on a flat image all but one are 0, and noise must not decide
    bits = np.packbits(low > np.median(low))
    red, green, blue = (round(float(c)) for c in np.asarray(small, dtype=np.float64).mean(axis=(0, 1)))
    return int.from_bytes(bits.tobytes()), (red, green, blue)


# The first 8 rows of the 32-point DCT-II
_DCT = np.cos(math.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))


def verified(path: Path, mend: str) -> bytes:
    """An image's file that is named by its SHA-256; ArtifactError where it is not there or not that. mend: what to do then."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read ({e.strerror}): {mend}") from None
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise ArtifactError(f"{path} was altered: its SHA-256 is not its name; {mend}")
    return data


def shown(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """What a file shows, as a model may see it: the first frame, upright, on white, in RGB, MAX_SIDE pixels a side at most. Raises Unusable.

    max_pixels: of the file, refused by its header, before any is decoded.
    """
    file = io.BytesIO(data)
    with explained(file):
        image = decoded(file, MAX_SIDE, max_pixels)
    if wrong := wrong_size(*image.size):
        raise Unusable(wrong)
    return image


def wrong_size(width: int, height: int) -> str | None:
    """Why an image of that size shows nothing, None where it may."""
    if min(width, height) < MIN_SIDE:
        return f"too small: {width} x {height} pixels"
    return f"too narrow: {width} x {height} pixels" if max(width, height) > NARROW * min(width, height) else None


def decoded(file: BinaryIO, max_side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame, upright, on white, in RGB, at most max_side pixels wide and high."""
    with Image.open(file, formats=FORMATS) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise Unusable(f"too large: {width} x {height} pixels, at most {max_pixels / 1e6:.0f} million")
        opened.draft(opened.mode, (max_side, max_side))  # a JPEG decodes at 1/2, 1/4 or 1/8 where that still covers max_side
        opened.load()
        turn = _TURN.get(orientation(opened))
        image = _rgb(opened)
    image.info.clear()  # comments and profiles, which an encoder would write again
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image.transpose(turn) if turn is not None else image


def orientation(image: Image.Image) -> Any:
    """The EXIF tag: how the image is turned; None where nothing says it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - broken metadata does not make a broken picture
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(np.asarray(image).clip(0, 65535) / 257)
    elif image.mode == "F":  # no scale of its own: darkest to brightest
        values = np.nan_to_num(np.asarray(image))
        image = _eight_bits((values - values.min()) * (255 / (float(np.ptp(values)) or 1.0)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _eight_bits(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8))


def _encode(image: Image.Image, max_bytes: int) -> bytes:
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() <= max_bytes:
            return out.getvalue()
    raise Unusable(f"too large: {out.tell()} bytes at JPEG quality {quality}, augment.images.max_bytes is {max_bytes}: lower max_side")


def _what(head: bytes) -> str:
    """What a file is that Pillow does not know, by its first bytes."""
    if not head:
        return "not an image: empty"
    for offset, magic, name in _MAGIC:
        if head[offset:].startswith(magic):
            return f"corrupt: a {name} header that cannot be read" if name in FORMATS else f"not an image: {name}"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).strip().lower()  # incremental: the last character may be cut
    except UnicodeDecodeError:
        text = "\0"
    if text.startswith(("<svg", "<?xml")):
        return "not an image: XML or SVG"
    if text.startswith(("<!doctype html", "<html")):
        return "not an image: an HTML page"
    return "not an image: unknown bytes" if "\0" in text else "not an image: text"
