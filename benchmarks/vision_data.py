"""What benchmarks/vision_gpu.py trains on: drawn screens of an application, each with a question and an answer in the JSON of configs/recipes/ui-vqa.

A screen of about 1 MP has a title, a menu, a form, a table, a chart, buttons and a shaded picture, with words and numbers drawn by a seed: the answer lists
them. 40 ms of a core each. prepare() makes of them what graft's own data stages would, without Ray: images by content, a tokenizer, shards.
"""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZES = ((1280, 784), (1366, 768), (1024, 960), (896, 1120), (1440, 900), (1120, 880))
WORDS = (
    "account address archive balance branch budget calendar campaign cancel category city client close comment company confirm contact country currency customer "
    "dashboard date delete delivery details discount download draft edit email employee export file filter group help history import inbox invoice item language "
    "license limit list location login manager message month name network note notice number open order owner partner password payment permission phone plan "
    "price priority product profile project quantity region report request reset review role save search section security send service settings share shipping "
    "status stock subject submit summary supplier support task tax team ticket time title total transfer update upload user value vendor version view warehouse week"
)
QUESTIONS = (  # asked of each screen, as many as the recipe asks; with the kinds of elements that the answer lists
    ("What is on this screen? List its parts.", ("text", "menu", "field", "table", "chart", "button", "image")),
    ("Which buttons and fields does this screen have?", ("button", "field")),
    ("What does this screen show, besides its menu and its buttons?", ("text", "field", "table", "chart", "image")),
)
INKS = ((30, 60, 110), (20, 100, 80), (120, 40, 60), (70, 50, 120), (60, 60, 60))
VOCABULARY = 8192


# ---- a screen ---------------------------------------------------------------------------------------------------------
def rows(count: int, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """{"messages", "images": [{"bytes": PNG}]} of `count` rows, the k-th a function of k alone, three of a screen; scale: of its sides."""
    for k in range(count):
        if k % len(QUESTIONS) == 0:
            image, elements = screen(random.Random(f"screen {k}"), scale)
            shown = io.BytesIO()
            image.save(shown, "PNG")
        question, kinds = QUESTIONS[k % len(QUESTIONS)]
        listed = [element for element in elements if element["kind"] in kinds]
        answer = json.dumps({"answer": f"{elements[0]['text']}: {len(listed)} parts.", "elements": listed})
        said = (f"<image>{question}", answer)
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        yield {"messages": messages, "images": [{"bytes": shown.getvalue()}]}


def screen(draw: random.Random, scale: float) -> tuple[Image.Image, list[dict[str, str]]]:
    """(the picture, its elements: kind and text)."""
    width, height = (int(side * scale) for side in draw.choice(SIZES))
    ink = draw.choice(INKS)
    image = Image.new("RGB", (width, height), (246, 247, 249))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(8, 20 * scale))
    elements: list[dict[str, str]] = []

    def told(kind: str, text: str) -> str:
        elements.append({"kind": kind, "text": text})
        return text

    def words(few: int, most: int) -> str:
        return " ".join(draw.sample(WORDS.split(), draw.randint(few, most)))

    step, left = int(44 * scale), width // 6
    pen.rectangle((0, 0, width, step), fill=ink)
    pen.text((step // 2, step // 4), told("text", words(2, 3)), fill="white", font=font)
    pen.rectangle((0, step, left, height), fill=(228, 231, 236))
    for n in range(draw.randint(4, 7)):
        pen.text((step // 3, step * (n + 2)), told("menu", words(1, 1)), fill=ink, font=font)
    for n in range(draw.randint(2, 4)):
        top = step * (2 * n + 2)
        pen.text((left + step, top), told("field", words(1, 2)), fill=(40, 40, 40), font=font)
        pen.rectangle((left + 4 * step, top, width // 2, top + step * 0.7), outline=ink, fill="white")
        pen.text((left + 4.2 * step, top + 4), f"{draw.randint(1, 99_999):,}", fill=(40, 40, 40), font=font)
    columns, bottom = draw.sample(WORDS.split(), 3), height - step * draw.randint(5, 7)
    told("table", ", ".join(columns))
    for row in range((height - bottom) // step):
        for n, column in enumerate(columns):
            x = left + step + n * (width - left) // 4
            pen.rectangle((x, bottom + row * step, x + (width - left) // 4, bottom + (row + 1) * step), outline=(200, 204, 210), fill="white")
            pen.text(
                (x + 6, bottom + row * step + 6), f"{draw.randint(1, 9999)}" if row else column, fill=ink if row == 0 else (60, 60, 60), font=font
            )
    told("chart", f"{words(1, 2)} by {words(1, 1)}")
    for n in range(draw.randint(4, 9)):
        x = width // 2 + step * (n + 1)
        pen.rectangle((x, step * 8 - draw.randint(step, step * 5), x + step * 0.7, step * 8), fill=ink)
    for n in range(draw.randint(2, 3)):
        x = width - step * 4 * (n + 1)
        pen.rounded_rectangle((x, height - step * 1.5, x + step * 3.5, height - step * 0.5), 6, fill=ink)
        pen.text((x + 10, height - step * 1.3), told("button", words(1, 2)), fill="white", font=font)
    shaded = Image.linear_gradient("L").resize((step * 4, step * 3)).rotate(draw.randrange(360))
    image.paste(Image.merge("RGB", (shaded, shaded.point(lambda v: 255 - v), shaded)), (width - step * 5, step * 9))
    told("image", words(2, 3))
    return image, elements


# ---- shards -----------------------------------------------------------------------------------------------------------
def prepare(folder: Path, count: int, seq_len: int, image_pixels: int, scale: float) -> dict[str, Any]:
    """Write folder/tokenizer, of a Qwen2.5-VL, and folder/shards with images/ and train/; returns counts."""
    from graft.core.rows import write_jsonl
    from graft.core.sections import Mcq
    from graft.core.shards import write_index
    from graft.data.pictures import Pictures
    from graft.data.shard import shard_documents
    from graft.data.tokenizer import train_tokenizer
    from graft.model.chat import load_tokenizer, tokenizer_digest
    from graft.model.images import write_config

    shards, made = folder / "shards", list(rows(count, scale))
    shards.mkdir(parents=True)
    tokenizer = train_tokenizer((m["content"] for row in made for m in row["messages"]), VOCABULARY, images=True)
    tokenizer.save_pretrained(folder / "tokenizer", save_jinja_files=False)
    write_config(folder / "tokenizer")
    pictures = Pictures(shards / "images", None, Counter())
    write_jsonl(folder / "rows.jsonl", ({"messages": pictures.messages(row, "messages", Mcq())[0]} for row in made))
    source = (str(folder / "tokenizer"), None, "tokenizer")
    file = {"path": str(folder / "rows.jsonl"), "name": "screens", "kind": "chat", "split": None, "weight": 1.0}
    spec = {"files": [file], "source": source, "seq_len": seq_len, "bins_per_shard": 4096, "pack": False, "held_out": 0.0}
    report = shard_documents(spec | {"images": image_pixels, "pad": tokenizer.pad_token_id}, shards)
    digest = tokenizer_digest(load_tokenizer(*source))
    index = write_index(shards / "train", seq_len=seq_len, pad_id=tokenizer.pad_token_id, tokenizer=digest, shards=report["train"])
    (shards / "rejected.jsonl").unlink()
    return {name: index[name] for name in ("bins", "tokens", "supervised_tokens", "images")} | {"rejected": report["rejected"]}
