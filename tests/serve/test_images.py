"""Images in chat completions, over a real socket and a real (tiny) Qwen2.5-VL: what is answered, what is refused, and what it may cost."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import random
import struct
import threading
import time
import zlib
from collections import Counter
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import httpx2
import openai
import pytest
from aiohttp import web
from PIL import Image
from starlette.testclient import TestClient

from graft.core.store import AdapterStore
from graft.data import drawings
from graft.engine.hf import HFEngine
from graft.engine.prompt import prompt
from graft.engine.protocol import Request
from graft.model.chat import load_tokenizer
from graft.model.pixels import shown
from graft.serve import guard, images, probe
from graft.serve.api import build
from graft.serve.images import Images
from graft.serve.requests import ApiError
from graft.serve.runner import Runner

from ..ports import free_port
from .conftest import Listening

CHAT = "/v1/chat/completions"
PICTURES = [row["images"][0]["bytes"] for row in drawings.rows(6, seed=4)]
PUBLIC = "127.0.0.2"


def url_of(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(*parts):
    """A message of texts, and of images as bytes or URLs."""
    found = []
    for part in parts:
        if isinstance(part, bytes) or part.startswith(("data:", "http")):
            url = url_of(part) if isinstance(part, bytes) else part
            found.append({"type": "image_url", "image_url": {"url": url}})
        else:
            found.append({"type": "text", "text": part})
    return {"role": "user", "content": found}


def ask(*parts, **other):
    return {"model": "base", "temperature": 1.2, "seed": 7, "max_tokens": 8, "messages": [user(*parts)], **other}


@pytest.fixture(scope="module")
def runner(seeing):
    return Runner(seeing)


@pytest.fixture(scope="module")
def url(runner):
    with Listening(build(runner)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture(scope="module")
def engine(seeing):
    words = AdapterStore(Path(seeing.store)).get("words")
    return HFEngine(seeing.base, None, "fp32", {"words": words.folder}, load_tokenizer(seeing.base), device="cpu", image_pixels=seeing.image_pixels)


def held(http):
    line = next(line for line in http.get("/metrics").text.splitlines() if line.startswith("graft_image_bytes "))
    return float(line.rsplit(" ", 1)[1])


def until(met, seconds=20):
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what is answered ----------------------------------------------------------------------------------------------------
ASKED = [
    ask("What?", PICTURES[0]),
    ask(PICTURES[1], "這是什麼", PICTURES[2], model="words"),
    ask(PICTURES[0], temperature=0),
    ask("no image at all", model="words"),
    {
        **ask(),
        "messages": [
            {"role": "system", "content": "JSON."},
            user(PICTURES[3], "and"),
            {"role": "assistant", "content": "so"},
            user("now", PICTURES[4]),
        ],
    },
    {**ask(), "messages": [user(PICTURES[5], "what"), {"role": "assistant", "content": [{"type": "text", "text": "bars"}]}, user("how many?")]},
    ask(PICTURES[5], "detail", n=3, logprobs=True),
    ask(PICTURES[2], "stop", stop=["e"], max_tokens=20),
]


def expected(engine, asked):
    """(texts of the choices, prompt tokens) as the engine gives them."""
    messages, pictures = [], []
    for message in asked["messages"]:
        parts = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        pictures += [shown(base64.b64decode(p["image_url"]["url"].partition(",")[2])) for p in parts if p["type"] == "image_url"]
        own = [{"type": "image"} if p["type"] == "image_url" else p for p in parts]
        messages.append({"role": message["role"], "content": own if len(own) > 1 or own[0]["type"] == "image" else own[0]["text"]})
    ids, seen = prompt(engine.tokenizer, messages, engine.processor, pictures)
    request = Request(ids, asked["max_tokens"], asked["temperature"], seed=asked["seed"], images=seen, stop=tuple(asked.get("stop", ())))
    request = dataclasses.replace(request, adapter=None if asked["model"] == "base" else asked["model"])
    choices = [dataclasses.replace(request, seed=request.seed + n) for n in range(asked.get("n", 1))]
    return [c.text for c in engine.generate(choices)], len(ids)


def told(reply):
    return [c.message.content for c in reply.choices], reply.usage.prompt_tokens


def test_answers_are_the_engines_alone_and_together_whole_and_streamed(url, client, engine):
    alone = [told(client.chat.completions.create(**asked)) for asked in ASKED]
    assert alone == [expected(engine, asked) for asked in ASKED]
    assert len({texts[0] for texts, _ in alone}) == len(ASKED)

    async def scene():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultAsyncHttpxClient(trust_env=False)) as together:

            async def one(n, asked):
                if n % 2:
                    return told(await together.chat.completions.create(**asked))
                texts, usage = [""] * asked.get("n", 1), None
                async for event in await together.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
                    usage = event.usage or usage
                    for choice in event.choices:
                        texts[choice.index] += choice.delta.content or ""
                return texts, usage.prompt_tokens

            return await asyncio.gather(*(one(n, asked) for n, asked in enumerate(ASKED * 2)))

    assert asyncio.run(scene()) == alone * 2


def saved(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def test_other_kinds_of_file_are_what_they_show(client):
    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in PICTURES[:2])
    clear = first.copy()
    clear.putalpha(255)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turned
    same = {
        "animated": saved(clear.convert("RGBA"), "webp", lossless=True, save_all=True, append_images=[second.convert("RGBA")]),
        "palette": saved(first.quantize(256), "gif"),
        "turned": saved(first.transpose(Image.Transpose.ROTATE_90), "png", exif=turned),
        "alpha": saved(clear, "png"),
    }
    answer = partial(lambda data: client.chat.completions.create(**ask(data, "what", logprobs=True)).choices[0])
    plain = answer(saved(first, "png"))
    for kind, data in same.items():
        assert answer(data).message.content == plain.message.content, kind
    cmyk = saved(first.convert("CMYK"), "jpeg", quality=95)
    assert answer(cmyk).message.content == answer(saved(shown(cmyk), "png")).message.content


def test_the_stage_asks_about_an_image_of_the_adapter(url, engine, tmp_path):
    assert probe.published_image(tmp_path) is None
    for data, end in ((PICTURES[0], "png"), (PICTURES[1] + bytes(5000), "png"), (b"GIF89a", "webp")):
        (tmp_path / f"{hashlib.sha256(data).hexdigest()}.{end}").write_bytes(data)
    (tmp_path / "smaller.png").write_bytes(b"")
    image = probe.published_image(tmp_path)
    assert image.read_bytes() == PICTURES[0]
    reply = probe.ask(url, "words", "what?", 8, None, image)
    texts, _ = expected(engine, ask(PICTURES[0], "what?", model="words", temperature=0))
    assert (reply["reply"], reply["image"]) == (texts[0], image.name)
    assert probe.ask(url, "words", "what?", 8)["reply"] != reply["reply"]


def test_the_card_says_what_is_taken(http, seeing):
    for card in http.get("/v1/models").json()["data"]:
        assert card["input_modalities"] == ["text", "image"] and card["max_images"] == seeing.max_images
        assert card["max_image_bytes"] == images.MAX_BYTES
    parts = http.get("/openapi.json").json()["components"]["schemas"]
    assert {"url", "detail"} == set(parts["ImageURL"]["properties"]) and "ImagePart" in str(parts["Message"])


# ---- what is refused -----------------------------------------------------------------------------------------------------
def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


HOSTILE = {
    "a bomb": (png_header(6000, 6000), "too large: 6000 x 6000 pixels"),
    "a larger bomb": (png_header(60_000, 60_000), "too large"),
    "truncated": (PICTURES[0][:-200], "truncated"),
    "one pixel": (saved(Image.new("RGB", (1, 1)), "png"), "too small"),
    "a line": (saved(Image.new("RGB", (2000, 5)), "png"), "too narrow"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>', "XML or SVG"),
    "text": (b"only words", "not an image: text"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "nothing": (b"", "not an image: empty"),
    "no base64": ("data:image/png;base64,iVBORw0KGgo?", "no base64"),
    "cut base64": ("data:image/png;base64,iVBOR", "no base64"),
    "not ascii": ("data:image/png;base64,圖", "no base64"),
    "no base64 said": ("data:image/png,abc", "a data URL begins with"),
    "no image said": (url_of(PICTURES[0]).replace("image/png", "text/html"), "a data URL begins with"),
    "a file": ("http", "fetches none"),
    "from the web": ("https://example.org/a.png", "serve.fetch_images"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_image_is_refused_with_its_reason(client, kind):
    image, reason = HOSTILE[kind]
    if kind == "a file":
        asked = ask("see")
        asked["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})
    else:
        asked = ask("see", image)
    with pytest.raises(openai.BadRequestError, match=reason) as e:
        client.chat.completions.create(**asked)
    assert (e.value.param, e.value.code) == ("messages.0.content.1", "invalid_image")


def test_mangled_files_are_no_error_of_the_server(http):
    image, rng, counts = Image.open(io.BytesIO(PICTURES[0])).convert("RGB"), random.Random(0), Counter()
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ico"):
        whole = saved(image, kind)
        for n in range(6):
            data = bytearray(whole if n % 2 else whole[: rng.randrange(1, len(whole))])
            for _ in range(n * 4):
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
            reply = http.post(CHAT, json=ask(url_of(data), "see", max_tokens=1))
            counts[reply.status_code] += 1
            assert reply.status_code == 200 or reply.json()["error"]["code"] == "invalid_image", (kind, n, reply.text)
    assert set(counts) == {200, 400} and min(counts.values()) > 3


def test_limits_are_told(http, seeing):
    def refusal(content):
        body = content if isinstance(content, bytes) else None
        reply = http.post(CHAT, content=body, json=None if body else content, headers={"Content-Type": "application/json"})
        return reply.status_code, reply.json()["error"]["param"], reply.json()["error"]["message"]

    many = seeing.max_images + 1
    assert refusal(ask(*PICTURES[:1] * many)) == (400, "messages", f"{many} images, at most 16 a request (serve.max_images)")
    status, param, said = refusal(ask("data:image/png;base64," + "A" * ((images.MAX_BYTES // 3 + 2) * 4)))
    assert (status, param) == (413, "messages.0.content.0") and f"at most {images.MAX_BYTES}" in said
    assert refusal(ask("data:image/png;base64," + "A" * 30_000_000))[::2] == (413, f"the body is larger than {guard.MAX_WITH_IMAGES} bytes")
    assert refusal(ask(PICTURES[0], "x" * (guard.MAX_BODY + 1)))[:2] == (413, "messages")
    flood = b'{"model":"base","messages":[{"role":"user","content":[' + b"0," * guard.MAX_BODY + b"0]}]}"
    assert refusal(flood)[0] == 413
    assert refusal(b'{"model":"base","messages":[{"role":"user","content":[' + b"0," * 900_000 + b"0]}]}")[:2] == (400, "messages.0.content.0")
    body = httpx2.Request("POST", "http://x", json={"model": "base", "prompt": "x" * guard.MAX_BODY}).read()
    reply = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413, "no other route takes more than before"


def test_the_context_holds_the_tokens_of_images(http, engine):
    asked = ask(PICTURES[0], "what")
    tokens = expected(engine, asked)[1]
    for more, status in ((0, 200), (1, 400)):
        reply = http.post(CHAT, json={**asked, "max_tokens": engine.max_length - tokens + more, "stop": ["e", "a", "r", " "]})
        assert reply.status_code == status
    assert reply.json()["error"]["code"] == "context_length_exceeded" and f"take {tokens} tokens" in reply.json()["error"]["message"]
    assert tokens > engine.processor.tokens(engine.processor.grid(drawings.SIDE, drawings.SIDE))


PAD = "<|image_pad|>"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": f"what is {PAD}?"}],
        [user(f"what is <|vision_start|>{PAD}<|vision_end|>?", PICTURES[0])],
        [{"role": "system", "content": PAD}, user(PICTURES[0])],
        [user(PICTURES[0]), {"role": "assistant", "content": PAD * 16}, user("and?")],
    ],
)
def test_no_text_passes_for_an_image(http, messages):
    reply = http.post(CHAT, json={**ask(), "messages": messages})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages") and "image" in reply.json()["error"]["message"]


def test_no_text_of_a_completion_passes_for_an_image(http, engine):
    for text in (f"a {PAD} b", engine.tokenizer(f"a {PAD} b")["input_ids"]):
        reply = http.post("/v1/completions", json={"model": "base", "prompt": text})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


# ---- from elsewhere ------------------------------------------------------------------------------------------------------
async def fetched(processor, *paths, **how):
    """What Images gives for paths of a site on PUBLIC, where {private} stands for one on a private address."""

    async def site(request):
        if "to" in request.query:
            raise web.HTTPFound(request.query["to"])
        return web.Response(body=PICTURES[0] if request.path == "/a.png" else b"words")

    app = web.Application()
    app.router.add_get("/{name}", site)
    running = web.AppRunner(app)
    await running.setup()
    own = Images(4, True, **how)
    try:
        port = free_port()
        for host in (PUBLIC, "127.0.0.1"):
            await web.TCPSite(running, host, port).start()
        where = [p if "://" in p[:8] else f"http://{PUBLIC}:{port}{p}".replace("{private}", f"http://127.0.0.1:{port}/a.png") for p in paths]
        return await own.seen([(f"place {n}", u) for n, u in enumerate(where)], processor)
    finally:
        own.close()
        await running.cleanup()


def test_images_are_fetched_from_public_addresses_alone(engine):
    only = {"allow": lambda address: address == ip_address(PUBLIC)}
    (seen,) = asyncio.run(fetched(engine.processor, "/a.png", **only))
    wanted = engine.processor.seen(shown(PICTURES[0]))
    assert seen.grid == wanted.grid and (seen.patches == wanted.patches).all()
    for paths, how, place, reason in (
        (["/a.png", "/b?to={private}"], only, "place 1", "private address: 127.0.0.1"),
        (["/a.png"], {}, "place 0", "private address: 127.0.0.2"),
        (["/words"], only, "place 0", "not an image: text"),
        (["ftp://a.example/a.png"], only, "place 0", "bad URL: scheme 'ftp'"),
        (["javascript:alert(1)"], only, "place 0", "bad URL"),
    ):
        with pytest.raises(ApiError, match=reason) as e:
            asyncio.run(fetched(engine.processor, *paths, **how))
        assert (e.value.status, e.value.body["error"]["param"]) == (400, place)


# ---- what it may cost ----------------------------------------------------------------------------------------------------
@pytest.fixture
def slow(runner, monkeypatch):
    """The processor waits for `free`; `at_once` counts who does."""

    class Slow:
        free, at_once, most, whole = threading.Event(), 0, 0, runner.processor.seen

        def seen(self, image):
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            assert self.free.wait(60)
            self.at_once -= 1
            return self.whole(image)

    slow = Slow()
    monkeypatch.setattr(runner.processor, "seen", slow.seen)
    yield slow
    slow.free.set()


def test_others_are_answered_while_images_are_read_and_who_leaves_frees_them(http, slow):
    before = held(http)
    with httpx2.Client(base_url=http.base_url, timeout=0.4, trust_env=False) as hasty:
        for _ in range(images.WORKERS + 1):
            with pytest.raises(httpx2.TimeoutException):
                hasty.post(CHAT, json=ask(PICTURES[0], "see"))
    assert http.post(CHAT, json=ask("no image")).status_code == 200
    until(lambda: held(http) == before == 0)
    assert slow.most == images.WORKERS
    slow.free.set()
    assert http.post(CHAT, json=ask(PICTURES[0], "see")).status_code == 200


def test_fifty_clients_at_once_stay_within_the_memory(url, http, runner, slow, monkeypatch):
    most = runner.processor.most * images.PIXEL_BYTES  # bytes of an image
    monkeypatch.setattr(images, "MEMORY", 10 * most)

    async def scene():
        async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as many:
            asking = [asyncio.create_task(many.post(CHAT, json=ask(PICTURES[n % 6], "see", stream=n % 2 == 0))) for n in range(50)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            assert held(http) == 10 * most
            slow.free.set()
            return [reply for reply in await asyncio.gather(*asking)]

    replies = asyncio.run(scene())
    counts = Counter(reply.status_code for reply in replies)
    assert counts[200] >= 10 and counts[429] > 10 and set(counts) == {200, 429}
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 429)
    until(lambda: held(http) == 0)
    assert slow.most == images.WORKERS


def test_long_bodies_share_a_limit(http, monkeypatch):
    monkeypatch.setattr(guard, "BODIES", 3 << 20)
    asked = ask("data:image/png;base64," + "A" * (3 << 20))
    reply = http.post(CHAT, json=asked)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    monkeypatch.setattr(guard, "BODIES", 4 << 20)
    for _ in range(3):  # what was refused or answered is no longer held
        assert http.post(CHAT, json=asked).status_code == 400


def test_a_long_body_that_comes_before_the_model_is_no_mistake(seeing):
    with TestClient(build(Runner(seeing)), base_url="http://localhost") as early:
        reply = early.post(CHAT, json=ask("data:image/png;base64," + "A" * (3 << 20)))
        assert (reply.status_code, "retry-after" in reply.headers) == (503, True), "to be sent again, as soon as the base is known"
