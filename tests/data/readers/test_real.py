"""Real inputs: reading comprehension as four-option items, maths as chats, news as text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.core.sections import Corpus
from graft.data.readers.files import find, pieces, records, sample
from graft.data.readers.layouts import layout_of, to_messages, to_text

DATA = Path(graft.__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real inputs at {DATA}")


def through(path: Path, layout: str) -> list[Any]:
    """Messages or texts of all records, read in small pieces; every one of them must be usable and of the layout."""
    corpus = Corpus(path=str(path))
    [file] = find(corpus, Path)
    cut = pieces(file, piece_bytes=1 << 20)
    assert len(cut) > 1
    assert layout_of(corpus, sample(cut)) == layout
    made = []
    for piece in cut:
        for record in records(piece):
            assert record.value is not None
            result, reason = to_text(record.value, "text") if layout == "text" else to_messages(record.value, layout, corpus.mcq)
            assert not reason
            made.append(result)
    return made


def test_drcd_as_four_option_items(tmp_path: Path) -> None:
    rows = drcd_items(json.loads((DATA / "drcd_dev.json").read_text(encoding="utf-8")))
    (tmp_path / "drcd.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    made = through(tmp_path / "drcd.jsonl", "mcq")
    assert len(made) == len(rows) > 2000
    for row, (user, assistant) in zip(rows, made, strict=True):
        right = row["answer"]
        assert assistant["content"] == "ABCD"[right - 1] + ". " + row[f"option{right}"]
        assert user["content"].startswith(row["article"]) and assistant["content"] in user["content"]


def drcd_items(drcd: dict[str, Any]) -> list[dict[str, Any]]:
    """A question with its answer and three answers to other questions of the same article."""
    draw, rows = random.Random(0), []
    for article in drcd["data"]:
        asked = [(p["context"], q["question"], q["answers"][0]["text"]) for p in article["paragraphs"] for q in p["qas"]]
        for context, question, answer in asked:
            others = sorted({a for _, _, a in asked} - {answer})
            if len(others) >= 3:
                options = [answer, *draw.sample(others, 3)]
                draw.shuffle(options)
                named = {f"option{i}": option for i, option in enumerate(options, 1)}
                rows.append({"article": context, "question": question, **named, "answer": options.index(answer) + 1})
    return rows


def test_gsm8k_as_chats(tmp_path: Path) -> None:
    source = [json.loads(line) for line in (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = [{"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]} for r in source]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), encoding="utf-8")
    assert through(tmp_path / "gsm8k.jsonl", "messages") == [c["messages"] for c in chats]


def test_taigi_news_as_text() -> None:
    texts = through(DATA / "taigi_news.txt", "text")
    assert "\n".join(texts).split() == (DATA / "taigi_news.txt").read_text(encoding="utf-8").split()
    assert sum(len(t) for t in texts) / len(texts) > 900
