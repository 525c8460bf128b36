"""Images as people have them: kept to the byte, converted, or refused with a reason, and the rows beside go on."""

import hashlib
import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from graft.core.sections import Mcq
from graft.data.pictures import Pictures
from graft.model.chat import files_of


def encoded(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "root").mkdir()
    return Pictures(tmp_path / "kept", tmp_path / "root", Counter())


def keep(pictures, data, name="a"):
    (pictures.root / name).write_bytes(data)
    return read(pictures, name)


def read(pictures, name):
    """(suffix, width, height) of the image that a row shows, or the reason why there is no such row."""
    value = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}], "images": [name]}
    messages, reason = pictures.messages(value, "messages", Mcq())
    if messages is None:
        return reason
    part = messages[0]["content"][0]
    data = (pictures.folder / part["file"]).read_bytes()
    assert part["file"].partition(".")[0] == hashlib.sha256(data).hexdigest() and files_of(messages) == [part["file"]]
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.mode, image.size) == ("RGB", (part["width"], part["height"]))
    return part["file"].partition(".")[2], part["width"], part["height"]


@pytest.mark.parametrize(("format", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_plain_file_is_kept_to_the_byte(pictures, format, suffix):
    data = encoded(RGB, format)
    assert keep(pictures, data) == (suffix, 60, 40)
    assert next(pictures.folder.iterdir()).read_bytes() == data and not pictures.changed


@pytest.mark.parametrize(
    ("data", "size", "why"),
    [
        (encoded(RGB.convert("CMYK"), "JPEG"), (60, 40), ["CMYK image to RGB"]),
        (encoded(RGB.convert("L"), "PNG"), (60, 40), ["L image to RGB"]),
        (encoded(RGB.convert("RGBA"), "PNG"), (60, 40), ["RGBA image to RGB", "transparent image to white"]),
        (encoded(RGB, "BMP"), (60, 40), ["BMP image to PNG"]),
        (encoded(RGB, "JPEG", exif=TURNED), (40, 60), ["image turned upright"]),
        (encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]), (60, 40), ["first frame of an animation"]),
        (encoded(Image.new("RGB", (5000, 10)), "PNG"), None, None),
        (encoded(Image.new("RGB", (5000, 2500)), "PNG"), (4096, 2048), ["image scaled down"]),
    ],
)  # fmt: skip
def test_what_is_not_plain_becomes_plain_and_is_counted(pictures, data, size, why):
    found = keep(pictures, data)
    if size is None:
        assert found == "image too narrow: 4096 x 8 pixels" and not list(pictures.folder.iterdir())
    else:
        assert found == ("png", *size) and sorted(pictures.changed) == why


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image not an image: empty"),
        (b"<html>no</html>", "image not an image: an HTML page"),
        (encoded(RGB, "PNG")[:2000], "image truncated"),
        (encoded(RGB, "PNG").replace(b"IDAT", b"IDOT"), "image corrupt"),
        (bomb(), "image too large"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "image too small: 1 x 1 pixels"),
    ],
)
def test_the_rest_is_refused_by_its_kind(pictures, data, reason):
    found = keep(pictures, data)
    assert isinstance(found, str) and found.startswith(reason) and not list(pictures.folder.iterdir())


def test_rows_reach_no_file_outside_of_the_folder(pictures):
    outside = pictures.root.parent / "secret.png"
    outside.write_bytes(encoded(RGB, "PNG"))
    (pictures.root / "link.png").symlink_to(outside)
    for name in ("../secret.png", str(outside), "link.png", "sub/../../secret.png"):
        assert read(pictures, name) == "an image outside of the corpus's folder of images"
    for name in ("http://localhost/a.png", "data:image/png;base64,AAAA", "file:///etc/passwd"):
        assert read(pictures, name) == "an image that is no file"
    assert read(pictures, "none.png") == "image not found" and read(pictures, ".") == "image not found"
    assert read(pictures, 3) == read(pictures, "a\0.png") == read(pictures, "\ud800.png") == "an image that is no path"


def test_an_absolute_path_inside_is_taken_and_equal_images_are_one_file(pictures):
    data = encoded(RGB, "PNG")
    assert keep(pictures, data) == ("png", 60, 40) == keep(pictures, data, "b") == read(pictures, str(pictures.root / "a"))
    assert len(list(pictures.folder.iterdir())) == 1
