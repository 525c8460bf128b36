"""The reading part, called directly: records to documents, each kept or rejected with a reason."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from graft.core.rows import read_jsonl, write_jsonl
from graft.core.sections import Clean, Corpus, Decontaminate, Dedup
from graft.data.dedup import KEYS, SIGNATURES
from graft.data.readers.files import pieces
from graft.data.reading import read_pieces, write_evaluation_texts

EXAM = "What is the weight of a cubic metre of dry snow that has just fallen on the hill behind the old school?"


@pytest.fixture
def read(tmp_path):
    """read(records, layout, **corpus): (texts, rejected, report) of a JSONL file with these records."""

    def run(records, layout="text", **corpus):
        file, gate, folder = tmp_path / "in.jsonl", tmp_path / "gate.jsonl", tmp_path / "out"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
        write_jsonl(gate, [{"text": EXAM}])
        folder.mkdir()
        spec = {
            "corpus": Corpus(path="in.jsonl", **corpus).model_dump(mode="json"),
            "layout": layout,
            "pieces": [list(p) for p in pieces(file)],
            "gate": str(gate),
            "decontaminate": Decontaminate().model_dump(mode="json"),
            "dedup": Dedup().model_dump(mode="json"),
        }
        report = read_pieces(json.loads(json.dumps(spec)), folder)
        table = pq.read_table(folder / "documents.parquet")
        assert report["documents"] == table.num_rows and report["characters"] >= 0
        return table, list(read_jsonl(folder / "rejected.jsonl")), report

    return run


def test_a_long_text_becomes_documents_and_every_record_is_accounted_for(read):
    sentence = "這是一個很長的句子，說的是海邊的風景和人。"
    records = [{"text": sentence * 20}, {"text": "太短"}, {"text": None}, {"body": 1}, "{oops", {"text": f"so: {EXAM.upper()} " + "and more. " * 5}]
    table, rejected, report = read(records, clean=Clean(max_chars=200))
    texts = table["text"].to_pylist()
    assert "".join(texts) == sentence * 20 and max(map(len, texts)) <= 200 and set(table["number"].to_pylist()) == {0}
    assert [r["number"] for r in rejected] == [1, 2, 3, 4, 5] and rejected[0]["reason"] == "too short"
    assert rejected[-1]["reason"] == "contaminated" and rejected[-1]["file"] == "in.jsonl"
    assert report["records"] == 6 and sum(report["rejected"].values()) == len(rejected) and report["changed"]["segment.documents"] == 1


def test_neighbours_of_one_title_are_one_text(read):
    records = [{"text": f"paragraph {i}", "title": "a" if i < 2 else "b"} for i in range(3)] + [{"text": "alone"}, {"text": "late", "title": "a"}]
    table, _, report = read(records, clean=Clean(min_chars=2, merge_by="title"))
    assert table["text"].to_pylist() == ["paragraph 0\n\nparagraph 1", "paragraph 2", "alone", "late"]
    assert table["number"].to_pylist() == [0, 2, 3, 4] and report["records"] == 5


def test_chats_are_compared_by_equality_and_texts_by_likeness(read, tmp_path):
    article = "那天清早，漁船回到港口，碼頭上的人忙著卸貨。" * 10

    def chat(question):
        return {"messages": [{"role": "user", "content": article + question}, {"role": "assistant", "content": "一"}]}

    chats, rejected, _ = read([chat("誰？"), chat("何時？"), {"messages": [{"role": "assistant", "content": "x"}]}], "messages")
    keys, signed = (np.fromfile(tmp_path / f"out/{name}", np.uint32).reshape(2, -1) for name in (KEYS, SIGNATURES))
    assert keys.shape == (2, 4) and signed.shape == (2, 128) and (signed[0] != signed[1]).all()
    assert json.loads(chats["text"][0].as_py()) == chat("誰？")["messages"]
    assert [r["number"] for r in rejected] == [2] and rejected[0]["text"]


def test_evaluation_texts_are_questions_and_texts_once_each(tmp_path):
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "an answer"}]} for q in ("one", "two", "one")]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    (tmp_path / "texts.jsonl").write_text('{"text": "three"}\n{"text": null}\n{oops')
    files = {"messages": tmp_path / "chats.jsonl", "text": tmp_path / "texts.jsonl"}
    sets = [{"corpus": {"path": "x"}, "layout": layout, "pieces": [list(p) for p in pieces(path)]} for layout, path in files.items()]
    (tmp_path / "out").mkdir()
    assert write_evaluation_texts({"texts": ["zero", "two"], "sets": sets, "sent": None}, tmp_path / "out") == {"texts": 4}
    assert [r["text"] for r in read_jsonl(tmp_path / "out/texts.jsonl")] == ["zero", "two", "one", "three"]
