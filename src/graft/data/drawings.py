"""Charts, tables and forms drawn at random, each with a question and its answer: images whose content is known, from nothing but Pillow.

A drawing of SIDE x SIDE pixels shows one of KINDS in one of COLOURS, with a number of things (bars, points, slices, rows, fields) to count.
2,000 a second on one core.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator

from PIL import Image, ImageDraw

from graft.core.rows import Row

SIDE = 112  # pixels
MARGIN = 10
COLOURS = {"red": (214, 40, 40), "green": (30, 150, 70), "blue": (35, 80, 200), "orange": (240, 150, 20), "purple": (130, 50, 160)}
COUNTS = range(2, 6)
INK = (40, 40, 40)

Colour = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, random.Random, int, Colour], None]


def rows(count: int, seed: int) -> Iterator[Row]:
    """{"messages", "images": [{"bytes": PNG}]} of `count` drawings, the k-th a function of (seed, k) alone."""
    for k in range(count):
        rng = random.Random(f"{seed}/{k}")
        kind, colour, things = rng.choice(list(KINDS)), rng.choice(list(COLOURS)), rng.choice(COUNTS)
        said = {"kind": kind, "colour": colour, "count": things}
        asked, answer = rng.choice(_ASKED)(said)
        messages = [{"role": "user", "content": f"<image>{asked}"}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "images": [{"bytes": drawn(kind, colour, things, rng)}]}


def drawn(kind: str, colour: str, things: int, rng: random.Random) -> bytes:
    """The PNG of a drawing; `rng` decides sizes and places."""
    shade = rng.randrange(235, 256)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    red, green, blue = (max(0, min(255, c + rng.randrange(-20, 21))) for c in COLOURS[colour])
    KINDS[kind](ImageDraw.Draw(image), rng, things, (red, green, blue))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# ---- what is drawn ----------------------------------------------------------------------------------------------------
def _bars(draw: ImageDraw.ImageDraw, rng: random.Random, things: int, colour: Colour) -> None:
    _axes(draw)
    width = (SIDE - 2 * MARGIN) / things
    for n in range(things):
        left = MARGIN + n * width
        draw.rectangle((left + width * 0.15, rng.randrange(MARGIN + 4, SIDE - 3 * MARGIN), left + width * 0.85, SIDE - MARGIN), fill=colour)


def _points(draw: ImageDraw.ImageDraw, rng: random.Random, things: int, colour: Colour) -> None:
    _axes(draw)
    step = (SIDE - 2 * MARGIN) / things
    places = [(MARGIN + (n + 0.5) * step, rng.randrange(2 * MARGIN, SIDE - 2 * MARGIN)) for n in range(things)]
    draw.line(places, fill=colour, width=3)
    for x, y in places:
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)


def _slices(draw: ImageDraw.ImageDraw, rng: random.Random, things: int, colour: Colour) -> None:
    shares = [rng.uniform(1, 2) for _ in range(things)]
    start, box = rng.uniform(0, 360), (MARGIN, MARGIN, SIDE - MARGIN, SIDE - MARGIN)
    for share in shares:
        end = start + 360 * share / math.fsum(shares)
        draw.pieslice(box, start, end, fill=colour, outline="white", width=4)
        start = end


def _table(draw: ImageDraw.ImageDraw, rng: random.Random, things: int, colour: Colour) -> None:
    height, columns = (SIDE - 2 * MARGIN) / things, rng.randrange(2, 5)
    for n in range(things):
        top = MARGIN + n * height
        draw.rectangle((MARGIN, top, SIDE - MARGIN, top + height), outline=INK, fill=colour if n == 0 else "white", width=2)
    for n in range(1, columns):
        x = MARGIN + n * (SIDE - 2 * MARGIN) / columns
        draw.line((x, MARGIN, x, SIDE - MARGIN), fill=INK, width=2)


def _form(draw: ImageDraw.ImageDraw, rng: random.Random, things: int, colour: Colour) -> None:
    height = (SIDE - 2 * MARGIN) / (things + 1)
    for n in range(things):
        top = MARGIN + n * height
        draw.line((MARGIN, top + height * 0.4, MARGIN + rng.randrange(14, 30), top + height * 0.4), fill=INK, width=3)
        draw.rectangle((MARGIN + 36, top + height * 0.1, SIDE - MARGIN, top + height * 0.75), outline=INK, fill="white")
    left = rng.randrange(MARGIN, SIDE // 2)
    draw.rounded_rectangle((left, SIDE - MARGIN - height * 0.8, left + 40, SIDE - MARGIN), 3, fill=colour)


def _axes(draw: ImageDraw.ImageDraw) -> None:
    draw.line((MARGIN, MARGIN, MARGIN, SIDE - MARGIN, SIDE - MARGIN, SIDE - MARGIN), fill=INK, width=2)


KINDS: dict[str, Draw] = {"bar chart": _bars, "line chart": _points, "pie chart": _slices, "table": _table, "form": _form}


# ---- what is asked ----------------------------------------------------------------------------------------------------
_ASKED: tuple[Callable[[Row], tuple[str, str]], ...] = (
    lambda said: ("What is drawn?", said["kind"]),
    lambda said: ("Which colour is it?", said["colour"]),
    lambda said: ("How many parts?", str(said["count"])),
    lambda said: ("Describe it in JSON.", json.dumps(said)),
)
