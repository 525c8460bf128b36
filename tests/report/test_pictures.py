"""Thumbnails of files as they are, and of none that is not what its name says."""

import base64
import io
import sys

import pytest
from PIL import Image

from graft.report.pictures import LARGEST, SIDE, Album, in_marks

from .made_images import drawing, noise, put, text, user

QUESTION = "Which colour has the tallest bar of the three, and how much taller is it than the one beside it?"


def decoded(picture):
    head, _, body = picture.data.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == f"data:image/{image.format.lower()};base64" and image.size == (picture.width, picture.height)
    return image


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_a_thumbnail_is_the_image_and_says_what_was_asked(tmp_path):
    wide = encoded(Image.new("RGB", (1280, 640), "navy"), "JPEG", comment=b"planted", exif=b"Exif\0\0planted")
    small, big = Album(tmp_path).pictures([user(put(tmp_path, drawing(1)[0]), text(QUESTION), put(tmp_path, wide, "jpg"))])
    assert decoded(small).convert("RGB").tobytes() == Image.open(io.BytesIO(drawing(1)[0])).tobytes(), "a drawing is kept as it is"
    assert decoded(big).size == (SIDE, SIDE // 2) and (small.size, big.size) == ("112\u00a0×\u00a0112", "1280\u00a0×\u00a0640")
    assert big.alt == f"image 2 of 2, {big.size}: {QUESTION[:80]}…" and (small.name, small.wrong, big.wrong) == ("image 1 of 2", "", "")
    assert b"planted" in wide and not any(b"planted" in base64.b64decode(p.data.partition(",")[2]) for p in (small, big))


def test_what_does_not_compress_stays_small(tmp_path):
    (picture,) = Album(tmp_path).pictures([user(put(tmp_path, noise(1, 400, 400, tmp_path / "noise.png")))])
    assert decoded(picture).format == "JPEG" and len(picture.data) < 4 / 3 * LARGEST + 40


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda data: None, "missing, "),
        (lambda data: data[:-1] + b"?", "altered, "),
        (lambda data: b"", "altered, "),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_a_line(tmp_path, bad, said):
    part = put(tmp_path, drawing(1)[0])
    path = tmp_path / "images" / part["file"]
    content = bad(path.read_bytes())
    path.write_bytes(content) if content is not None else path.unlink()
    (picture,) = Album(tmp_path).pictures([user(part, text("?"))])
    assert picture.data == "" and picture.wrong.startswith(said + part["file"][:12])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not a picture", "not an image: text"),
        (drawing(1)[0][:200], "truncated"),
        (encoded(Image.new("1", (5000, 5000))), "too large: 5000 x 5000"),
        (encoded(Image.new("RGB", (1, 1))), "too small"),
    ],
    ids=["text", "truncated", "huge", "1x1"],
)
def test_a_file_that_shows_nothing_is_a_line(tmp_path, data, said):
    (picture,) = Album(tmp_path).pictures([user(put(tmp_path, data))])
    assert picture.data == "" and picture.wrong.startswith(said)


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "", None, "a" * 64 + ".svg", "A" * 64 + ".png", "<b>.png", "a" * 64 + ".png\n"])
def test_a_name_that_is_no_images_reads_no_file(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path.parent / "secret.png").write_bytes(drawing(1)[0])
    (picture,) = Album(tmp_path).pictures([user({"type": "image", "file": name})])
    assert picture.data == "" and "no image's name" in picture.wrong


def test_without_pillow_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "graft.model.pixels", None)
    (picture,) = Album(tmp_path).pictures([user(put(tmp_path, drawing(1)[0]))])
    assert (picture.data, picture.wrong) == ("", "not shown, for Pillow is not installed")


def test_four_are_shown_and_the_rest_are_counted(tmp_path):
    parts = [put(tmp_path, drawing(n)[0]) for n in range(6)]
    *four, rest = Album(tmp_path).pictures([user(*parts[:2]), {"role": "assistant", "content": "yes"}, user(*parts[2:])])
    assert [p.name for p in four] == [f"image {n} of 6" for n in (1, 2, 3, 4)] and all(p.data for p in four)
    assert (rest.name, rest.wrong, rest.data) == ("2 more", "not shown", "")
    assert [p.data for p in four] == [Album(tmp_path).pictures([user(part)])[0].data for part in parts[:4]], "in order"


def test_marks_stand_where_images_do():
    image = {"type": "image", "file": "x"}
    assert in_marks([{"role": "user", "content": "no image"}]) == [("user", "no image")]
    assert in_marks([user(image, text("What?"))]) == [("user", "[image] What?")]
    told = in_marks([user(text("Is this\n"), image, text(" as "), image, text("?")), {"role": "assistant", "content": "Yes"}, user(image)])
    assert told == [("user", "Is this\n[image 1] as [image 2] ?"), ("assistant", "Yes"), ("user", "[image 3]")]
