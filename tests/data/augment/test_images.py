"""Images through real Ray tasks and real servers: what is kept, what is rejected by which name, and that nothing is lost."""

import hashlib
import io
import itertools
import json
import os
import struct
import zlib

import numpy as np
import pytest
from aiohttp import web
from PIL import Image, ImageDraw

from graft.core.errors import ConfigError, DataError
from graft.core.recipe import Recipe
from graft.core.rows import write_jsonl
from graft.data.augment.images import first_alike, gather
from graft.model.pixels import MAX_PIXELS, Unusable, fingerprint, normalise


def picture(seed, size=(320, 240)):
    """A smooth image that no other seed's looks like."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def recipe(**images):
    tree = {"prompts": ["What is this?"], **images}
    if "file" not in tree:
        tree["folder"] = "photos"
    return Recipe.model_validate({"name": "eyes", "augment": {"images": tree}})


def normal(data, max_side=1024, max_bytes=1_000_000):
    found = normalise(io.BytesIO(data), max_side, max_bytes)
    return Image.open(io.BytesIO(found.jpeg)).convert("RGB"), found


def unusable(data, **limits):
    with pytest.raises(Unusable) as e:
        normal(data, **limits)
    assert "\n" not in str(e.value)
    return str(e.value)


def distance(a, b):
    return (fingerprint(a)[0] ^ fingerprint(b)[0]).bit_count()


# ---- pixels -------------------------------------------------------------------------------------------------------------
def test_the_hash_is_the_usual_phash():
    from scipy.fft import dctn

    image = picture(3)
    small = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0).convert("L"), dtype=float)
    low = dctn(small, type=2)[:8, :8]
    assert fingerprint(image)[0] == int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def test_what_looks_alike_hashes_alike():
    image = picture(1)
    resaved = Image.open(io.BytesIO(encoded(image, quality=40)))
    assert distance(image, resaved) <= 4 and distance(image, image.resize((900, 700))) <= 4
    assert min(distance(picture(a), picture(b)) for a, b in itertools.combinations(range(20), 2)) > 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_image_comes_upright(orientation):
    upright = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 29, 19), fill="red")
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[back[orientation]]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown, found = normal(encoded(stored, exif=exif, quality=95, comment=b"a secret", icc_profile=b"a profile"))
    assert shown.size == (60, 40) and shown.getpixel((10, 10))[1] < 60 and min(shown.getpixel((50, 10))) > 200 and min(shown.getpixel((10, 30))) > 200
    assert not Image.open(io.BytesIO(found.jpeg)).getexif() and b"a secret" not in found.jpeg and b"a profile" not in found.jpeg, (
        "no metadata is sent"
    )


def sixteen_bits():
    return Image.fromarray(np.full((20, 20), 128 * 257, np.uint16))


COLOURS = [
    ("RGBA", Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
    ("half", Image.new("RGBA", (20, 20), (0, 0, 0, 128)), "PNG", (127, 127, 127)),
    ("LA", Image.new("LA", (20, 20), (0, 0)), "PNG", (255, 255, 255)),
    ("P", Image.new("RGB", (20, 20), (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", (0, 0, 255)),
    ("1", Image.new("1", (20, 20), 1), "PNG", (255, 255, 255)),
    ("CMYK", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", (254, 0, 0)),
    ("I;16", sixteen_bits(), "PNG", (128, 128, 128)),
    ("I;16 TIFF", sixteen_bits(), "TIFF", (128, 128, 128)),
    ("F", Image.fromarray(np.array([[0.0, 0.0], [1.0, 1.0]], np.float32)).resize((20, 20), Image.Resampling.NEAREST), "TIFF", (0, 0, 0)),
    ("WEBP", Image.new("RGB", (20, 20), (0, 255, 0)), "WEBP", (0, 255, 0)),
    ("BMP", Image.new("RGB", (20, 20), (0, 255, 0)), "BMP", (0, 255, 0)),
]


@pytest.mark.parametrize(("image", "kind", "expected"), [c[1:] for c in COLOURS], ids=[c[0] for c in COLOURS])
def test_every_kind_of_colour_becomes_rgb_on_white(image, kind, expected):
    shown, _ = normal(encoded(image, kind))
    assert max(abs(a - b) for a, b in zip(shown.getpixel((5, 3)), expected, strict=True)) <= 6


def test_transparency_of_a_palette_is_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0] * 256)
    shown, _ = normal(encoded(image, "GIF", transparency=0))
    assert min(shown.getpixel((5, 5))) > 250


def test_the_first_frame_of_an_animation_is_kept():
    frames = [Image.new("RGB", (30, 30), c) for c in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        shown, _ = normal(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert shown.getpixel((9, 9))[0] > 200 > 60 > shown.getpixel((9, 9))[2], kind


def test_size_and_bytes_are_held_and_the_bytes_are_reproducible():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 1200, 3), dtype=np.uint8))
    shown, found = normal(encoded(noise, "PNG"), max_side=400)
    assert shown.size == (400, 200) == (found.width, found.height)
    small = normal(encoded(noise, "PNG"), max_side=400, max_bytes=len(found.jpeg) // 2)[1]
    assert len(small.jpeg) <= len(found.jpeg) // 2 and small == normal(encoded(noise, "PNG"), max_side=400, max_bytes=len(found.jpeg) // 2)[1]
    assert hashlib.sha256(small.jpeg).hexdigest() == small.sha256
    assert "too large" in unusable(encoded(noise, "PNG"), max_side=400, max_bytes=1000)
    assert normal(encoded(picture(0, (4000, 2))), max_side=100)[0].size == (100, 1)


def png_bomb(width, height):
    """A small file that claims to be large, with valid checksums."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_what_is_no_image_is_told_by_what_it_is():
    good = encoded(picture(0, (640, 480)))
    assert unusable(good[: len(good) // 2]).startswith("truncated")
    assert unusable(encoded(picture(0), "PNG")[:5000]).startswith("truncated")
    assert unusable(good[:12]).startswith("truncated") and unusable(b"\xff\xd8\xff").startswith(("truncated", "corrupt"))
    assert unusable(b"\x89PNG\r\n\x1a\n" + b"junk" * 40).startswith(("truncated", "corrupt"))
    assert unusable(png_bomb(20_000, 20_000)).startswith("too large")
    assert unusable(png_bomb(MAX_PIXELS // 10_000 + 1, 10_000)) == f"too large: {MAX_PIXELS // 10_000 + 1} x 10000 pixels, at most 134 million"
    said = {b"": "empty", b"%PDF-1.7 x": "a PDF", b"<!DOCTYPE html><p>": "an HTML page", b"<svg xmlns=''/>": "XML or SVG", "多文字".encode(): "text"}
    said |= {b"%!PS-Adobe-3.0 EPSF": "PostScript", b"PK\3\4rest": "a ZIP archive", b"\0\1\2\xff\xfe": "unknown bytes"}
    for data, what in said.items():
        assert unusable(data) == f"not an image: {what}"


def test_no_cut_of_a_file_ends_in_a_traceback():
    """Every prefix and many damaged copies of small files are read or refused, in one line."""
    rng = np.random.default_rng(5)
    read = 0
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(picture(1, (24, 16)), kind)
        cuts = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 40))]
        for _ in range(40):
            broken = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                broken[at] = rng.integers(0, 256)
            cuts.append(bytes(broken))
        for data in cuts:
            try:
                normalise(io.BytesIO(data), 64, 100_000)
                read += 1
            except Unusable as e:
                assert "\n" not in str(e)
    assert read > 20


# ---- telling apart ------------------------------------------------------------------------------------------------------
def facts(phash, colour=(9, 9, 9), sha=None):
    return {"sha256": sha or f"{phash:x}-{colour}", "phash": phash, "colour": colour}


def test_the_first_in_order_stays_and_chains_do_not_join():
    chain = [facts(0), facts(0b1111), facts(0b11111111), facts(0b111)]
    assert first_alike(chain, 4) == [0, 0, 2, 0]
    assert first_alike(chain, 0) == [0, 1, 2, 3] and first_alike(chain, 64) == [0] * 4
    flat = [facts(1 << 63, (255, 0, 0), "r"), facts(1 << 63, (0, 0, 255), "b"), facts(1 << 63, (250, 3, 0), "r2")]
    assert first_alike(flat, 4) == [0, 1, 0], "flat images of two colours are two"
    assert first_alike([facts(5, sha="s"), facts(7, sha="s")], 0) == [0, 0], "the same bytes are one image"


def test_alike_agrees_with_comparing_all_pairs():
    rng = np.random.default_rng(2)
    hashes = [int(h) for h in rng.integers(0, 2**63, 60)]
    hashes += [h ^ sum(1 << int(b) for b in rng.choice(64, int(rng.integers(1, 8)), replace=False)) for h in hashes for _ in range(5)]
    rng.shuffle(hashes)
    expected, firsts = [], []
    for i, h in enumerate(hashes):
        near = next((j for j in firsts if (hashes[j] ^ h).bit_count() <= 4), i)
        expected.append(near)
        firsts += [i] if near == i else []
    assert first_alike([facts(h) for h in hashes], 4) == expected and 60 <= len(firsts) < 360


# ---- gathering ----------------------------------------------------------------------------------------------------------
def test_a_folder_of_all_sorts(ray_local, tmp_path):
    photos = tmp_path / "photos"
    (photos / "deep" / ".hidden").mkdir(parents=True)
    for n in range(6):
        (photos / f"{n}.jpg").write_bytes(encoded(picture(n)))
    (photos / "deep" / "new.png").write_bytes(encoded(picture(77), "PNG"))
    (photos / "again.png").write_bytes(encoded(picture(2), "PNG"))  # after 2.jpg: digits sort before letters
    (photos / "bytes.jpg").write_bytes((photos / "3.jpg").read_bytes())
    (photos / "cut.jpg").write_bytes(encoded(picture(9, (900, 900)))[:9000])
    (photos / "notes.txt").write_text("hello")
    (photos / "link.jpg").symlink_to("nowhere")
    (photos / ".DS_Store").write_bytes(b"x")
    (photos / "deep" / ".hidden" / "h.jpg").write_bytes(encoded(picture(50)))
    os.mkfifo(photos / "pipe.jpg")
    (tmp_path / os.fsdecode(b"photos/\xff.jpg")).write_bytes(encoded(picture(60)))
    seen = []
    kept, rejected, counts = gather(recipe(), tmp_path, tmp_path / "draft", on_read=lambda: seen.append(1))
    assert [p.source for p in kept] == [*(f"photos/{n}.jpg" for n in range(6)), "photos/deep/new.png", "photos/\\xff.jpg"]
    assert {r["image"].removeprefix("photos/"): r["reason"] for r in rejected} == {
        "again.png": "duplicate: of photos/2.jpg",
        "bytes.jpg": "duplicate: of photos/3.jpg",
        "cut.jpg": next(r["reason"] for r in rejected if "cut" in r["image"] and r["reason"].startswith("truncated: ")),
        "link.jpg": "not found",
        "notes.txt": "not an image: text",
        "pipe.jpg": "not an image: a folder or a device",
    }
    assert counts == {"in": 14, "kept": 8, "rejected": {"duplicate": 2, "not an image": 2, "not found": 1, "truncated": 1}} and len(seen) == 14
    files = sorted(os.listdir(tmp_path / "draft" / "images"))
    assert files == sorted(f"{p.sha256}.jpg" for p in kept), "no duplicate's file stays"
    for p in kept:
        data = (tmp_path / "draft" / "images" / f"{p.sha256}.jpg").read_bytes()
        assert (
            hashlib.sha256(data).hexdigest() == p.sha256 == p.family
            and len(data) == p.bytes
            and Image.open(io.BytesIO(data)).size == (p.width, p.height)
        )
    assert gather(recipe(), tmp_path, tmp_path / "again") == (kept, rejected, counts), "the same again"


def test_lines_of_a_listing(ray_local, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(picture(n)))
    (tmp_path / "0b.png").write_bytes(encoded(picture(0), "PNG"))
    lines = [
        b'\xef\xbb\xbf{"image": "0.jpg", "prompt": "how many?", "system": "be brief"}',
        b'{"image": "0.jpg", "prompt": "which colour?"}',
        b'{"image": "0b.png", "prompt": "which colour?"}',
        b"",
        b'{"image": "0b.png", "prompt": "what else?"}',
        b'{"image": "1.jpg"}',
        b"{not json",
        b'{"image": 5}',
        b'["2.jpg"]',
        b'{"image": "2.jpg", "prompt": " "}',
        b'{"image": "2.jpg", "prompt": "\\ud800"}',
        b'{"image": "\xff"}',
        b'{"image": "missing\\u0000.jpg", "prompt": "?"}',
        b'{"image": "file:///etc/passwd", "prompt": "?"}',
    ]
    (tmp_path / "list.jsonl").write_bytes(b"\n".join(lines))
    kept, rejected, counts = gather(recipe(file="list.jsonl", prompts=[]), tmp_path, tmp_path / "draft")
    assert [(p.source, p.prompt, p.system) for p in kept] == [
        ("0.jpg", "how many?", "be brief"),
        ("0.jpg", "which colour?", None),
        ("0b.png", "what else?", None),
    ]
    assert kept[0].sha256 == kept[1].sha256 == kept[2].family != kept[2].sha256, "what looks alike is one family"
    assert {r["line"]: r["reason"] for r in rejected} == {
        3: "duplicate: of 0.jpg (line 2)",
        6: "nothing to ask: the line has no prompt, and the recipe neither prompts nor questions",
        7: "bad line: no JSON",
        8: 'bad line: no "image": write {"image": path or URL, "prompt": …}',
        9: 'bad line: no "image": write {"image": path or URL, "prompt": …}',
        10: 'bad line: "prompt" and "system" are text, or left out',
        11: "bad line: no UTF-8",
        12: "bad line: no UTF-8",
        13: "not found",
        14: "bad URL: scheme 'file', only http and https are read",
    }
    assert counts["in"] == 13 == counts["kept"] + sum(counts["rejected"].values())
    assert len(gather(recipe(file="list.jsonl"), tmp_path, tmp_path / "draft2")[0]) == 4, "the recipe's prompt serves the line without one"


@pytest.fixture
def site():
    """A server on 127.0.0.2, which `allow_site` takes for public."""
    import asyncio
    import threading

    async def handle(request):
        name = request.path.strip("/")
        if name.startswith("to"):
            raise web.HTTPFound(f"http://127.0.0.1:{request.url.port}/1.jpg")
        if name.endswith(".jpg"):
            return web.Response(body=encoded(picture(int(name[:-4]))))
        return web.Response(body=b"x" * 5000) if name == "big" else web.Response(body=b"<html>", status=200 if name == "page" else 404)

    ready, where = threading.Event(), {}

    async def serve():
        app = web.Application()
        app.router.add_get("/{name:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.2", 0).start()
        await web.TCPSite(runner, "127.0.0.1", runner.addresses[0][1]).start()
        where.update(url=f"http://127.0.0.2:{runner.addresses[0][1]}", loop=asyncio.get_running_loop(), stop=asyncio.Event())
        ready.set()
        await where["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    ready.wait()
    yield where["url"]
    where["loop"].call_soon_threadsafe(where["stop"].set)
    thread.join()


def test_urls_are_downloaded_and_their_secrets_never_shown(ray_local, tmp_path, site):
    # pickled by value: a worker cannot import this file
    allow = eval("lambda address: str(address) == '127.0.0.2'")
    names = ["1.jpg?X-Signature=s3cret", "2.jpg", "2.jpg?size=2", "gone.jpg0", "page", "big", "to-private"]
    write_jsonl(tmp_path / "list.jsonl", [{"image": f"{site}/{n}"} for n in names] + [{"image": "http://me:s3cret@127.0.0.2/x"}])
    kept, rejected, counts = gather(recipe(file="list.jsonl", max_download_bytes=40_000), tmp_path, tmp_path / "draft", allow)
    assert [p.source for p in kept] == [f"{site}/1.jpg", f"{site}/2.jpg"]
    assert {r["line"]: r["reason"] for r in rejected} == {
        3: f"duplicate: of {site}/2.jpg (line 2)",
        4: "not found: HTTP 404",
        5: "not an image: an HTML page",
        6: "not an image: text",
        7: "private address: 127.0.0.1",
        8: "bad URL: it holds a user or a password",
    }
    assert counts["in"] == 8 and "s3cret" not in json.dumps([rejected, [p.source for p in kept]])
    rejected = gather(recipe(file="list.jsonl", max_download_bytes=4000), tmp_path, tmp_path / "draft2", allow)[1]
    assert {r["line"]: r["reason"] for r in rejected}[6] == "too large: 5000 bytes, at most 4000"
    rejected = gather(recipe(file="list.jsonl"), tmp_path, tmp_path / "draft3")[1]
    assert [r["reason"].partition(":")[0] for r in rejected] == ["private address"] * 7 + ["bad URL"], "the default lets none of them through"


def test_a_source_that_is_not_there_is_told_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no folder at .*photos"):
        gather(recipe(), tmp_path, tmp_path / "draft")
    with pytest.raises(ConfigError, match=r"list\.jsonl.*cannot be read"):
        gather(recipe(file="list.jsonl"), tmp_path, tmp_path / "draft")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="lists no images"):
        gather(recipe(), tmp_path, tmp_path / "draft")


@pytest.mark.campaign
def test_memory_stays_flat_over_ten_thousand_images(ray_local, tmp_path):
    """The driver's own memory: 10,000 images of 48 kB decoded each may cost it 50 MB, not 500."""
    import resource

    (tmp_path / "photos").mkdir()
    for n in range(10_000):
        (tmp_path / "photos" / f"{n:05}.jpg").write_bytes(encoded(picture(n, (160, 120))))
    gather(recipe(), tmp_path, tmp_path / "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = gather(recipe(), tmp_path, tmp_path / "draft")[2]
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{counts['kept']} kept of {counts['in']}, the driver grew by {grown_mb:.0f} MB")
    assert counts["in"] == 10_000 and counts["kept"] > 9_900 and grown_mb < 50
